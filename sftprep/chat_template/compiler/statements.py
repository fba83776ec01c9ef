"""Translation of the statements of a template to the lines of a Python function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.compiler import find_undeclared
from jinja2.idtracking import Symbols

from sftprep.chat_template.compiler import runtime
from sftprep.chat_template.compiler.analysis import count_field_uses, stores_name
from sftprep.chat_template.compiler.context import anchor_count
from sftprep.chat_template.compiler.fragments import Code, Loop, Macro, merge_literals
from sftprep.chat_template.compiler.source_writer import SourceWriter
from sftprep.chat_template.reference.sandbox import is_generation
from sftprep.chat_template.reference.turn_tracking import turn_of

_SPECIAL_NAMES = frozenset({"caller", "kwargs", "varargs"})
_FETCHED_USES = 3
"""A field of a loop variable is fetched into a Python variable if it is used more often than this.
Of messages, these are role and content; most other fields occur in a branch that few turns take."""


class StatementTranslator(SourceWriter):
    """The translator of a whole template."""

    def function(self, tree: nodes.Template) -> str:
        """Return the source of the function `render`."""
        expressions = self.expressions
        expressions.symbols.analyze_node(tree)
        # Macros may call macros that are defined further down.
        for node in tree.body:
            if isinstance(node, nodes.Macro):
                self._declare_macro(node)
        self.indent = 1
        self.enter_scope(expressions.symbols)
        self.body(tree.body)
        # Only now is it known which variables of the caller the template reads.
        head = ["def render(messages, tools, add_generation_prompt, variables):"]
        head += [
            f"    {variable} = variables.get({name!r}, U)"
            for name, variable in expressions.inputs.items()
        ]
        head += [
            f"    {anchor_count(variable)} = anchors_in({variable})"
            for name, variable in expressions.inputs.items()
            if name in expressions.special
        ]
        head += [
            "    out = []",  # the pieces of the text
            "    k = 0",  # anchors so far
            "    marks = []",
            "    turns = []",
            "    most = 64 + 16 * len(messages)",
        ]
        tail = [
            "    if len(out) > most and size(out) > 1 << 20: fall_back('a long output')",
            # The same as `RenderedPieces(...)`, in half of the time.
            "    return new(RenderedPieces, (join(out), out, k, marks, turns, messages))",
        ]
        return "\n".join([*head, *self.lines, *tail, ""])

    def statement(self, node: nodes.Node) -> None:
        """Write one statement."""
        translate = _TRANSLATIONS.get(type(node))
        if translate is None:
            self.only_jinja(node, type(node).__name__.lower())
        else:
            translate(self, node)

    def _if(self, node: nodes.If) -> None:
        for keyword, branch in (("if", node), *(("elif", branch) for branch in node.elif_)):
            self.line(f"{keyword} {self.expressions.expression(branch.test).source}:")
            self.indented_body(branch.body)
        if node.else_:
            self.line("else:")
            self.indented_body(node.else_)

    def _loop_control(self, node: nodes.Node) -> None:
        self.line(type(node).__name__.lower())

    # --- assignments ------------------------------------------------------------------------------

    def _assign(self, node: nodes.Assign) -> None:
        target, value, expressions = node.target, node.node, self.expressions
        if isinstance(target, nodes.Name) and target.name in expressions.analysis.namespaces:
            assert isinstance(value, nodes.Call)
            if not expressions.is_namespace(value):
                self.only_jinja(node, "another namespace function")
                return
            variable = expressions.variable(expressions.symbols.ref(target.name))
            self.line(f"{variable} = {expressions.namespace(value).source}")
            return
        left = self.assignment_target(target)
        if left is None:
            self.only_jinja(node, "this assignment")
        else:
            self.line(f"{left} = {expressions.expression(value).source}")
            if isinstance(target, nodes.Name) and target.name in expressions.with_anchors:
                count = self.anchors_in(merge_literals(expressions.pieces(value))) or "0"
                self.line(f"{anchor_count(left)} = {count}")

    def _assign_block(self, node: nodes.AssignBlock) -> None:
        left, expressions = self.assignment_target(node.target), self.expressions
        if left is None or node.filter is not None:
            self.only_jinja(node, "this block assignment")
            return
        outer, out, allows_marks = expressions.symbols, self.out, self.allows_marks
        expressions.symbols = Symbols(parent=outer)
        expressions.symbols.analyze_node(node)
        self.out, self.allows_marks = expressions.new_name("b"), False
        self.enter_scope(expressions.symbols)
        self.line(f"{self.out} = []")
        self.body(node.body)
        self.line(f"{left} = join({self.out})")
        expressions.symbols, self.out, self.allows_marks = outer, out, allows_marks

    # --- loops ------------------------------------------------------------------------------------

    def _for(self, node: nodes.For) -> None:
        if node.recursive or node.else_ or isinstance(node.target, nodes.NSRef):
            self.only_jinja(node, "a recursive loop" if node.recursive else "this kind of loop")
            return
        expressions = self.expressions
        outer = expressions.symbols
        sequence = expressions.expression(node.iter).source
        inner = Symbols(parent=outer)
        uses_loop = "loop" in find_undeclared(node.iter_child_nodes(only=("body",)), ("loop",))
        loop_ref = inner.declare_parameter("loop") if uses_loop else ""
        inner.analyze_node(node, for_branch="body")
        if node.test is not None:
            sequence = self._filter_items(node, sequence)
        expressions.symbols = inner
        target = self.assignment_target(node.target)
        if target is None:
            self.only_jinja(node, "this loop target")
            expressions.symbols = outer
            return
        outer_loop = expressions.loops.get(loop_ref)
        if uses_loop:
            loop = Loop(
                expressions.new_name("s"), expressions.new_name("i"), expressions.new_name("last")
            )
            expressions.loops[loop_ref] = loop
            items = loop.sequence
            self.line(f"{items} = {sequence}")
            self.line(f"if type({items}) is not list: {items} = list({items})")
            self.line(f"{loop.last} = len({items}) - 1")
            self.line(f"for {loop.index}, {target} in enumerate({items}):")
        else:
            self.line(f"for {target} in {sequence}:")
        self.indent += 1
        self._loop_body(node, inner, target)
        self.indent -= 1
        expressions.symbols = outer
        if outer_loop is not None:
            expressions.loops[loop_ref] = outer_loop
        else:
            expressions.loops.pop(loop_ref, None)

    def _filter_items(self, node: nodes.For, sequence: str) -> str:
        """Write the loop for the `if` of a `for`, and return its result variable.

        The loop selects the items for which the condition holds.
        """
        expressions = self.expressions
        outer = expressions.symbols
        expressions.symbols = Symbols(parent=outer)
        expressions.symbols.analyze_node(node, for_branch="test")
        selected = expressions.new_name("s")
        target = self.assignment_target(node.target)
        self.line(f"{selected} = []")
        if target is None or not isinstance(node.target, nodes.Name):
            self.only_jinja(node, "this loop target")
        else:
            self.line(f"for {target} in {sequence}:")
            self.indent += 1
            self.enter_scope(expressions.symbols)
            test = expressions.expression(node.test).source
            self.line(f"if {test}: {selected}.append({target})")
            self.indent -= 1
        expressions.symbols = outer
        return selected

    def _loop_body(self, node: nodes.For, inner: Symbols, target: str) -> None:
        """Write the body of a loop.

        A loop variable whose fields are used is assumed to be a dictionary, which the first line of
        the body checks.
        """
        expressions = self.expressions
        name = node.target.name if isinstance(node.target, nodes.Name) else ""
        uses = count_field_uses(node.body, name) if name else {}
        keys = [
            key for key in uses if not key.startswith("_") and key not in runtime.NAMES_OF_MAPPINGS
        ]
        is_object = any(key not in runtime.NAMES_OF_VALUES for key in keys)
        ref = inner.refs[name] if is_object and not stores_name(node.body, name) else ""
        outer_fields = expressions.fields.get(ref)
        if self.num_open_loops:
            # In nested loops a hostile template could write without end.
            self.line(f"if len({self.out}) > 1_000_000: fall_back('a long output')")
        if ref:
            self.line(
                f"if type({target}) is not dict: fall_back('a loop over something else than"
                " objects')"
            )
            fetched = {key: expressions.new_name("f") for key in keys if uses[key] > _FETCHED_USES}
            for key, variable in fetched.items():
                self.line(f"{variable} = {target}.get({key!r}, U)")
            expressions.fields[ref] = fetched
        self.enter_scope(inner)
        self.num_open_loops += 1
        self.body(node.body)
        self.num_open_loops -= 1
        if ref:
            del expressions.fields[ref]
            if outer_fields is not None:
                expressions.fields[ref] = outer_fields

    # --- macros and blocks ------------------------------------------------------------------------

    def _declare_macro(self, node: nodes.Macro) -> Macro | None:
        """Make a macro known to later calls; return None if only Jinja can run it."""
        expressions = self.expressions
        ref = expressions.symbols.ref(node.name)
        parameters = [argument.name for argument in node.args]
        special = find_undeclared(node.body, _SPECIAL_NAMES) or _SPECIAL_NAMES.intersection(
            parameters
        )
        if (
            special
            or node.name not in expressions.analysis.macros
            or not all(isinstance(default, nodes.Const) for default in node.defaults)
        ):
            return None
        expressions.macros[ref] = Macro(expressions.variable(ref), parameters)
        return expressions.macros[ref]

    def _macro(self, node: nodes.Macro) -> None:
        expressions = self.expressions
        outer = expressions.symbols
        macro = self._declare_macro(node)
        if macro is None:
            # Calls of this macro are left to Jinja; any other use of its name must be, too.
            if node.name not in expressions.analysis.macros:
                self.only_jinja(node, f"the macro {node.name}")
            return
        inner = _analyze_block(node, outer)
        saved = (self.out, self.allows_marks, self.num_open_loops, expressions.fields)
        expressions.symbols, expressions.fields = inner, {}
        # A macro may be called in a loop, or call itself.
        self.out, self.allows_marks, self.num_open_loops = expressions.new_name("b"), False, 1
        variables = [expressions.variable(inner.refs[parameter]) for parameter in macro.parameters]
        parameters = ", ".join(f"{variable}=MISSING" for variable in variables)
        self.line(f"def {macro.function}({parameters}):")
        self.indent += 1
        self.line(f"{self.out} = []")
        self.enter_scope(inner)
        # The defaults belong to the last parameters.
        defaults = [Code("U")] * (len(variables) - len(node.defaults)) + [
            expressions.expression(default) for default in node.defaults
        ]
        for variable, default in zip(variables, defaults, strict=True):
            self.line(f"if {variable} is MISSING: {variable} = {default.source}")
        self.body(node.body)
        self.line(f"return join({self.out})")
        self.indent -= 1
        expressions.symbols = outer
        self.out, self.allows_marks, self.num_open_loops, expressions.fields = saved

    def _call_block(self, node: nodes.CallBlock) -> None:
        if not is_generation(node):
            self.only_jinja(node, "this call block")
            return
        if not self.allows_marks or find_undeclared(node.body, _SPECIAL_NAMES):
            self.only_jinja(node, "a generation block inside another block")
            return
        outer = self.expressions.symbols
        inner = _analyze_block(node, outer)
        self.expressions.symbols, self.allows_marks = inner, False
        self.enter_scope(inner)
        self.line("marks += (len(out), k)")
        self.body(node.body)
        self.line("marks += (len(out), k)")
        self.expressions.symbols, self.allows_marks = outer, True

    def _turn_report(self, node: nodes.ExprStmt) -> None:
        turn = turn_of(node)
        if turn is None:
            self.only_jinja(node, "this statement")
            return
        depth, item = turn
        source = "None" if item is None else self.expressions.expression(item).source
        self.line(f"turns += (len(out), k, {depth}, {source})")


def _analyze_block(node: nodes.Macro | nodes.CallBlock, outer: Symbols) -> Symbols:
    inner = Symbols(parent=outer)
    # Jinja's compiler analyzes the body twice, which affects the scopes.
    inner.analyze_node(node)
    inner.analyze_node(node)
    return inner


_TRANSLATIONS: dict[type, Callable[[StatementTranslator, Any], None]] = {
    nodes.If: StatementTranslator._if,
    nodes.Break: StatementTranslator._loop_control,
    nodes.Continue: StatementTranslator._loop_control,
    nodes.Assign: StatementTranslator._assign,
    nodes.AssignBlock: StatementTranslator._assign_block,
    nodes.For: StatementTranslator._for,
    nodes.Macro: StatementTranslator._macro,
    nodes.CallBlock: StatementTranslator._call_block,
    nodes.ExprStmt: StatementTranslator._turn_report,
}

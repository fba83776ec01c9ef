"""A chat template as one Python function that appends literal pieces and contents to a list: exact,
or it hands over to Jinja.

The template's own syntax tree is translated statement by statement into Python, with Jinja's own
analysis of scopes (which name means which variable where). The result does what Jinja's code does,
less what Jinja does for the general case: lookups through the sandbox, a context, loop objects,
generators. It is compiled once a template, whatever the shapes of the conversations. It is safe for
templates of strangers: only names made here, constants through `repr`, and operations from fixed
lists get into it.

Where a conversation reaches something outside the translated part, or anything at all is raised,
Jinja renders that conversation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.compiler import find_undeclared
from jinja2.idtracking import VAR_LOAD_ALIAS, VAR_LOAD_RESOLVE, VAR_LOAD_UNDEFINED, Symbols

from sftprep.chat_template.compiler import runtime
from sftprep.chat_template.compiler.analysis import facts_of, stores_name, uses_of_fields
from sftprep.chat_template.compiler.expressions import Expressions, anchor_count
from sftprep.chat_template.compiler.fragments import Code, Loop, Macro, joined
from sftprep.chat_template.reference.sandbox import ChatEnvironment, is_generation
from sftprep.chat_template.reference.turn_tracking import turn_of
from sftprep.core.types import Message


class Pieces(NamedTuple):
    """A conversation as a compiled template writes it.

    text: all pieces joined; pieces: constants and contents, in order; anchors: how many anchors the
    template itself wrote; marks: where `{% generation %}` blocks start and end, in turn, two
    entries for each, a position; turns: where its loops are at which item (turn_tracking.py), four
    entries for each, a position, the depth of the loop and the item; messages: as the template saw
    them. A position is a number of pieces, followed by the number of anchors before it.
    """

    text: str
    pieces: list[str]
    anchors: int
    marks: list[int]
    turns: list[Any]
    messages: list[Message]


Render = Callable[[list[dict[str, Any]], Any, bool, Mapping[str, Any]], Pieces]
"""Arguments: messages, tools, add_generation_prompt, the other variables."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """render: the function; source: its Python source; constructs: what it leaves to Jinja, with
    lines of the template."""

    render: Render
    source: str
    constructs: tuple[str, ...]


def compile_pieces(
    tree: nodes.Template,
    template: jinja2.Template,
    environment: ChatEnvironment,
    *,
    anchors: Callable[[str], int] = lambda _: 0,
    special: Iterable[str] = (),
) -> Compiled:
    """Translate a chat template.

    anchors: counts the anchors in a text; special: names of the variables that hold a special
    token.

    The function raises JinjaFallback, or anything else, for a conversation that Jinja is to render
    instead. Raises SyntaxError, RecursionError or MemoryError where Python cannot take the
    translation, which is nested too deeply.
    """
    facts = facts_of(tree)
    names_of_special = frozenset(special) - facts.assigned
    carrying = _carrying(tree, facts.assigned, names_of_special, anchors)
    write = Expressions(facts, environment, special=names_of_special, carrying=carrying)
    writer = _Statements(write, anchors)
    source = writer.function(tree)
    names: dict[str, object] = {
        "U": runtime.UNDEFINED,
        "MISSING": runtime.MISSING,
        "CONTEXT": template.new_context(),
        "hand_over": runtime.hand_over,
        "attr": runtime.attr,
        "attr_of_mapping": runtime.attr_of_mapping,
        "item": runtime.item,
        "exact": runtime.exact,
        "trim": runtime.trim,
        "text": str,
        "join": "".join,
        "is_filled": runtime.is_filled,
        "size": runtime.size,
        "Pieces": Pieces,
        "new": tuple.__new__,
        "anchors_in": lambda value: anchors(value) if type(value) is str else 0,
        **writer.write.bound,
    }
    with warnings.catch_warnings():
        # Odd templates make odd Python, such as an index into a constant: it raises when it is
        # reached, as it should.
        warnings.simplefilter("ignore", SyntaxWarning)
        code = compile(source, "<chat template>", "exec")
    return Compiled(
        render=_function(code, names),
        source=source,
        constructs=tuple(dict.fromkeys(writer.write.constructs)),
    )


def _function(code: CodeType, names: dict[str, object]) -> Any:
    exec(code, names)
    return names["render"]


def _carrying(
    tree: nodes.Template,
    assigned: frozenset[str],
    special: frozenset[str],
    anchors: Callable[[str], int],
) -> frozenset[str]:
    """Names of variables that may get a value in which the template writes an anchor."""
    values = [
        (assign.target.name, assign.node)
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and assign.target.name in assigned
    ]
    found: set[str] = set()
    for _ in values:  # each turn finds one more, or is the last
        new = {
            name
            for name, value in values
            if any(
                (
                    (isinstance(part, nodes.Const) and isinstance(part.value, str))
                    and anchors(part.value)
                )
                or (isinstance(part, nodes.Name) and part.name in special | found)
                for part in [value, *value.find_all((nodes.Const, nodes.Name))]
            )
        }
        if new <= found:
            break
        found |= new
    return frozenset(found)


class _Statements:
    """Writes statements, one Python line at a time, into `lines`."""

    def __init__(self, write: Expressions, anchors: Callable[[str], int]) -> None:
        self.write = write
        self.anchors = anchors
        self.lines: list[str] = []
        self.indent = 0
        self.out = "out"
        self.loops_open = 0
        self.marking = True
        """Whether a generation block may stand here: not inside another, a macro, or a block that
        is assigned."""

    def function(self, tree: nodes.Template) -> str:
        """The source of `render`."""
        self.write.symbols.analyze_node(tree)
        # Macros may call those that stand further down.
        for node in tree.body:
            if isinstance(node, nodes.Macro):
                self._declare(node)
        self.indent = 1
        self._enter(self.write.symbols)
        self._body(tree.body)
        head = ["def render(messages, tools, add_generation_prompt, given):"]
        head += [
            f"    {variable} = given.get({name!r}, U)"
            for name, variable in self.write.inputs.items()
        ]
        head += [
            f"    {anchor_count(self.write.inputs[name])} = anchors_in({self.write.inputs[name]})"
            for name in self.write.inputs
            if name in self.write.special
        ]
        head += [
            "    out = []",
            "    k = 0",
            "    marks = []",
            "    turns = []",
            "    most = 64 + 16 * len(messages)",
        ]
        tail = [
            "    if len(out) > most and size(out) > 1 << 20: hand_over('a long output')",
            # As `Pieces(...)`, in half of the time.
            "    return new(Pieces, (join(out), out, k, marks, turns, messages))",
        ]
        return "\n".join([*head, *self.lines, *tail, ""])

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def _only_jinja(self, node: nodes.Node, what: str) -> None:
        self._line(self.write.only_jinja(node, what).source)

    def _enter(self, symbols: Symbols) -> None:
        """Set the variables of a scope as they are at its start."""
        names = {ref: name for name, ref in symbols.refs.items()}
        undefined = []
        for ref, (action, origin) in symbols.loads.items():
            name = names[ref]
            if action == VAR_LOAD_UNDEFINED:
                undefined.append(self.write.variable(ref))
            elif action == VAR_LOAD_RESOLVE and name in symbols.stores:
                self._assign_input(symbols, self.write.variable(ref), name)
            elif action == VAR_LOAD_ALIAS:
                outer, self.write.symbols = self.write.symbols, symbols.parent or symbols
                if self.write.is_input(name):
                    self._assign_input(symbols, self.write.variable(ref), name)
                else:
                    variable, source = self.write.variable(ref), self.write.variable(origin)
                    self._line(f"{variable} = {source}")
                    if name in self.write.carrying:
                        self._line(f"{anchor_count(variable)} = {anchor_count(source)}")
                self.write.symbols = outer
        if undefined:
            self._line(f"{' = '.join(undefined)} = U")
            counts = [
                anchor_count(self.write.variable(ref))
                for ref, (action, _) in symbols.loads.items()
                if action == VAR_LOAD_UNDEFINED and names[ref] in self.write.carrying
            ]
            if counts:
                self._line(f"{' = '.join(counts)} = 0")

    def _assign_input(self, symbols: Symbols, variable: str, name: str) -> None:
        """Start a variable of the template with the value of the same name from outside."""
        if name in self.write.environment.globals:
            self._line(f"hand_over({f'{name} is assigned to'!r})")
            return
        given = self.write.input(name).source
        self._line(f"{variable} = {given}")
        if name in self.write.carrying:
            self._line(f"{anchor_count(variable)} = 0")
        if name in self.write.facts.namespaces:
            # What is written to a namespace must not land in a value of the user.
            self._line(f"if {given} is not U: hand_over({f'{name} is given from outside'!r})")

    def _body(self, statements: Iterable[nodes.Node]) -> None:
        pieces: list[Code] = []
        start = len(self.lines)
        for node in statements:
            if isinstance(node, nodes.Output):
                pieces += [piece for part in node.nodes for piece in self.write.pieces(part)]
                continue
            self._flush(pieces)
            self._statement(node)
        self._flush(pieces)
        if len(self.lines) == start:
            self._line("pass")

    def _flush(self, pieces: list[Code]) -> None:
        """Write what was collected to the output, in one operation."""
        parts = joined(pieces)
        sources = [piece.source for piece in parts]
        pieces.clear()
        # What macros and assigned blocks write is not counted: a text that contains more anchors
        # than were counted takes the reference path.
        count = self._count(parts) if self.out == "out" else ""
        if len(sources) == 1:
            self._line(f"{self.out}.append({sources[0]})")
        elif sources:
            self._line(f"{self.out} += ({', '.join(sources)})")
        if count:
            self._line(f"k += {count}")

    def _count(self, parts: Iterable[Code]) -> str:
        """Source of the number of anchors that these parts write; empty for none."""
        known = sum(self.anchors(part.literal) for part in parts if part.literal is not None)
        counts = [str(known)] if known else []
        return " + ".join([*counts, *(part.anchors for part in parts if part.anchors)])

    def _statement(self, node: nodes.Node) -> None:
        write = _WRITERS.get(type(node))
        if write is None:
            self._only_jinja(node, type(node).__name__.lower())
        else:
            write(self, node)

    def _if(self, node: nodes.If) -> None:
        self._branch("if", node)
        for other in node.elif_:
            self._branch("elif", other)
        if node.else_:
            self._line("else:")
            self._indented(node.else_)

    def _branch(self, word: str, node: nodes.If) -> None:
        self._line(f"{word} {self.write.expression(node.test).source}:")
        self._indented(node.body)

    def _indented(self, statements: Iterable[nodes.Node]) -> None:
        self.indent += 1
        self._body(statements)
        self.indent -= 1

    def _assign(self, node: nodes.Assign) -> None:
        target, value = node.target, node.node
        if isinstance(target, nodes.Name) and target.name in self.write.facts.namespaces:
            assert isinstance(value, nodes.Call)
            if not self.write.is_namespace(value):
                self._only_jinja(node, "another namespace function")
                return
            self._line(
                f"{self.write.variable(self.write.symbols.ref(target.name))} ="
                f" {self.write.namespace(value).source}"
            )
            return
        written = self._target(target)
        if written is None:
            self._only_jinja(node, "this assignment")
        else:
            self._line(f"{written} = {self.write.expression(value).source}")
            if isinstance(target, nodes.Name) and target.name in self.write.carrying:
                count = self._count(joined(self.write.pieces(value))) or "0"
                self._line(f"{anchor_count(written)} = {count}")

    def _target(self, target: nodes.Node) -> str | None:
        """What stands on the left of an assignment; None where only Jinja can assign to it."""
        if isinstance(target, nodes.Name):
            taken = target.name in self.write.facts.namespaces or target.name == "loop"
            return None if taken else self.write.variable(self.write.symbols.ref(target.name))
        if isinstance(target, nodes.NSRef):
            if (
                target.name not in self.write.facts.namespaces
                or target.attr.startswith("_")
                or self.write.is_input(target.name)
            ):
                return None
            return f"{self.write.variable(self.write.symbols.ref(target.name))}[{target.attr!r}]"
        if isinstance(target, nodes.Tuple):
            parts = [self._target(part) for part in target.items]
            return None if None in parts else f"({''.join(f'{part}, ' for part in parts)})"
        return None

    def _assign_block(self, node: nodes.AssignBlock) -> None:
        written = self._target(node.target)
        if written is None or node.filter is not None:
            self._only_jinja(node, "this block assignment")
            return
        outer, out, marking = self.write.symbols, self.out, self.marking
        self.write.symbols = Symbols(parent=outer)
        self.write.symbols.analyze_node(node)
        self.out, self.marking = self.write.fresh("b"), False
        self._enter(self.write.symbols)
        self._line(f"{self.out} = []")
        self._body(node.body)
        self._line(f"{written} = join({self.out})")
        self.write.symbols, self.out, self.marking = outer, out, marking

    def _for(self, node: nodes.For) -> None:
        if node.recursive or node.else_ or isinstance(node.target, nodes.NSRef):
            self._only_jinja(node, "a recursive loop" if node.recursive else "this kind of loop")
            return
        outer = self.write.symbols
        sequence = self.write.expression(node.iter).source
        inner = Symbols(parent=outer)
        extended = "loop" in find_undeclared(node.iter_child_nodes(only=("body",)), ("loop",))
        loop_ref = inner.declare_parameter("loop") if extended else ""
        inner.analyze_node(node, for_branch="body")
        if node.test is not None:
            sequence = self._filtered(node, sequence)
        self.write.symbols = inner
        target = self._target(node.target)
        if target is None:
            self._only_jinja(node, "this loop target")
            self.write.symbols = outer
            return
        outer_loop = self.write.loops.get(loop_ref)
        if extended:
            loop = Loop(self.write.fresh("s"), self.write.fresh("i"), self.write.fresh("last"))
            self.write.loops[loop_ref] = loop
            self._line(f"{loop.sequence} = {sequence}")
            self._line(
                f"if type({loop.sequence}) is not list: {loop.sequence} = list({loop.sequence})"
            )
            self._line(f"{loop.last} = len({loop.sequence}) - 1")
            self._line(f"for {loop.index}, {target} in enumerate({loop.sequence}):")
        else:
            self._line(f"for {target} in {sequence}:")
        self.indent += 1
        self._loop_body(node, inner, target)
        self.indent -= 1
        self.write.symbols = outer
        if outer_loop is not None:
            self.write.loops[loop_ref] = outer_loop
        else:
            self.write.loops.pop(loop_ref, None)

    def _filtered(self, node: nodes.For, sequence: str) -> str:
        """Write the loop that picks the items for which the `if` of a `for` holds."""
        outer = self.write.symbols
        self.write.symbols = Symbols(parent=outer)
        self.write.symbols.analyze_node(node, for_branch="test")
        picked = self.write.fresh("s")
        target = self._target(node.target)
        self._line(f"{picked} = []")
        if target is None or not isinstance(node.target, nodes.Name):
            self._only_jinja(node, "this loop target")
        else:
            self._line(f"for {target} in {sequence}:")
            self.indent += 1
            self._enter(self.write.symbols)
            self._line(f"if {self.write.expression(node.test).source}: {picked}.append({target})")
            self.indent -= 1
        self.write.symbols = outer
        return picked

    def _loop_body(self, node: nodes.For, inner: Symbols, target: str) -> None:
        """Write one turn of a loop. A loop variable with fields is taken for a dictionary; fields
        used often, in many a branch, are fetched once (of messages, role and content; most others
        stand in a branch that few turns take)."""
        name = node.target.name if isinstance(node.target, nodes.Name) else ""
        uses = uses_of_fields(node.body, name) if name else {}
        plain = [
            key for key in uses if not key.startswith("_") and key not in runtime.NAMES_OF_MAPPINGS
        ]
        is_object = any(key not in runtime.NAMES_OF_VALUES for key in plain)
        ref = inner.refs[name] if is_object and not stores_name(node.body, name) else ""
        before = self.write.fields.get(ref)
        if self.loops_open:
            # Loops in loops are where a hostile template would write without end.
            self._line(f"if len({self.out}) > 1_000_000: hand_over('a long output')")
        if ref:
            self._line(
                f"if type({target}) is not dict: hand_over('a loop over something else than"
                " objects')"
            )
            fetched = {key: self.write.fresh("f") for key in plain if uses[key] > 3}
            for key, variable in fetched.items():
                self._line(f"{variable} = {target}.get({key!r}, U)")
            self.write.fields[ref] = fetched
        self._enter(inner)
        self.loops_open += 1
        self._body(node.body)
        self.loops_open -= 1
        if ref:
            del self.write.fields[ref]
            if before is not None:
                self.write.fields[ref] = before

    def _declare(self, node: nodes.Macro) -> Macro | None:
        """Make a macro known to the calls that follow; None where only Jinja can run it."""
        ref = self.write.symbols.ref(node.name)
        parameters = [argument.name for argument in node.args]
        special = find_undeclared(node.body, _SPECIAL) or _SPECIAL.intersection(parameters)
        if (
            special
            or node.name not in self.write.facts.macros
            or not all(isinstance(d, nodes.Const) for d in node.defaults)
        ):
            return None
        self.write.macros[ref] = Macro(self.write.variable(ref), parameters)
        return self.write.macros[ref]

    def _macro(self, node: nodes.Macro) -> None:
        outer = self.write.symbols
        macro = self._declare(node)
        if macro is None:
            # Calls of it are given to Jinja; another use of the name must be, too.
            if node.name not in self.write.facts.macros:
                self._only_jinja(node, f"the macro {node.name}")
            return
        inner = Symbols(parent=outer)
        # Twice, as Jinja does.
        inner.analyze_node(node)
        inner.analyze_node(node)
        saved = (self.out, self.marking, self.loops_open, self.write.fields)
        self.write.symbols, self.out, self.marking, self.loops_open, self.write.fields = (
            inner,
            self.write.fresh("b"),
            False,
            1,
            {},
        )
        variables = [self.write.variable(inner.refs[parameter]) for parameter in macro.parameters]
        self._line(
            f"def {macro.function}({', '.join(f'{variable}=MISSING' for variable in variables)}):"
        )
        self.indent += 1
        self._line(f"{self.out} = []")
        self._enter(inner)
        defaults = [Code("U")] * (len(variables) - len(node.defaults)) + [
            self.write.expression(d) for d in node.defaults
        ]
        for variable, default in zip(variables, defaults, strict=True):
            self._line(f"if {variable} is MISSING: {variable} = {default.source}")
        self._body(node.body)
        self._line(f"return join({self.out})")
        self.indent -= 1
        self.write.symbols = outer
        self.out, self.marking, self.loops_open, self.write.fields = saved

    def _call_block(self, node: nodes.CallBlock) -> None:
        if not is_generation(node) or not self.marking or find_undeclared(node.body, _SPECIAL):
            self._only_jinja(
                node,
                (
                    "this call block"
                    if not is_generation(node)
                    else "a generation block inside another block"
                ),
            )
            return
        outer = self.write.symbols
        inner = Symbols(parent=outer)
        # Twice, as Jinja does.
        inner.analyze_node(node)
        inner.analyze_node(node)
        self.write.symbols, self.marking = inner, False
        self._enter(inner)
        self._line("marks += (len(out), k)")
        self._body(node.body)
        self._line("marks += (len(out), k)")
        self.write.symbols, self.marking = outer, True

    def _turn(self, node: nodes.ExprStmt) -> None:
        turn = turn_of(node)
        if turn is None:
            self._only_jinja(node, "this statement")
            return
        depth, item = turn
        source = "None" if item is None else self.write.expression(item).source
        self._line(f"turns += (len(out), k, {depth}, {source})")

    def _word(self, node: nodes.Node) -> None:
        self._line(type(node).__name__.lower())


_SPECIAL = frozenset({"caller", "kwargs", "varargs"})
_WRITERS: dict[type, Callable[[_Statements, Any], None]] = {
    nodes.If: _Statements._if,
    nodes.Assign: _Statements._assign,
    nodes.AssignBlock: _Statements._assign_block,
    nodes.For: _Statements._for,
    nodes.Macro: _Statements._macro,
    nodes.CallBlock: _Statements._call_block,
    nodes.ExprStmt: _Statements._turn,
    nodes.Break: _Statements._word,
    nodes.Continue: _Statements._word,
}

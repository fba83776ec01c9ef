"""The source of a compiled template under construction.

It consists of lines, scopes and output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from jinja2 import nodes
from jinja2.idtracking import VAR_LOAD_ALIAS, VAR_LOAD_RESOLVE, VAR_LOAD_UNDEFINED, Symbols

from sftprep.chat_template.compiler.context import anchor_count
from sftprep.chat_template.compiler.expressions import ExpressionTranslator
from sftprep.chat_template.compiler.fragments import Code, merge_literals


class SourceWriter(ABC):
    """The collector of the lines of a function.

    Args:
        expressions: The translator of expressions, whose scope this writer sets.
        count_anchors: Returns the number of anchors in a string.
    """

    def __init__(
        self, expressions: ExpressionTranslator, count_anchors: Callable[[str], int]
    ) -> None:
        self.expressions = expressions
        self.count_anchors = count_anchors
        self.lines: list[str] = []
        self.indent = 0
        self.out = "out"  # the variable of the list that output is appended to
        self.num_open_loops = 0
        # Whether a generation block is allowed: not inside another one, a macro, or a block that is
        # assigned.
        self.allows_marks = True

    @abstractmethod
    def statement(self, node: nodes.Node) -> None:
        """Write one statement."""

    def line(self, text: str) -> None:
        """Write one line."""
        self.lines.append("    " * self.indent + text)

    def only_jinja(self, node: nodes.Node, what: str) -> None:
        """Write a statement to fall back to Jinja for the whole conversation."""
        self.line(self.expressions.only_jinja(node, what).source)

    def enter_scope(self, symbols: Symbols) -> None:
        """Write the initial assignments to the variables of a scope."""
        expressions = self.expressions
        names = {ref: name for name, ref in symbols.refs.items()}
        undefined = []
        for ref, (action, origin) in symbols.loads.items():
            name = names[ref]
            if action == VAR_LOAD_UNDEFINED:
                undefined.append(expressions.variable(ref))
            elif action == VAR_LOAD_RESOLVE and name in symbols.stores:
                self._assign_input(expressions.variable(ref), name)
            elif action == VAR_LOAD_ALIAS:
                # The value comes from the outer scope, in which the name must be looked up.
                outer, expressions.symbols = expressions.symbols, symbols.parent or symbols
                if expressions.is_input(name):
                    self._assign_input(expressions.variable(ref), name)
                else:
                    variable, source = expressions.variable(ref), expressions.variable(origin)
                    self.line(f"{variable} = {source}")
                    if name in expressions.with_anchors:
                        self.line(f"{anchor_count(variable)} = {anchor_count(source)}")
                expressions.symbols = outer
        if undefined:
            self.line(f"{' = '.join(undefined)} = U")
            counts = [
                anchor_count(expressions.variable(ref))
                for ref, (action, _) in symbols.loads.items()
                if action == VAR_LOAD_UNDEFINED and names[ref] in expressions.with_anchors
            ]
            if counts:
                self.line(f"{' = '.join(counts)} = 0")

    def _assign_input(self, variable: str, name: str) -> None:
        """Initialize a variable of the template from the caller's one of the same name."""
        if name in self.expressions.environment.globals:
            self.line(f"fall_back({f'{name} is assigned to'!r})")
            return
        value = self.expressions.input(name).source
        self.line(f"{variable} = {value}")
        if name in self.expressions.with_anchors:
            self.line(f"{anchor_count(variable)} = 0")
        if name in self.expressions.analysis.namespaces:
            # An assignment to an attribute of the namespace must not modify a value of the user.
            self.line(f"if {value} is not U: fall_back({f'{name} is given from outside'!r})")

    def body(self, statements: Iterable[nodes.Node]) -> None:
        """Write statements, with adjacent outputs as one operation."""
        pieces: list[Code] = []
        start = len(self.lines)
        for node in statements:
            if isinstance(node, nodes.Output):
                pieces += [piece for part in node.nodes for piece in self.expressions.pieces(part)]
                continue
            self._flush(pieces)
            self.statement(node)
        self._flush(pieces)
        if len(self.lines) == start:
            self.line("pass")

    def indented_body(self, statements: Iterable[nodes.Node]) -> None:
        """Write the body of a compound statement."""
        self.indent += 1
        self.body(statements)
        self.indent -= 1

    def _flush(self, pieces: list[Code]) -> None:
        """Write the collected pieces to the output, in one operation."""
        parts = merge_literals(pieces)
        sources = [piece.source for piece in parts]
        pieces.clear()
        # The output of macros and assigned blocks is not counted: a text that contains more anchors
        # than were counted takes the reference path.
        count = self.anchors_in(parts) if self.out == "out" else ""
        if len(sources) == 1:
            self.line(f"{self.out}.append({sources[0]})")
        elif sources:
            self.line(f"{self.out} += ({', '.join(sources)})")
        if count:
            self.line(f"k += {count}")

    def anchors_in(self, parts: Iterable[Code]) -> str:
        """Return the source of the number of anchors in these parts; empty: none."""
        num_known = sum(
            self.count_anchors(part.literal) for part in parts if part.literal is not None
        )
        counts = [str(num_known)] if num_known else []
        return " + ".join([*counts, *(part.anchors for part in parts if part.anchors)])

    def assignment_target(self, target: nodes.Node) -> str | None:
        """Return the left side of an assignment, None if only Jinja can assign to it."""
        expressions = self.expressions
        namespaces = expressions.analysis.namespaces
        if isinstance(target, nodes.Name):
            if target.name in namespaces or target.name == "loop":
                return None
            return expressions.variable(expressions.symbols.ref(target.name))
        if isinstance(target, nodes.NSRef):
            if (
                target.name not in namespaces
                or target.attr.startswith("_")
                or expressions.is_input(target.name)
            ):
                return None
            variable = expressions.variable(expressions.symbols.ref(target.name))
            return f"{variable}[{target.attr!r}]"
        if isinstance(target, nodes.Tuple):
            parts = [self.assignment_target(part) for part in target.items]
            return None if None in parts else f"({''.join(f'{part}, ' for part in parts)})"
        return None

"""Translation of Jinja expressions to Python source with the same value.

The translation covers the part of Jinja that chat templates use. Everything else becomes a call of
`fall_back`, which raises if, and only if, it is evaluated. `compilation.py` binds the names that
the source uses: U (undefined), the functions of `runtime.py`, filters and tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jinja2 import nodes

from sftprep.chat_template.compiler.allowlist import COMPARISONS, LOOP, operand_of_filled_check
from sftprep.chat_template.compiler.analysis import operand_of_text_filter
from sftprep.chat_template.compiler.calls import CallTranslator
from sftprep.chat_template.compiler.context import anchor_count
from sftprep.chat_template.compiler.fragments import (
    Code,
    Kind,
    merge_literals,
    summands,
    to_literal,
    to_text,
)
from sftprep.chat_template.compiler.runtime import NAMES_OF_MAPPINGS, NAMES_OF_VALUES

_SPECIAL_NAMES = frozenset({"self", "super", "caller", "varargs", "kwargs", "loop"})


class ExpressionTranslator(CallTranslator):
    """The translator of expressions."""

    def expression(self, node: nodes.Node | None) -> Code:
        """Return the source of an expression."""
        translate = _TRANSLATIONS.get(type(node))
        if node is None or translate is None:
            return self.only_jinja(node or nodes.Const(None), type(node).__name__.lower())
        return translate(self, node)

    def pieces(self, node: nodes.Node) -> list[Code]:
        """Return the value of an expression as text, in pieces to be joined.

        A piece that turns out not to be a string makes the join fail.
        """
        if isinstance(node, nodes.TemplateData):
            return [to_literal(node.data)]
        if isinstance(node, nodes.Concat):
            return [piece for part in node.nodes for piece in self.pieces(part)]
        operand = operand_of_text_filter(node)
        if operand is not None:
            return self.pieces(operand)
        if isinstance(node, nodes.Add):
            codes = [self.expression(part) for part in summands(node)]
            # A sum that contains a plain string consists of strings, or it raises an error. So its
            # parts can be joined instead of added.
            if any(code.kind == "text" for code in codes):
                return [self._summand(code) for code in codes]
        return [to_text(self.expression(node))]

    def _summand(self, code: Code) -> Code:
        if not self.analysis.has_markup or code.kind == "text":
            return code
        return Code(f"exact({code.source})", anchors=code.anchors)

    # --- values -----------------------------------------------------------------------------------

    def _const(self, node: nodes.Const) -> Code:
        value = node.value
        if isinstance(value, str):
            return to_literal(value)
        if isinstance(value, float) and not math.isfinite(value):
            return self.only_jinja(node, "a number without end")
        return Code(repr(value), "int" if type(value) is int else "value")

    def _template_data(self, node: nodes.TemplateData) -> Code:
        return to_literal(node.data)

    def _name(self, node: nodes.Name) -> Code:
        name = node.name
        if (
            name in _SPECIAL_NAMES
            or name in self.analysis.namespaces
            or name in self.analysis.macros
        ):
            return self.only_jinja(node, f"{name} as a value")
        if self.is_input(name):
            return (
                self.only_jinja(node, f"{name} as a value")
                if name in self.environment.globals
                else self.input(name)
            )
        variable = self.variable(self.symbols.ref(name))
        anchors = anchor_count(variable) if name in self.with_anchors else ""
        return Code(variable, atom=True, anchors=anchors)

    def _list(self, node: nodes.List) -> Code:
        return Code(f"[{', '.join(self.expression(part).source for part in node.items)}]")

    def _tuple(self, node: nodes.Tuple) -> Code:
        return Code(f"({''.join(self.expression(part).source + ', ' for part in node.items)})")

    def _dict(self, node: nodes.Dict) -> Code:
        pairs = [
            f"{self.expression(pair.key).source}: {self.expression(pair.value).source}"
            for pair in node.items
        ]
        return Code(f"{{{', '.join(pairs)}}}")

    # --- attributes and items ---------------------------------------------------------------------

    def _getattr(self, node: nodes.Getattr) -> Code:
        owner = node.node
        if isinstance(owner, nodes.Name):
            if owner.name == "loop":
                return self._loop_attribute(node, owner)
            if (
                owner.name in self.analysis.namespaces
                and not self.is_input(owner.name)
                and not node.attr.startswith("_")
            ):
                variable = self.variable(self.symbols.ref(owner.name))
                exists = node.attr in self.analysis.namespaces[owner.name]
                return Code(
                    f"{variable}[{node.attr!r}]" if exists else f"{variable}.get({node.attr!r}, U)"
                )
        if node.attr in NAMES_OF_MAPPINGS:
            return self.only_jinja(node, f".{node.attr} as a value")
        return self._field(node, owner, node.attr)

    def _getitem(self, node: nodes.Getitem) -> Code:
        if isinstance(node.arg, nodes.Slice):
            value = self.expression(node.node)
            bounds = [node.arg.start, node.arg.stop, node.arg.step]
            slice_source = ":".join(
                "" if bound is None else self.expression(bound).source for bound in bounds
            )
            kind: Kind = "text" if value.kind == "text" else "value"
            return Code(f"{value.source}[{slice_source}]", kind)
        constant = node.arg.value if isinstance(node.arg, nodes.Const) else None
        if isinstance(constant, str) and constant not in NAMES_OF_MAPPINGS:
            return self._field(node, node.node, constant)
        value, key = self.expression(node.node), self.expression(node.arg)
        if type(constant) is int or isinstance(node.arg, nodes.Neg):
            if value.kind == "texts" and key.source in {"0", "(-1)"}:
                return Code(f"{value.source}[{key.source}]", "text")
            if value.atom and key.source in {"0", "(-1)"}:
                # The first or last item of a list is by far the most frequent case.
                v = value.source
                return Code(
                    f"({v}[{key.source}] if type({v}) is list and {v} else item({v}, {key.source}))"
                )
        return Code(f"item({value.source}, {key.source})")

    def _field(self, node: nodes.Node, owner: nodes.Node, key: str) -> Code:
        """Translate `owner.key` or `owner["key"]`.

        The key is not a method of dictionaries.
        """
        if key.startswith("_"):
            return self.only_jinja(node, f"the name {key!r}")
        if isinstance(owner, nodes.Name):
            fields = self.fields.get(self.symbols.find_ref(owner.name) or "")
            if fields is not None:
                if key in fields:
                    return Code(fields[key], atom=True)
                return Code(f"{self.expression(owner).source}.get({key!r}, U)")
        value = self.expression(owner)
        helper = "attr_of_mapping" if key in NAMES_OF_VALUES else "attr"
        general = f"{helper}({value.source}, {key!r})"
        if value.atom:
            return Code(
                f"({value.source}.get({key!r}, U) if type({value.source}) is dict else {general})"
            )
        return Code(general)

    def _loop_attribute(self, node: nodes.Getattr, owner: nodes.Name) -> Code:
        loop = self.loops.get(self.symbols.find_ref(owner.name) or "")
        if loop is None or node.attr not in LOOP:
            return self.only_jinja(node, f"loop.{node.attr}")
        kind, source = LOOP[node.attr]
        return Code(source.format(s=loop.sequence, i=loop.index, last=loop.last), kind)

    # --- operators --------------------------------------------------------------------------------

    def _compare(self, node: nodes.Compare) -> Code:
        operand = operand_of_filled_check(node)
        if operand is not None:
            return Code(f"is_filled({self.expression(operand).source})")
        parts = [self.expression(node.expr).source]
        parts += [
            f"{COMPARISONS[operation.op]} {self.expression(operation.expr).source}"
            for operation in node.ops
        ]
        return Code(f"({' '.join(parts)})")

    def _add(self, node: nodes.Add) -> Code:
        left, right = self.expression(node.left), self.expression(node.right)
        if left.literal is not None and right.literal is not None:
            return to_literal(left.literal + right.literal)
        kinds = {left.kind, right.kind}
        kind: Kind = "value"
        if "text" in kinds and (kinds == {"text"} or not self.analysis.has_markup):
            kind = "text"
        elif kinds == {"int"}:
            kind = "int"
        anchors = " + ".join(filter(None, (left.anchors, right.anchors)))
        return Code(f"({left.source} + {right.source})", kind, anchors=anchors)

    def _arithmetic(self, node: nodes.BinExpr) -> Code:
        left, right = self.expression(node.left), self.expression(node.right)
        # Operands other than integers could repeat or format strings, which the sandbox checks.
        if isinstance(node, nodes.Mul | nodes.Mod) and {left.kind, right.kind} != {"int"}:
            return self.only_jinja(node, f"the operator {node.operator}")
        are_ints = {left.kind, right.kind} == {"int"}
        source = f"({left.source} {node.operator} {right.source})"
        return Code(source, "int" if are_ints else "value")

    def _logic(self, node: nodes.And | nodes.Or) -> Code:
        left, right = self.expression(node.left), self.expression(node.right)
        return Code(
            f"({left.source} {node.operator} {right.source})",
            left.kind if left.kind == right.kind else "value",
        )

    def _not(self, node: nodes.Not) -> Code:
        return Code(f"(not {self.expression(node.node).source})")

    def _negative(self, node: nodes.Neg) -> Code:
        value = self.expression(node.node)
        return Code(f"(-{value.source})", "int" if value.kind == "int" else "value")

    def _concat(self, node: nodes.Concat) -> Code:
        pieces = merge_literals(self.pieces(node))
        if len(pieces) == 1:
            return (
                pieces[0] if pieces[0].kind == "text" else Code(f"text({pieces[0].source})", "text")
            )
        return Code(f"join(({', '.join(piece.source for piece in pieces)}))", "text")

    def _conditional(self, node: nodes.CondExpr) -> Code:
        yes, test = self.expression(node.expr1), self.expression(node.test)
        no = Code("U") if node.expr2 is None else self.expression(node.expr2)
        return Code(
            f"({yes.source} if {test.source} else {no.source})",
            yes.kind if yes.kind == no.kind else "value",
        )


_TRANSLATIONS: dict[type, Callable[[ExpressionTranslator, Any], Code]] = {
    nodes.Const: ExpressionTranslator._const,
    nodes.TemplateData: ExpressionTranslator._template_data,
    nodes.Name: ExpressionTranslator._name,
    nodes.List: ExpressionTranslator._list,
    nodes.Tuple: ExpressionTranslator._tuple,
    nodes.Dict: ExpressionTranslator._dict,
    nodes.Getattr: ExpressionTranslator._getattr,
    nodes.Getitem: ExpressionTranslator._getitem,
    nodes.Call: ExpressionTranslator._call,
    nodes.Filter: ExpressionTranslator._filter,
    nodes.Test: ExpressionTranslator._test,
    nodes.Compare: ExpressionTranslator._compare,
    nodes.Add: ExpressionTranslator._add,
    nodes.Sub: ExpressionTranslator._arithmetic,
    nodes.Mul: ExpressionTranslator._arithmetic,
    nodes.Mod: ExpressionTranslator._arithmetic,
    nodes.And: ExpressionTranslator._logic,
    nodes.Or: ExpressionTranslator._logic,
    nodes.Not: ExpressionTranslator._not,
    nodes.Neg: ExpressionTranslator._negative,
    nodes.Concat: ExpressionTranslator._concat,
    nodes.CondExpr: ExpressionTranslator._conditional,
}

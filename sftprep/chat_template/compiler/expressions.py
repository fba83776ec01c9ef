"""Jinja expressions as Python source with the same value, for the part of Jinja that chat templates
use.

Every expression is translated; what is not in that part becomes a call of `hand_over`, which raises
when, and only when, it is reached. The names that the source uses are bound by pieces.py: U
(undefined), the functions of runtime.py, filters and tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jinja2 import nodes
from jinja2.idtracking import VAR_LOAD_RESOLVE, Symbols

from sftprep.chat_template.compiler.allowlist import (
    COMPARISONS,
    FUNCTIONS,
    LOOP,
    METHODS,
    SHORT_TESTS,
    TESTS,
    TEXT_FILTERS,
    TEXT_KEEPING_FILTERS,
    TEXT_METHODS,
    counted_to_be_some,
    is_keyword_argument,
    is_known_filter,
    is_safe_to_skip,
    is_some_text,
    passed_first,
)
from sftprep.chat_template.compiler.analysis import (
    Facts,
    has_arguments,
    namespace_keys,
    shown_filter,
)
from sftprep.chat_template.compiler.fragments import (
    Code,
    Kind,
    Loop,
    Macro,
    joined,
    literal,
    shown,
    summands,
)
from sftprep.chat_template.compiler.runtime import (
    NAMES_OF_MAPPINGS,
    NAMES_OF_VALUES,
    join_by,
    replace,
)
from sftprep.chat_template.reference.growth_limits import SHORT
from sftprep.chat_template.reference.sandbox import ChatEnvironment


@dataclass
class Expressions:
    """Writes expressions. `symbols` is the scope that names are looked up in; whoever walks the
    statements sets it."""

    facts: Facts
    environment: ChatEnvironment
    symbols: Symbols = field(default_factory=Symbols)
    loops: dict[str, Loop] = field(default_factory=dict)
    """By Jinja's reference of `loop`."""
    fields: dict[str, dict[str, str]] = field(default_factory=dict)
    """By the reference of a loop variable that is a dictionary: its fields that stand in Python
    variables."""
    macros: dict[str, Macro] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    """Variables given from outside that the template reads: name -> Python variable."""
    special: frozenset[str] = frozenset()
    """Those of them that hold a special token, which may be an anchor."""
    carrying: frozenset[str] = frozenset()
    """Names of the template's own variables whose anchors are counted with their value."""
    bound: dict[str, object] = field(default_factory=dict)
    """Functions that the source calls, by their Python names."""
    constructs: list[str] = field(default_factory=list)
    """What was met that only Jinja can do."""
    _count: int = 0
    _variables: dict[str, str] = field(default_factory=dict)

    def fresh(self, stem: str) -> str:
        """A Python name that nothing else has."""
        self._count += 1
        return f"{stem}{self._count}"

    def variable(self, ref: str) -> str:
        """The Python variable for one of Jinja's references."""
        if ref not in self._variables:
            self._variables[ref] = self.fresh("v")
        return self._variables[ref]

    def input(self, name: str) -> Code:
        """A variable given from outside; those that Jinja itself brings are functions, and no
        values here."""
        if name in _ARGUMENTS:
            return Code(name, atom=True)
        if name not in self.inputs:
            self.inputs[name] = self.fresh("n")
        variable = self.inputs[name]
        anchors = anchor_count(variable) if name in self.special else ""
        return Code(variable, atom=True, anchors=anchors)

    def only_jinja(self, node: nodes.Node, what: str) -> Code:
        """The expression that gives the conversation to Jinja when it is reached."""
        reason = f"{what} (line {node.lineno})"
        self.constructs.append(reason)
        return Code(f"hand_over({reason!r})")

    def is_input(self, name: str) -> bool:
        """Whether a name, where it now stands, always means what is given from outside."""
        scope: Symbols | None = self.symbols
        while scope is not None and name not in scope.refs:
            scope = scope.parent
        return scope is None or (
            name not in scope.stores
            and scope.loads.get(scope.refs[name]) == (VAR_LOAD_RESOLVE, name)
        )

    def pieces(self, node: nodes.Node) -> list[Code]:
        """The value as text, in parts to be joined; parts that may turn out to be no text are
        refused by the join itself."""
        if isinstance(node, nodes.TemplateData):
            return [literal(node.data)]
        if isinstance(node, nodes.Concat):
            return [piece for part in node.nodes for piece in self.pieces(part)]
        inner = shown_filter(node)
        if inner is not None:
            return self.pieces(inner)
        if isinstance(node, nodes.Add):
            leaves = summands(node)
            codes = [self.expression(leaf) for leaf in leaves]
            # A sum with one plain text in it has only texts in it, or cannot be made: so its parts
            # can be joined.
            if any(code.kind == "text" for code in codes):
                return [self._summand(code) for code in codes]
        return [shown(self.expression(node))]

    def expression(self, node: nodes.Node | None) -> Code:
        """Source with the value of a node."""
        write = _WRITERS.get(type(node))
        if node is None or write is None:
            return self.only_jinja(node or nodes.Const(None), type(node).__name__.lower())
        return write(self, node)

    def _summand(self, code: Code) -> Code:
        if not self.facts.markup or code.kind == "text":
            return code
        return Code(f"exact({code.source})", anchors=code.anchors)

    def _text_kind(self, receiver: Code) -> Kind:
        """Kind of what a method gives that gives text: Markup gives Markup."""
        return "value" if self.facts.markup and receiver.kind != "text" else "text"

    def _const(self, node: nodes.Const) -> Code:
        value = node.value
        if isinstance(value, str):
            return literal(value)
        if isinstance(value, float) and not math.isfinite(value):
            return self.only_jinja(node, "a number without end")
        return Code(repr(value), "int" if type(value) is int else "value")

    def _template_data(self, node: nodes.TemplateData) -> Code:
        return literal(node.data)

    def _name(self, node: nodes.Name) -> Code:
        name = node.name
        if name in _SPECIAL_NAMES or name in self.facts.namespaces or name in self.facts.macros:
            return self.only_jinja(node, f"{name} as a value")
        if self.is_input(name):
            return (
                self.only_jinja(node, f"{name} as a value")
                if name in self.environment.globals
                else self.input(name)
            )
        variable = self.variable(self.symbols.ref(name))
        return Code(
            variable, atom=True, anchors=anchor_count(variable) if name in self.carrying else ""
        )

    def _getattr(self, node: nodes.Getattr) -> Code:
        owner = node.node
        if isinstance(owner, nodes.Name):
            if owner.name == "loop":
                return self._of_loop(node, owner)
            if (
                owner.name in self.facts.namespaces
                and not self.is_input(owner.name)
                and not node.attr.startswith("_")
            ):
                variable = self.variable(self.symbols.ref(owner.name))
                known = node.attr in self.facts.namespaces[owner.name]
                return Code(
                    f"{variable}[{node.attr!r}]" if known else f"{variable}.get({node.attr!r}, U)"
                )
        if node.attr in NAMES_OF_MAPPINGS:
            return self.only_jinja(node, f".{node.attr} as a value")
        return self._field(node, owner, node.attr)

    def _getitem(self, node: nodes.Getitem) -> Code:
        if isinstance(node.arg, nodes.Slice):
            value = self.expression(node.node)
            parts = [node.arg.start, node.arg.stop, node.arg.step]
            written = ":".join(
                "" if part is None else self.expression(part).source for part in parts
            )
            return Code(f"{value.source}[{written}]", "text" if value.kind == "text" else "value")
        constant = node.arg.value if isinstance(node.arg, nodes.Const) else None
        if isinstance(constant, str) and constant not in NAMES_OF_MAPPINGS:
            return self._field(node, node.node, constant)
        value, key = self.expression(node.node), self.expression(node.arg)
        if type(constant) is int or isinstance(node.arg, nodes.Neg):
            if value.kind == "texts" and key.source in {"0", "(-1)"}:
                return Code(f"{value.source}[{key.source}]", "text")
            if value.atom and key.source in {"0", "(-1)"}:
                v = value.source
                return Code(
                    f"({v}[{key.source}] if type({v}) is list and {v} else item({v}, {key.source}))"
                )
        return Code(f"item({value.source}, {key.source})")

    def _field(self, node: nodes.Node, owner: nodes.Node, key: str) -> Code:
        """`owner.key` or `owner["key"]` for a key that dictionaries have no method of."""
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

    def _of_loop(self, node: nodes.Getattr, owner: nodes.Name) -> Code:
        loop = self.loops.get(self.symbols.find_ref(owner.name) or "")
        if loop is None or node.attr not in LOOP:
            return self.only_jinja(node, f"loop.{node.attr}")
        kind, source = LOOP[node.attr]
        return Code(source.format(s=loop.sequence, i=loop.index, last=loop.last), kind)

    def _call(self, node: nodes.Call) -> Code:
        plain = node.dyn_args is None and node.dyn_kwargs is None
        if plain and isinstance(node.node, nodes.Name):
            return self._call_name(node, node.node.name)
        if plain and isinstance(node.node, nodes.Getattr):
            return self._call_method(node, node.node.node, node.node.attr)
        return self.only_jinja(node, "this kind of call")

    def _call_method(self, node: nodes.Call, owner: nodes.Node, method: str) -> Code:
        value = self.expression(owner)
        # A number would need brackets, and has no such method.
        if method not in METHODS or (isinstance(owner, nodes.Const) and value.literal is None):
            return self.only_jinja(node, f"a call of .{method}")
        source = f"{value.source}.{method}({self._arguments(node)})"
        guard = _GUARDS.get(method)
        if guard is not None and not self._repeats_little(node, method, value):
            if node.kwargs:
                return self.only_jinja(node, f"a call of .{method} with names")
            self.bound[f"guarded_{method}"] = guard
            source = f"guarded_{method}({value.source}, {self._arguments(node)})"
        kind = self._text_kind(value)
        if method in TEXT_METHODS:
            return Code(source, kind)
        splits = (
            method in {"split", "rsplit"}
            and len(node.args) == 1
            and not node.kwargs
            and is_some_text(node.args[0])
        )
        return Code(source, "texts" if splits and kind == "text" else "value")

    def _repeats_little(self, node: nodes.Call, method: str, value: Code) -> bool:
        """Whether the text that `replace` or `join` writes many times is a short constant."""
        if method == "join":
            return value.literal is not None and len(value.literal) <= SHORT
        new = node.args[1] if len(node.args) > 1 else None
        return (
            isinstance(new, nodes.Const) and isinstance(new.value, str) and len(new.value) <= SHORT
        )

    def _call_name(self, node: nodes.Call, name: str) -> Code:
        outside = self.is_input(name)
        if name in self.facts.macros and not outside:
            return self._call_macro(node, name)
        if not outside or name not in FUNCTIONS:
            return self.only_jinja(node, f"a call of {name}")
        if name == "raise_exception":
            return Code("hand_over('raise_exception')")
        self.bound[f"call_{name}"] = self.environment.globals[name]
        return Code(f"call_{name}({self._arguments(node)})")

    def _call_macro(self, node: nodes.Call, name: str) -> Code:
        macro = self.macros.get(self.symbols.ref(name))
        given = [argument.key for argument in node.kwargs]
        if (
            macro is None
            or len(node.args) > len(macro.parameters)
            or any(key not in macro.parameters for key in given)
        ):
            return self.only_jinja(node, f"this call of {name}")
        arguments = [self.expression(argument).source for argument in node.args]
        # By place only: the names in the template are no names of the Python function.
        places = {
            macro.parameters.index(argument.key): self.expression(argument.value).source
            for argument in node.kwargs
        }
        if any(place < len(arguments) for place in places):
            return self.only_jinja(node, f"this call of {name}")
        for place in range(len(arguments), max(places, default=-1) + 1):
            arguments.append(places.get(place, "MISSING"))
        return Code(f"{macro.function}({', '.join(arguments)})", "text")

    def _filter(self, node: nodes.Filter) -> Code:
        if not is_known_filter(node):
            return self.only_jinja(node, f"the filter {node.name}")
        value = self.expression(node.node)
        short = self._short_filter(node, value)
        if short is not None:
            return short
        function = self.environment.filters[node.name]
        self.bound[f"filter_{node.name}"] = function
        arguments = ", ".join(
            part for part in (passed_first(function), value.source, self._arguments(node)) if part
        )
        kind: Kind = "text" if node.name in TEXT_FILTERS else "value"
        if node.name in TEXT_KEEPING_FILTERS:
            kind = self._text_kind(value)
        return Code(f"filter_{node.name}({arguments})", kind)

    def _short_filter(self, node: nodes.Filter, value: Code) -> Code | None:
        """A filter written out, where that is possible."""
        source = ""
        kind: Kind = self._text_kind(value)
        if node.name in {"default", "d"} and len(node.args) == 1 and not node.kwargs and value.atom:
            if is_safe_to_skip(node.args[0]):
                source, kind = (
                    (
                        f"({self.expression(node.args[0]).source} if {value.source} is U else"
                        f" {value.source})"
                    ),
                    "value",
                )
        elif has_arguments(node):
            return None
        elif node.name == "trim" and value.atom:
            source = (
                f"({value.source}.strip() if type({value.source}) is str else trim({value.source}))"
            )
        elif node.name == "trim":
            source = f"{value.source}.strip()" if value.kind == "text" else f"trim({value.source})"
        elif node.name in {"length", "count"}:
            source, kind = f"len({value.source})", "int"
        elif node.name == "string" and kind == "text":
            source = f"text({value.source})"
        return Code(source, kind) if source else None

    def _test(self, node: nodes.Test) -> Code:
        if node.dyn_args is not None or node.dyn_kwargs is not None or node.name not in TESTS:
            return self.only_jinja(node, f"the test {node.name}")
        if node.name in {"defined", "undefined"} and isinstance(node.node, nodes.Name):
            name = node.node.name
            if self.is_input(name) and name in self.environment.globals:
                return Code(repr(node.name == "defined"))
        value = self.expression(node.node)
        if value.literal is not None or isinstance(node.node, nodes.Const):
            return self.only_jinja(node, "a test of a constant")
        if node.name in SHORT_TESTS and not has_arguments(node):
            return Code(SHORT_TESTS[node.name].format(value.source))
        self.bound[f"test_{node.name}"] = self.environment.tests[node.name]
        arguments = self._arguments(node)
        return Code(f"test_{node.name}({value.source}{', ' + arguments if arguments else ''})")

    def _compare(self, node: nodes.Compare) -> Code:
        counted = counted_to_be_some(node)
        if counted is not None:
            return Code(f"is_filled({self.expression(counted).source})")
        parts = [self.expression(node.expr).source]
        parts += [
            f"{COMPARISONS[operand.op]} {self.expression(operand.expr).source}"
            for operand in node.ops
        ]
        return Code(f"({' '.join(parts)})")

    def _add(self, node: nodes.Add) -> Code:
        left, right = self.expression(node.left), self.expression(node.right)
        if left.literal is not None and right.literal is not None:
            return literal(left.literal + right.literal)
        kinds = {left.kind, right.kind}
        kind: Kind = "value"
        if "text" in kinds and (kinds == {"text"} or not self.facts.markup):
            kind = "text"
        elif kinds == {"int"}:
            kind = "int"
        anchors = " + ".join(filter(None, (left.anchors, right.anchors)))
        return Code(f"({left.source} + {right.source})", kind, anchors=anchors)

    def _arithmetic(self, node: nodes.BinExpr) -> Code:
        left, right = self.expression(node.left), self.expression(node.right)
        # Other operands than whole numbers could repeat or format text, which the sandbox watches.
        if isinstance(node, nodes.Mul | nodes.Mod) and {left.kind, right.kind} != {"int"}:
            return self.only_jinja(node, f"the operator {node.operator}")
        both = {left.kind, right.kind} == {"int"}
        return Code(f"({left.source} {node.operator} {right.source})", "int" if both else "value")

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
        pieces = joined(self.pieces(node))
        if len(pieces) == 1:
            return (
                pieces[0] if pieces[0].kind == "text" else Code(f"text({pieces[0].source})", "text")
            )
        return Code(f"join(({', '.join(piece.source for piece in pieces)}))", "text")

    def _choice(self, node: nodes.CondExpr) -> Code:
        yes, test = self.expression(node.expr1), self.expression(node.test)
        no = Code("U") if node.expr2 is None else self.expression(node.expr2)
        return Code(
            f"({yes.source} if {test.source} else {no.source})",
            yes.kind if yes.kind == no.kind else "value",
        )

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

    def namespace(self, node: nodes.Call) -> Code:
        """The dictionary that stands for a `namespace(...)`; it never leaves its variable."""
        pairs = [
            f"{argument.key!r}: {self.expression(argument.value).source}"
            for argument in node.kwargs
        ]
        return Code(f"{{{', '.join(pairs)}}}")

    def is_namespace(self, node: nodes.Node) -> bool:
        """Whether an expression makes a namespace."""
        return namespace_keys(node) is not None and self.is_input("namespace")

    def _arguments(self, node: nodes.Call | nodes.Filter | nodes.Test) -> str:
        written = [self.expression(argument).source for argument in node.args]
        for argument in node.kwargs:
            if is_keyword_argument(argument.key):
                written.append(f"{argument.key}={self.expression(argument.value).source}")
            else:
                written.append(self.only_jinja(node, f"the argument {argument.key}").source)
        return ", ".join(written)


def anchor_count(variable: str) -> str:
    """The Python variable that counts the anchors in the value of another one."""
    return f"a_{variable}"


_GUARDS: dict[str, Callable[..., object]] = {"replace": replace, "join": join_by}
"""Methods that may make a huge value of two short ones."""
_ARGUMENTS = frozenset({"messages", "tools", "add_generation_prompt"})
_SPECIAL_NAMES = frozenset({"self", "super", "caller", "varargs", "kwargs", "loop"})
_WRITERS: dict[type, Callable[[Expressions, Any], Code]] = {
    nodes.Const: Expressions._const,
    nodes.TemplateData: Expressions._template_data,
    nodes.Name: Expressions._name,
    nodes.Getattr: Expressions._getattr,
    nodes.Getitem: Expressions._getitem,
    nodes.Call: Expressions._call,
    nodes.Filter: Expressions._filter,
    nodes.Test: Expressions._test,
    nodes.Compare: Expressions._compare,
    nodes.Add: Expressions._add,
    nodes.Sub: Expressions._arithmetic,
    nodes.Mul: Expressions._arithmetic,
    nodes.Mod: Expressions._arithmetic,
    nodes.And: Expressions._logic,
    nodes.Or: Expressions._logic,
    nodes.Not: Expressions._not,
    nodes.Neg: Expressions._negative,
    nodes.Concat: Expressions._concat,
    nodes.CondExpr: Expressions._choice,
    nodes.List: Expressions._list,
    nodes.Tuple: Expressions._tuple,
    nodes.Dict: Expressions._dict,
}

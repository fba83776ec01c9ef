"""The operations that compiled templates may use: lists, so that whatever is not in them goes to
Jinja and its sandbox."""

from __future__ import annotations

import keyword

from jinja2 import nodes

from sftprep.chat_template.compiler.fragments import Kind

FUNCTIONS = frozenset({"raise_exception", "strftime_now", "range"})
"""Functions that every template has."""

COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "gt": ">",
    "gteq": ">=",
    "lt": "<",
    "lteq": "<=",
    "in": "in",
    "notin": "not in",
}
"""Jinja's names of comparisons, and Python's."""

TEXT_METHODS = frozenset(
    {
        "strip",
        "lstrip",
        "rstrip",
        "lower",
        "upper",
        "capitalize",
        "title",
        "replace",
        "removeprefix",
        "removesuffix",
        "join",
    }
)
"""Methods that give text."""

METHODS = TEXT_METHODS | frozenset(
    {
        "split",
        "rsplit",
        "splitlines",
        "partition",
        "rpartition",
        "startswith",
        "endswith",
        "find",
        "rfind",
        "count",
        "index",
    }
    | {
        "isdigit",
        "isalpha",
        "isalnum",
        "isspace",
        "isupper",
        "islower",
        "get",
        "items",
        "keys",
        "values",
    }
)
"""Methods of texts and dictionaries: none of them changes anything, or takes a number that could
make a huge value."""

TEXT_FILTERS = frozenset({"tojson", "join", "replace"})
"""Filters that give plain text, whatever they get."""

TEXT_KEEPING_FILTERS = frozenset({"trim", "string", "upper", "lower", "capitalize", "title"})
"""Filters that give text, which is Markup where they get Markup."""

FILTERS = frozenset(
    {
        "length",
        "count",
        "default",
        "d",
        "int",
        "float",
        "abs",
        "round",
        "list",
        "items",
        "dictsort",
        "safe",
    }
    | {"map", "select", "reject", "selectattr", "rejectattr"}
) | (TEXT_FILTERS | TEXT_KEEPING_FILTERS)
"""Filters that are called as they are. Those that may give an undefined value (first, last, min,
max ...) are not among them."""

MAPPED = frozenset(
    {"upper", "lower", "trim", "string", "tojson", "capitalize", "title", "int", "float", "length"}
)
"""Filters that `map` may run."""

SHORT_TESTS = {
    "defined": "({} is not U)",
    "undefined": "({} is U)",
    "none": "({} is None)",
    "string": "isinstance({}, str)",
    "true": "({} is True)",
    "false": "({} is False)",
}
"""Tests that are written out."""

TESTS = frozenset(SHORT_TESTS) | frozenset(
    {
        "mapping",
        "iterable",
        "sequence",
        "boolean",
        "number",
        "integer",
        "float",
        "odd",
        "even",
        "divisibleby",
        "lower",
        "upper",
    }
    | {"in", "eq", "equalto", "ne", "sameas"}
)
"""Tests, most of them called as they are."""

_PICKING = TESTS - {"sameas", "divisibleby"}
_TESTED = {"select": 0, "reject": 0, "selectattr": 1, "rejectattr": 1}
"""Filters that pick items by a test, and the place of its name among their arguments."""

LOOP: dict[str, tuple[Kind, str]] = {
    "index0": ("int", "{i}"),
    "index": ("int", "({i} + 1)"),
    "first": ("value", "({i} == 0)"),
    "last": ("value", "({i} == {last})"),
    "length": ("int", "({last} + 1)"),
    "revindex": ("int", "({last} - {i} + 1)"),
    "revindex0": ("int", "({last} - {i})"),
    "previtem": ("value", "({s}[{i} - 1] if {i} else U)"),
    "nextitem": ("value", "({s}[{i} + 1] if {i} != {last} else U)"),
}
"""What `loop` has: s is the sequence, i the index of the turn, last that of the last turn."""


def is_some_text(node: nodes.Node) -> bool:
    """Whether an expression is a constant text that is not empty."""
    return isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value != ""


def is_safe_to_skip(node: nodes.Node) -> bool:
    """Whether an expression cannot fail: Jinja works arguments out even where they are not used."""
    return isinstance(node, nodes.Const) or (
        isinstance(node, nodes.List | nodes.Dict) and not node.items
    )


def is_known_filter(node: nodes.Filter) -> bool:
    """Whether a filter may be compiled; of `map`, where it runs a filter that gives no undefined
    value; of those that pick, where they pick by a test of `TESTS` that does not ask which object
    it has."""
    if (
        node.node is None
        or node.dyn_args is not None
        or node.dyn_kwargs is not None
        or node.name not in FILTERS
    ):
        return False
    if node.name in _TESTED:
        place = _TESTED[node.name]
        test = node.args[place] if len(node.args) > place else None
        return not node.kwargs and (
            test is None or (isinstance(test, nodes.Const) and test.value in _PICKING)
        )
    first = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    return node.name != "map" or (isinstance(first, nodes.Const) and first.value in MAPPED)


def counted_to_be_some(node: nodes.Compare) -> nodes.Node | None:
    """What `value | length > 0` counts; None for other comparisons."""
    left, right = node.expr, node.ops[0].expr
    if (
        len(node.ops) != 1
        or node.ops[0].op != "gt"
        or not isinstance(right, nodes.Const)
        or type(right.value) is not int
    ):
        return None
    if (
        right.value
        or not isinstance(left, nodes.Filter)
        or left.name not in {"length", "count"}
        or not is_known_filter(left)
    ):
        return None
    return None if left.args or left.kwargs else left.node


def is_keyword_argument(key: object) -> bool:
    """Whether an argument may be given by this name in Python source."""
    return (
        isinstance(key, str) and key.isascii() and key.isidentifier() and not keyword.iskeyword(key)
    )


def passed_first(function: object) -> str:
    """What Jinja passes to a filter before its value."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    return {
        "context": "CONTEXT",
        "eval_context": "CONTEXT.eval_ctx",
        "environment": "CONTEXT.environment",
    }.get(wanted, "")

"""The operations permitted in compiled templates.

These are allowlists: every operation that is not in them is left to Jinja and its sandbox.
"""

from __future__ import annotations

import keyword

from jinja2 import nodes

from sftprep.chat_template.compiler.fragments import Kind

FUNCTIONS = frozenset({"raise_exception", "strftime_now", "range"})
"""Functions that are available to every template."""

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
"""Jinja's names of comparisons, with Python's operators."""

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
"""Methods that return a string."""

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
"""Methods of strings and dictionaries. None of them modifies its object, and none takes a number
that could make a huge value."""

TEXT_FILTERS = frozenset({"tojson", "join", "replace"})
"""Filters that return a plain str for any value."""

TEXT_KEEPING_FILTERS = frozenset({"trim", "string", "upper", "lower", "capitalize", "title"})
"""Filters that return a string, which is Markup if their value is Markup."""

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
"""Filters that compiled code calls directly. Filters that may return an undefined value (first,
last, min, max ...) are not among them."""

MAPPED = frozenset(
    {"upper", "lower", "trim", "string", "tojson", "capitalize", "title", "int", "float", "length"}
)
"""Filters that `map` may apply."""

SHORT_TESTS = {
    "defined": "({} is not U)",
    "undefined": "({} is U)",
    "none": "({} is None)",
    "string": "isinstance({}, str)",
    "true": "({} is True)",
    "false": "({} is False)",
}
"""Tests that are inlined; the braces are replaced by the value."""

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
"""Tests; those that are not inlined are called directly."""

_SELECTION_TESTS = TESTS - {"sameas", "divisibleby"}
_SELECTION_FILTERS = {"select": 0, "reject": 0, "selectattr": 1, "rejectattr": 1}
"""Filters that select items by a test, and the index of the test's name in their arguments."""

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
"""Attributes of `loop`, in terms of its variables: s, the sequence; i, the index of the current
item; last, the index of the last item."""


def is_nonempty_text(node: nodes.Node) -> bool:
    """Return whether an expression is a constant, nonempty string."""
    return isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value != ""


def is_safe_to_skip(node: nodes.Node) -> bool:
    """Return whether an expression cannot fail and may be left unevaluated.

    Jinja always evaluates the arguments of filters; a compiled template skips those whose value is
    not used.
    """
    return isinstance(node, nodes.Const) or (
        isinstance(node, nodes.List | nodes.Dict) and not node.items
    )


def is_known_filter(node: nodes.Filter) -> bool:
    """Return whether compiled code may apply a filter.

    A `map` may apply filters that never return an undefined value. Filters that select items may
    use a test of `TESTS` that does not depend on the identity of an object.
    """
    if (
        node.node is None
        or node.dyn_args is not None
        or node.dyn_kwargs is not None
        or node.name not in FILTERS
    ):
        return False
    if node.name in _SELECTION_FILTERS:
        index = _SELECTION_FILTERS[node.name]
        test = node.args[index] if len(node.args) > index else None
        return not node.kwargs and (
            test is None or (isinstance(test, nodes.Const) and test.value in _SELECTION_TESTS)
        )
    first = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    return node.name != "map" or (isinstance(first, nodes.Const) and first.value in MAPPED)


def operand_of_filled_check(node: nodes.Compare) -> nodes.Node | None:
    """Return `value` for the comparison `value | length > 0`, else None."""
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
    """Return whether Python source can pass an argument by this name."""
    return (
        isinstance(key, str) and key.isascii() and key.isidentifier() and not keyword.iskeyword(key)
    )


def first_argument_of(function: object) -> str:
    """Return the source of the argument before a filter's value, or "".

    Jinja passes this argument to filters that ask for a context or an environment.
    """
    passed = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    return {
        "context": "CONTEXT",
        "eval_context": "CONTEXT.eval_ctx",
        "environment": "CONTEXT.environment",
    }.get(passed, "")

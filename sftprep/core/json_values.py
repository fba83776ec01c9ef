"""Values of JSON: the values inside them, and the names of their types for messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_NAMES: dict[type, str] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def iter_leaves(value: Any, *, with_keys: bool = False) -> Iterator[Any]:
    """Yield the values in a JSON value that are neither arrays nor objects, in order.

    Args:
        value: The value, nested as deeply as a parser allows: this does not recurse.
        with_keys: Whether the keys of objects are yielded too, before their values.

    Example:
        {"a": [1, {"b": None}], "c": "d"}  ->  1, None, "d"
    """
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(reversed([*item, *item.values()] if with_keys else [*item.values()]))
        elif isinstance(item, list):
            stack.extend(reversed(item))
        else:
            yield item


def describe_json_type(value: Any) -> str:
    """Return the type of a value with its article.

    Example:
        3 -> "an integer"; None -> "null"; {} -> "an object"; {1} -> "a set"
    """
    name = type(value).__name__
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return _NAMES.get(type(value), f"{article} {name}")

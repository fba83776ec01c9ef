"""Names of types in the words of JSON, for messages about records."""

from __future__ import annotations

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


def describe_json_type(value: Any) -> str:
    """Return the type of a value with its article.

    Example:
        3 -> "an integer"; None -> "null"; {} -> "an object"; {1} -> "a set"
    """
    name = type(value).__name__
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return _NAMES.get(type(value), f"{article} {name}")

"""Values with meaning in the schema of a tool, and a copy of it with sentinels in their place.

The schema may be in any layout: the layouts of OpenAI, Anthropic and MCP, and tables of parameters
without a schema. These values have a meaning:

1. Names and descriptions, at any depth, and the names of parameters, which are keys.
2. The strings and numbers that a parameter may have: enumerations, defaults and examples. Limits,
   such as `minimum` and `pattern`, are not searched for.
3. Under any other key, strings of several words. Words of the schema language, such as types and
   formats, and the titles that libraries write for names, are not searched for.

Most records of a data set have the same tools, so the results for a list of tools are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

Scalar = str | int | float

_VALUE_KEYS = frozenset({"enum", "const", "default", "example", "examples"})
"""Keys of possible values of a parameter, whose numbers have a meaning as well."""
_LEAF_KEYS = _VALUE_KEYS | {"name", "description"}
"""Keys whose strings have a meaning, even if they are single words."""
_FIRST_NUMBER = 917_0000_0000
_SKIPPED_KEYS = frozenset({"type", "title", "format", "pattern", "required", "$schema", "$ref"})
"""Keys whose strings are words of the schema language, or repeat a name."""
_TABLE_KEYS = frozenset({"parameters", "input_schema", "inputSchema", "arguments"})
"""Keys of the parameters of a tool: a schema, or a table of them by name."""
_SCHEMA_KEYS = frozenset({"properties", "type", "$ref", "anyOf", "oneOf", "allOf", "json"})
_KEPT_NAMES = frozenset(
    {"description", "type", "properties", "required", "nullable", "items", "enum"}
)
"""Names of parameters that templates take for words of the schema language, as those of Gemma 4 do.
They are not replaced, so that the template treats the copy like the tool: if it leaves out such a
parameter, the description of the parameter is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolLeaves:
    """The strings and numbers with a meaning in a list of tools.

    Attributes:
        values: The strings and numbers, in order.
        sentinels: A unique sentinel for each of them.
        copy: The tools with the sentinels, which must not be modified.
        shape: The copy as JSON: what the rendering depends on apart from the values.
    """

    values: tuple[Scalar, ...]
    sentinels: tuple[str, ...]
    copy: list[Any]
    shape: str


def find_tool_leaves(tools: list[Any]) -> ToolLeaves:
    """Return the strings and numbers with a meaning in a list of tools."""
    try:
        data = orjson.dumps(tools)
    except TypeError:  # an integer beyond 64 bits, or values that are nested deeply
        data = json.dumps(tools).encode()
    return _find_leaves(data)


@lru_cache(maxsize=64)
def _find_leaves(data: bytes) -> ToolLeaves:
    values: list[Scalar] = []
    sentinels: list[str] = []

    def replace(value: Scalar) -> Scalar:
        values.append(value)
        if not isinstance(value, str):
            number = _FIRST_NUMBER + len(sentinels)
            sentinels.append(str(number))
            return number
        # As long as the value, if possible: templates leave out types whose text is long.
        sentinels.append(f"jv{len(sentinels)}w".ljust(len(value), "w"))
        return sentinels[-1]

    copied = [copy_tool(tool, replace) for tool in json.loads(data)]
    return ToolLeaves(
        values=tuple(values), sentinels=tuple(sentinels), copy=copied, shape=json.dumps(copied)
    )


def _never(_: Any) -> bool:
    return False


def copy_tool(
    tool: Any, replace: Callable[[Any], Any], is_written: Callable[[Any], bool] = _never
) -> Any:
    """Return a copy of a tool in which each value with a meaning is replaced.

    Args:
        tool: The tool.
        replace: Called with each of these values, in order; returns the one in its place.
        is_written: Whether the template is known to have written an object or a list, which is
            then left out.

    Example:
        {"name": "tide", "parameters": {"properties": {"harbour": {"type": "string"}}}}
        ->  replace("tide"), replace("harbour")
    """
    return _copy(tool, "", replace, is_written)


def _copy(
    value: Any, key: str, replace: Callable[[Any], Any], is_written: Callable[[Any], bool]
) -> Any:
    """Return the copy of a value under a key; the items of a list are under the key of the list."""
    if isinstance(value, str):
        is_leaf = key in _LEAF_KEYS or (key not in _SKIPPED_KEYS and len(value.split(None, 1)) > 1)
        return replace(value) if is_leaf and value.strip() else value
    if type(value) in (int, float) and key in _VALUE_KEYS:
        return replace(value)
    if not isinstance(value, dict | list) or is_written(value):
        return value
    if isinstance(value, list):
        return [_copy(item, key, replace, is_written) for item in value]
    if _is_table(key, value):
        return {
            _copy_name(name, replace): _copy(item, "", replace, is_written)
            for name, item in value.items()
        }
    copied = {name: _copy(item, name, replace, is_written) for name, item in value.items()}
    # The required parameters are those under the new names.
    properties, required = value.get("properties"), value.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        new_names = dict(zip(properties, copied["properties"], strict=True))
        copied["required"] = [
            new_names.get(name, name) if isinstance(name, str) else name for name in required
        ]
    return copied


def _copy_name(name: str, replace: Callable[[Any], Any]) -> str:
    return name if name in _KEPT_NAMES or not name.strip() else replace(name)


def _is_table(key: str, value: dict[str, Any]) -> bool:
    """Return whether the keys of an object are the names of parameters."""
    if key == "properties":
        return True
    return key in _TABLE_KEYS and not any(
        # A parameter may have the name of a word of the schema language.
        isinstance(value[word], dict if word == "properties" else str | list)
        for word in _SCHEMA_KEYS & value.keys()
    )

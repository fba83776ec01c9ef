"""Dataclasses from JSON values: every field is checked, since readers rely on its type."""

from __future__ import annotations

import dataclasses
import re
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import Any, get_args, get_origin, get_type_hints

NOT_STORED = {"stored": False}
"""The metadata of a field that is neither written nor read."""


class FieldError(Exception):
    """A missing field of a manifest, or one with another type."""


def is_stored(declared: dataclasses.Field[Any]) -> bool:
    """Return whether a field is written and read."""
    return declared.metadata != NOT_STORED


def parse_fields(kind: Any, values: Any, prefix: str) -> Any:
    """Return a dataclass with the checked values of a JSON object.

    Args:
        kind: A dataclass; its fields have types of `_TYPES`, are dataclasses, or tuples of them.
        values: The value in the manifest.
        prefix: What precedes the names of its fields in an error, such as `inputs[0].`.

    Raises:
        FieldError: A field is missing, or has another type.
    """
    if not isinstance(values, dict):
        raise FieldError(f"{prefix.rstrip('.') or 'it'} is {shorten(values)}, not an object")
    types = _types_of_fields(kind)
    parsed = {}
    # Fields of `values` that are unknown here are ignored: a later minor version may add some.
    for declared in dataclasses.fields(kind):
        name = declared.name
        if not is_stored(declared):
            continue
        if name in values:
            parsed[name] = _parse_field(types[name], values[name], prefix + name)
        elif declared.default is declared.default_factory is dataclasses.MISSING:
            raise FieldError(f"{prefix}{name} is missing")
    return kind(**parsed)


def _parse_field(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return parse_fields(kind, value, f"{name}.")
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise FieldError(f"{name} is {shorten(value)}, not a list")
        item_kind = get_args(kind)[0]
        if item_kind is int:
            return tuple(check_field(int, item, f"{name}[{k}]") for k, item in enumerate(value))
        return tuple(parse_fields(item_kind, item, f"{name}[{k}].") for k, item in enumerate(value))
    return check_field(kind, value, name)


def compact_packs(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the list of `packs`, of which there may be a million, as soon as it is read."""
    packs = values.get("packs")
    if isinstance(packs, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in packs):
        values["packs"] = array("q", packs)
    return values


def check_field(kind: Any, value: Any, name: str) -> Any:
    """Return a value of the type `kind`, else raise FieldError."""
    description, has_type = _TYPES[kind]
    if not has_type(value):
        raise FieldError(f"{name} is {shorten(value)}, not {description}")
    return value


def shorten(value: Any) -> str:
    return "an object" if isinstance(value, dict) else f"{value!a:.40}"


def _is_count(value: Any) -> bool:
    # `type` and not isinstance: True is an int. Readers hold counts in int64.
    return type(value) is int and 0 <= value < 1 << 63


def _is_string(value: Any) -> bool:
    """Return whether a value is a string, encodable in UTF-8.

    Half a surrogate pair is not encodable.
    """
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_string(k) and _is_count(n) for k, n in value.items())


def _is_json(value: Any, levels: int = 32) -> bool:
    """Return whether a JSON value can be written again.

    It must not be nested too deeply, and must be valid UTF-8.
    """
    if isinstance(value, dict):
        return levels > 0 and all(
            _is_string(key) and _is_json(item, levels - 1) for key, item in value.items()
        )
    if isinstance(value, list):
        return levels > 0 and all(_is_json(item, levels - 1) for item in value)
    return not isinstance(value, str) or _is_string(value)


_types_of_fields = lru_cache(get_type_hints)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Declared type of a field -> its description, and the test for a JSON value of this type.
_TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("text", _is_string),
    int: ("a whole number from 0 to 2^63 - 1", _is_count),
    array: ("a list of whole numbers from 0 to 2^63 - 1", lambda value: type(value) is array),
    float | None: (
        "a number or null",
        lambda value: value is None or type(value) in (int, float),
    ),
    str | None: ("text or null", lambda value: value is None or _is_string(value)),
    int | None: ("a whole number or null", lambda value: value is None or _is_count(value)),
    dict[str, int]: ("an object of whole numbers from 0 to 2^63 - 1", _are_counts),
    dict[str, Any]: (
        "an object of valid strings that is not nested too deeply",
        lambda value: isinstance(value, dict) and _is_json(value),
    ),
}

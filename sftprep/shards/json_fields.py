"""JSON of dataclasses. Every field that is read is checked, since readers rely on its type."""

from __future__ import annotations

import dataclasses
import json
import re
from array import array
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import xxhash

NOT_STORED = {"stored": False}
"""The metadata of a field that is neither written nor read."""


_NUMBERS = re.compile(r"\[\n[\s\d,]+\]")
"""A list of integers on several lines. No string matches: in JSON, it has no line end."""
_CHECKSUM = re.compile(rb',\n "checksum": "([0-9a-f]{32})"\n}\n\Z')


def encode_json(values: Any) -> str:
    """Return JSON with sorted keys, indented, with each list of integers on one line."""
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False)
    return _NUMBERS.sub(lambda found: "".join(found[0].split()), text)


def seal(content: bytes) -> bytes:
    """Return the content of a file with a checksum of the bytes before it.

    Args:
        content: A JSON object, as `encode_json` writes it.
    """
    content = content.removesuffix(b"\n}")
    return content + f',\n "checksum": "{xxhash.xxh3_128_hexdigest(content)}"\n}}\n'.encode()


def check_seal(content: bytes) -> None:
    """Raise FieldError unless content ends with the checksum of `seal`."""
    found = _CHECKSUM.search(content)
    if found is None:
        raise FieldError("it has no checksum at its end")
    if xxhash.xxh3_128_hexdigest(content[: found.start()]).encode() != found[1]:
        raise FieldError("its content is not what was written")


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
    parsed = {}
    # Fields of `values` that are unknown here are ignored: a later minor version may add some.
    for declared in _stored_fields(kind):
        name = declared.name
        if name in values:
            value = values[name]
            # Most fields are decided here: a manifest may have 100,000 of them.
            if declared.has_type is None or not declared.has_type(value):
                value = _parse_field(declared.kind, value, prefix + name)
            parsed[name] = value
        elif declared.is_required:
            raise FieldError(f"{prefix}{name} is missing")
    return kind(**parsed)


class _StoredField(NamedTuple):
    """A field that is read.

    Attributes:
        name: Its name.
        kind: Its declared type.
        has_type: The test for a value of this type; None for dataclasses and tuples.
        is_required: Whether it has no default.
    """

    name: str
    kind: Any
    has_type: Callable[[Any], bool] | None
    is_required: bool


@lru_cache
def _stored_fields(kind: Any) -> tuple[_StoredField, ...]:
    """Return the fields of a dataclass that are read."""
    types = get_type_hints(kind)
    found = []
    for declared in filter(is_stored, dataclasses.fields(kind)):
        of_type = types[declared.name]
        _, has_type = _TYPES.get(of_type, ("", None))
        is_required = declared.default is declared.default_factory is dataclasses.MISSING
        found.append(_StoredField(declared.name, of_type, has_type, is_required))
    return tuple(found)


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
    if isinstance(packs, list) and {*map(type, packs)} <= {int}:
        with suppress(OverflowError):  # too large a number is found with the type of the field
            compact = array("q", packs)
            values["packs"] = compact if min(compact, default=0) >= 0 else packs
    return values


def check_field(kind: Any, value: Any, name: str) -> Any:
    """Return a value of the type `kind`, else raise FieldError."""
    description, has_type = _TYPES[kind]
    if not has_type(value):
        raise FieldError(f"{name} is {shorten(value)}, not {description}")
    return value


def check_text(pattern: re.Pattern[str], text: str, name: str) -> None:
    """Raise FieldError unless a pattern matches all of a text."""
    if not pattern.fullmatch(text):
        raise FieldError(f"{name} is {shorten(text)}")


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

"""Functions of compiled templates: Jinja's lookups for plain JSON values.

Each function returns exactly what Jinja would, or it raises. After an exception, Jinja renders the
conversation or reports what is wrong with it.
"""

from __future__ import annotations

from types import NoneType
from typing import Any, NoReturn

from jinja2 import Undefined
from markupsafe import Markup, soft_str

from sftprep.chat_template.reference.growth_limits import HUGE_SIZE

UNDEFINED = Undefined(name="value")
"""The undefined value. Jinja makes one for each lookup, but they are all equal and differ only in
their error messages."""

MISSING = object()
"""Default of a macro's parameters: the call does not pass the argument."""

NAMES_OF_MAPPINGS = frozenset(dir(dict))
"""Names under which Jinja finds a method of a dictionary, before its key or instead of a missing
key."""

NAMES_OF_VALUES = frozenset(
    name for kind in (str, int, float, list, tuple, NoneType, Markup) for name in dir(kind)
)
"""Names under which values other than dictionaries have an attribute."""

_PLAIN_TYPES = frozenset({str, int, float, bool, NoneType, list})
_SEQUENCE_TYPES = frozenset({str, list, tuple})


class JinjaFallback(Exception):
    """A request to render this conversation with Jinja.

    Args:
        reason: A short reason; one template has only a few different ones.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def fall_back(reason: str) -> NoReturn:
    """Raise JinjaFallback."""
    raise JinjaFallback(reason)


def attr(value: Any, name: str) -> Any:
    """Return `value.name` or `value["name"]`.

    The name is not an attribute of any plain value.
    """
    kind = type(value)
    if kind is dict:
        return value.get(name, UNDEFINED)
    if kind in _PLAIN_TYPES:
        return UNDEFINED
    raise JinjaFallback(f"{name!r} of a {kind.__name__}")


def attr_of_mapping(value: Any, name: str) -> Any:
    """Return `value.name` or `value["name"]` for a dictionary.

    The name is an attribute of some plain values, but not of dictionaries.
    """
    if type(value) is dict:
        return value.get(name, UNDEFINED)
    raise JinjaFallback(f"{name!r} of a {type(value).__name__}")


def item(value: Any, key: Any) -> Any:
    """Return `value[key]`."""
    kind = type(value)
    if type(key) is int and kind in _SEQUENCE_TYPES:
        try:
            return value[key]
        except IndexError:
            return UNDEFINED
    if type(key) is str:
        if kind is dict and key in value:
            return value[key]
        # For a missing key, Jinja looks for an attribute of the same name.
        if key[:1] != "_" and key not in NAMES_OF_MAPPINGS:
            return attr_of_mapping(value, key) if key in NAMES_OF_VALUES else attr(value, key)
    raise JinjaFallback(f"an item of a {kind.__name__} by a {type(key).__name__}")


def exact(value: Any) -> Any:
    """Return a plain `str` unchanged, and leave all other values to Jinja.

    `Markup` would escape what is added to it.
    """
    if type(value) is str:
        return value
    raise JinjaFallback(f"adding a {type(value).__name__} to text")


def trim(value: Any) -> str:
    """Run the filter `trim` without arguments."""
    return soft_str(value).strip()


def is_filled(value: Any) -> bool:
    """Return `value | length > 0`."""
    return len(value) > 0


def replace(value: Any, old: Any, new: Any, *count: Any) -> Any:
    """Return `value.replace(old, new)`, where `new` may be long."""
    if type(value) is type(new) is str and (len(value) + 1) * len(new) <= HUGE_SIZE:
        return value.replace(old, new, *count)
    raise JinjaFallback("a long replacement")


def join_by(separator: Any, items: Any) -> Any:
    """Return `separator.join(items)`, where the separator may be long."""
    if type(separator) is str and type(items) is list and len(separator) * len(items) <= HUGE_SIZE:
        return separator.join(items)
    raise JinjaFallback("a long separator")


def size(pieces: list[str]) -> int:
    """Return the number of characters of an output."""
    return sum(map(len, pieces))

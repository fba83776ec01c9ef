"""What compiled templates call while they run: Jinja's ways with attributes and items, on plain
JSON values only.

Each function gives exactly what Jinja gives, or raises: then Jinja renders the conversation, or
says what is wrong with it.
"""

from __future__ import annotations

from types import NoneType
from typing import Any, NoReturn

from jinja2 import Undefined
from markupsafe import Markup, soft_str

from sftprep.chat_template.reference.growth_limits import HUGE_SIZE

UNDEFINED = Undefined(name="value")
"""What is not there. Jinja makes one for each lookup; they are all equal, and differ in their error
messages only."""

MISSING = object()
"""Argument of a macro that the call does not give."""

NAMES_OF_MAPPINGS = frozenset(dir(dict))
"""Names for which Jinja finds a method of a dictionary before its key, or instead of a missing
key."""

NAMES_OF_VALUES = frozenset(
    name for kind in (str, int, float, list, tuple, NoneType, Markup) for name in dir(kind)
)
"""Names under which values other than dictionaries have something."""


class JinjaFallback(Exception):
    """The compiled template met what only Jinja can do. `reason` is short, and one of few for each
    template."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def hand_over(reason: str) -> NoReturn:
    """Give this conversation to Jinja. Raises JinjaFallback."""
    raise JinjaFallback(reason)


def attr(value: Any, name: str) -> Any:
    """`value.name` or `value["name"]`, for a name that no plain value has as an attribute."""
    kind = type(value)
    if kind is dict:
        return value.get(name, UNDEFINED)
    if kind in _PLAIN:
        return UNDEFINED
    raise JinjaFallback(f"{name!r} of a {kind.__name__}")


def attr_of_mapping(value: Any, name: str) -> Any:
    """`value.name` or `value["name"]`, for a name that some plain values, but no dictionary, have
    as an attribute."""
    if type(value) is dict:
        return value.get(name, UNDEFINED)
    raise JinjaFallback(f"{name!r} of a {type(value).__name__}")


def item(value: Any, key: Any) -> Any:
    """`value[key]`."""
    kind = type(value)
    if type(key) is int and kind in _SEQUENCES:
        try:
            return value[key]
        except IndexError:
            return UNDEFINED
    if type(key) is str:
        if kind is dict and key in value:
            return value[key]
        if key[:1] != "_" and key not in NAMES_OF_MAPPINGS:
            return attr_of_mapping(value, key) if key in NAMES_OF_VALUES else attr(value, key)
    raise JinjaFallback(f"an item of a {kind.__name__} by a {type(key).__name__}")


def exact(value: Any) -> Any:
    """Text that is no `Markup`, which would escape what it is added to."""
    if type(value) is str:
        return value
    raise JinjaFallback(f"adding a {type(value).__name__} to text")


def trim(value: Any) -> str:
    """The filter `trim` without arguments."""
    return soft_str(value).strip()


def is_filled(value: Any) -> bool:
    """`value | length > 0`."""
    return len(value) > 0


def replace(value: Any, old: Any, new: Any, *count: Any) -> Any:
    """`value.replace(old, new)`, where `new` may be long."""
    if type(value) is type(new) is str and (len(value) + 1) * len(new) <= HUGE_SIZE:
        return value.replace(old, new, *count)
    raise JinjaFallback("a long replacement")


def join_by(separator: Any, items: Any) -> Any:
    """`separator.join(items)`, where the separator may be long."""
    if type(separator) is str and type(items) is list and len(separator) * len(items) <= HUGE_SIZE:
        return separator.join(items)
    raise JinjaFallback("a long separator")


def size(pieces: list[str]) -> int:
    """Characters of an output so far."""
    return sum(map(len, pieces))


_PLAIN = frozenset({str, int, float, bool, NoneType, list})
_SEQUENCES = frozenset({str, list, tuple})

"""How large the results of string operations can be, worked out before they run.

An operation that writes one of its arguments once for each part of another one, as `replace`, can
make gigabytes of two short strings. Each function here takes what the operation takes, and raises
SecurityError where the result would have more than `HUGE_SIZE` characters and more than twice what
it is made of: a long conversation may be changed as it likes, and not be multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError

HUGE_SIZE = 1 << 24
"""Characters, items or bits."""
SHORT = 16
"""Characters; a string that is not longer multiplies no more than a template may that is written
out."""


def check_growth(operation: str, size: int, made_of: int) -> None:
    """Check the size of a result against the size of its parts. Raises SecurityError."""
    if size > HUGE_SIZE and size > 2 * made_of:
        raise SecurityError(f"the chat template makes a huge value with {operation!r}")


def check_replace(value: Any, old: Any, new: Any, count: Any = -1) -> None:
    """As `str.replace`, and the filter `replace`."""
    value, old, new = str(value), str(old), str(new)
    if len(new) <= SHORT or (len(value) + 1) * len(new) <= HUGE_SIZE:
        return
    found = value.count(old)
    if isinstance(count, int) and count >= 0:
        found = min(found, count)
    size = len(value) + found * (len(new) - len(old))
    check_growth("replace", size, len(value) + len(new))


def check_join(separator: Any, items: Iterable[Any]) -> None:
    """As `str.join`, for items that can be gone through again."""
    if isinstance(items, str):
        count = size = made_of = len(items)
    else:
        lengths = [len(item) for item in items if isinstance(item, str)]
        count, size = len(lengths), sum(lengths)
        made_of = size
        if size > HUGE_SIZE:
            # The same string many times is one string.
            made_of = sum({id(item): len(item) for item in items if isinstance(item, str)}.values())
    check_growth("join", size + count * len(str(separator)), made_of + len(str(separator)))


def check_translate(value: str, table: Any) -> None:
    """As `str.translate`."""
    if isinstance(table, str) or not isinstance(table, Mapping | Sequence):
        return
    replacements = table.values() if isinstance(table, Mapping) else table
    longest = max((len(new) for new in replacements if isinstance(new, str)), default=0)
    if longest > SHORT:
        check_growth("translate", len(value) * longest, len(value) + longest)


def check_expandtabs(value: str, tabsize: Any = 8) -> None:
    """As `str.expandtabs`."""
    if isinstance(tabsize, int) and tabsize > SHORT:
        check_growth("expandtabs", len(value) + value.count("\t") * tabsize, len(value))


def check_indent(value: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    """As the filter `indent`."""
    length = len(width) if isinstance(width, str) else width
    if isinstance(length, int) and length > SHORT:
        text = str(value)
        check_growth("indent", len(text) + len(text.splitlines()) * length, len(text) + length)


def check_wordwrap(
    value: Any, width: Any = 79, _long: Any = True, wrapstring: Any = None, *_: Any, **__: Any
) -> None:
    """As the filter `wordwrap`."""
    if isinstance(wrapstring, str) and len(wrapstring) > SHORT:
        text = str(value)
        lines = text.count("\n") + 1 + len(text) // max(1, width if isinstance(width, int) else 1)
        check_growth("wordwrap", len(text) + lines * len(wrapstring), len(text) + len(wrapstring))


def check_sum(items: Sequence[Any], start: Any) -> None:
    """As the filter `sum`, of lists."""
    lists = [item for item in items if isinstance(item, list | tuple)]
    size = sum(map(len, lists))
    if size > HUGE_SIZE:
        made_of = sum({id(item): len(item) for item in lists}.values())
        check_growth("sum", size + len(start), made_of + len(start))


def check_format(template: str, fields: int, values: Any, size_of: Callable[[Any], int]) -> None:
    """As `str.format` and `%`, for a string with so many fields."""
    if fields > SHORT:
        size = size_of(values)
        check_growth("format", len(template) + fields * size, len(template) + size)


METHOD_CHECKS: dict[str, Callable[..., None]] = {
    "replace": check_replace,
    "translate": check_translate,
    "expandtabs": check_expandtabs,
}
"""Methods of strings that are checked with their string and the arguments that they get; `join` is
not among them, for its items may be gone through only once."""

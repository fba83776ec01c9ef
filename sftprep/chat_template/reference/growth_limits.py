"""Limits on the results of string operations, computed before the operations run.

An operation that writes one of its arguments once for each part of another argument, such as
`replace`, can make gigabytes out of two short strings. Each function here takes the arguments of
the operation. It raises SecurityError if the result would have more than `HUGE_SIZE` characters and
more than twice the characters of its parts. So a template may rewrite a long conversation, but it
may not multiply it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError

HUGE_SIZE = 1 << 24
"""Characters, items or bits."""
SHORT = 16
"""Characters. A string of at most this length multiplies no more than a template could by writing
its constants out, so it is not checked."""
LARGE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{5,}|\*)")
"""A field of a `%` format with a width of five digits or more, or a width taken from the values."""
_LARGEST_ARGUMENT = 10_000
"""The largest number that padding may get as an argument."""


def check_growth(operation: str, size: int, parts_size: int) -> None:
    """Compare the size of a result with the size of its parts.

    Raises:
        SecurityError: The result would be huge.
    """
    if size > HUGE_SIZE and size > 2 * parts_size:
        raise SecurityError(f"the chat template makes a huge value with {operation!r}")


def check_replace(value: Any, old: Any, new: Any, count: Any = -1) -> None:
    """Check `str.replace` and the filter `replace`."""
    value, old, new = str(value), str(old), str(new)
    # This bound is cheap and holds for nearly all templates; only then are occurrences counted.
    if len(new) <= SHORT or (len(value) + 1) * len(new) <= HUGE_SIZE:
        return
    occurrences = value.count(old)
    if isinstance(count, int) and count >= 0:
        occurrences = min(occurrences, count)
    size = len(value) + occurrences * (len(new) - len(old))
    check_growth("replace", size, len(value) + len(new))


def check_join(separator: Any, items: Iterable[Any]) -> None:
    """Check `str.join`; `items` must permit repeated iteration."""
    if isinstance(items, str):
        count = size = parts_size = len(items)
    else:
        lengths = [len(item) for item in items if isinstance(item, str)]
        count, size = len(lengths), sum(lengths)
        parts_size = size
        if size > HUGE_SIZE:
            # A string object that occurs several times counts once: it would be multiplied.
            parts_size = sum(
                {id(item): len(item) for item in items if isinstance(item, str)}.values()
            )
    check_growth("join", size + count * len(str(separator)), parts_size + len(str(separator)))


def check_translate(value: str, table: Any) -> None:
    """Check `str.translate`."""
    if isinstance(table, str) or not isinstance(table, Mapping | Sequence):
        return
    replacements = table.values() if isinstance(table, Mapping) else table
    longest = max((len(new) for new in replacements if isinstance(new, str)), default=0)
    if longest > SHORT:
        check_growth("translate", len(value) * longest, len(value) + longest)


def check_expandtabs(value: str, tabsize: Any = 8) -> None:
    """Check `str.expandtabs`."""
    if isinstance(tabsize, int) and tabsize > SHORT:
        check_growth("expandtabs", len(value) + value.count("\t") * tabsize, len(value))


def check_indent(value: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    """Check the filter `indent`."""
    length = len(width) if isinstance(width, str) else width
    if isinstance(length, int) and length > SHORT:
        text = str(value)
        check_growth("indent", len(text) + len(text.splitlines()) * length, len(text) + length)


def check_wordwrap(
    value: Any, width: Any = 79, _long: Any = True, wrapstring: Any = None, *_: Any, **__: Any
) -> None:
    """Check the filter `wordwrap`."""
    if isinstance(wrapstring, str) and len(wrapstring) > SHORT:
        text = str(value)
        lines = text.count("\n") + 1 + len(text) // max(1, width if isinstance(width, int) else 1)
        check_growth("wordwrap", len(text) + lines * len(wrapstring), len(text) + len(wrapstring))


def check_sum(items: Sequence[Any], start: Any) -> None:
    """Check the filter `sum` of lists."""
    lists = [item for item in items if isinstance(item, list | tuple)]
    size = sum(map(len, lists))
    if size > HUGE_SIZE:
        # As in check_join: a list object that occurs several times counts once.
        parts_size = sum({id(item): len(item) for item in lists}.values())
        check_growth("sum", size + len(start), parts_size + len(start))


def check_format(template: str, num_fields: int, values: Any) -> None:
    """Check `str.format` and `%` for a format string with this number of fields."""
    if num_fields > SHORT:
        size = size_of(values)
        check_growth("format", len(template) + num_fields * size, len(template) + size)


def size_of(value: Any) -> int:
    """Return the number of characters in all strings of plain JSON data."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(key)) + size_of(item) for key, item in value.items())
    if isinstance(value, Sequence):
        return sum(size_of(item) for item in value)
    return 8  # about what a number or a boolean takes as text


def check_numbers(value: Any) -> None:
    """Check the arguments of a padding operation for large numbers.

    Numbers in tuples and dictionaries are checked as well.

    Raises:
        SecurityError: A number is large.
    """
    if isinstance(value, int) and abs(value) > _LARGEST_ARGUMENT:
        raise SecurityError(f"the chat template asks for a width of {value}")
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        for item in value:
            check_numbers(item)


def is_huge_operation(operator: str, left: Any, right: Any) -> bool:
    """Return whether `*`, `**` or `%` could make a huge value of these operands.

    Raises:
        SecurityError: A `%` format would multiply its values.
    """
    if operator == "%":
        if not isinstance(left, str):
            return False
        check_format(left, left.count("%"), right)
        return LARGE_PERCENT.search(left) is not None
    if operator == "**":
        return (
            isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() * right > HUGE_SIZE
        )
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length() > HUGE_SIZE
    # A sequence times a number, in either order.
    sequence, count = (left, right) if isinstance(right, int) else (right, left)
    return (
        isinstance(count, int)
        and hasattr(sequence, "__len__")
        and len(sequence) * count > HUGE_SIZE
    )


METHOD_CHECKS: dict[str, Callable[..., None]] = {
    "replace": check_replace,
    "translate": check_translate,
    "expandtabs": check_expandtabs,
}
"""String methods that are checked with the string and the arguments of the call. `join` is not
among them, because its items may be an iterator, which can be consumed only once."""

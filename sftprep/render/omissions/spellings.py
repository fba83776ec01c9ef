"""Spellings of a value in the text of a chat template: raw, as JSON, and as Python.

Values that occur in each other are found by their number (`count_missing`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

_UNESCAPED = re.compile(r"[A-Za-z0-9 .,]{8,64}")
"""A part of a string that JSON and Python write unchanged."""


def occurs(value: str | int | float, text: str) -> bool:
    """Return whether a text contains a value in any spelling."""
    return any(form in text for form in iter_spellings(value))


def all_occur(texts: Sequence[str], rendered: Sequence[str]) -> bool:
    """Return whether each text is in one of the rendered texts, in any spelling."""
    return all(any(occurs(text, shown) for shown in rendered) for text in texts)


def cannot_be_in(value: str | int | float, text: str) -> bool:
    """Return whether a text certainly contains no spelling of a value.

    This is certain if the text lacks a part common to all spellings.
    """
    if not isinstance(value, str):
        return False
    shared = _UNESCAPED.search(value)
    return shared is not None and shared[0] not in text


def iter_spellings(value: str | int | float) -> Iterator[str]:
    """Yield the forms of a value in templates, the frequent ones first."""
    if not isinstance(value, str):
        yield json.dumps(value)
        yield str(value)
        return
    yield value
    once = _json_spellings(value)
    yield from once
    # The arguments as JSON text that is written as JSON.
    for form in once:
        yield from _json_spellings(form)
    # As Python, in the quotes that it chooses and in single ones.
    quoted = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    shown = {repr(value)[1:-1], repr(f'"{value}')[2:-1], quoted.replace("\r", "\\r")}
    yield from sorted(shown - {value, *once})


def _json_spellings(value: str) -> list[str]:
    """Return the forms of a string inside JSON, if they differ from the string.

    The forms are with and without characters beyond ASCII, and as `tojson` escapes the string.
    """
    forms = []
    for ascii_only in (False, True):
        form = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        html = form
        for character, code in (("<", "003c"), (">", "003e"), ("&", "0026"), ("'", "0027")):
            html = html.replace(character, f"\\u{code}")
        forms += [form, html]
    return [form for form in dict.fromkeys(forms) if form != value]


def first_spelling(value: str | int | float) -> str:
    """Return the most frequent form of a value: a string as it is, a number as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def count_missing(
    shown: Sequence[str | int | float],
    examined: Sequence[str | int | float],
    text: str,
    fixed: str = "",
) -> Counter[str]:
    """Count the values for which a text has too few occurrences.

    Every value needs an occurrence of its own: one within another value is not its own. The
    spellings of a value that has only one are the same inside every spelling of another value;
    for other values, occurrences within others are not considered.

    Args:
        shown: The values that the text should contain; each of them is in it.
        examined: Those of the values to count.
        text: The text.
        fixed: What the text contains besides the values, whose occurrences are not theirs.

    Returns:
        The number of missing occurrences, by the first spelling of the value.

    Example:
        "no", "not now" in "not now"  ->  1 is missing for "no"
    """
    spellings = [*map(first_spelling, shown)]
    num_shown, joined = Counter(spellings), "\0".join(spellings)
    missing: Counter[str] = Counter()
    of_examined = {first_spelling(value): value for value in examined}
    # Longer values first: a missing one contains no occurrence of the shorter ones.
    for spelling in sorted(of_examined, key=len, reverse=True):
        needed, forms = num_shown[spelling], set(iter_spellings(of_examined[spelling]))
        if len(forms) == 1:
            within = sum(number * other.count(spelling) for other, number in missing.items())
            needed = joined.count(spelling) - within
        lacking = needed + sum(map(fixed.count, forms)) - sum(map(text.count, forms))
        if lacking > 0:
            missing[spelling] = min(lacking, num_shown[spelling])
    return missing

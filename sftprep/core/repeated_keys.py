"""Keys that occur several times in one JSON object.

Parsers keep only the last value, so the others would disappear. To find them without a second parse
of everything:

1. The keys in the text are counted: a colon after a quote ends a key, unless the quote is escaped
   and so is a part of a string.
2. The keys of the parsed value are counted. If there are as many, no key is repeated.
3. Otherwise, which is rare, the text is parsed again by Python, which reports all keys.

Cost: one pass of numpy over the bytes, and a sum of lengths for each record.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COLON, _QUOTE, _BACKSLASH = b':"\\'
_STEP = 1 << 17
"""Bytes that are compared at once; the results fit into the cache of a processor."""
_LAST_WHITESPACE = 32


class _RepeatedKeyError(Exception):
    """The first repeated key that Python's parser found."""


def count_keys_of_lines(data: bytes, lines: Sequence[bytes]) -> list[int]:
    """Return for each line of JSON a number of keys, which is never too small.

    Args:
        data: The lines as one string of bytes.
        lines: The lines, without their newlines.

    Example:
        b'{"a": 1, "a": {"b": "c:\\\\"d\\\\":"}}\\n[]\\n'  ->  [3, 0]
    """
    values: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
    # 1. The characters before a colon, if they are whitespace or a quote.
    before = _find_before_colons(values)
    before = before[before > 0]  # a key has at least two quotes
    character, earlier = values[before], values[before - 1]
    # 2. Quotes that are not escaped, and whitespace after a quote or whitespace.
    is_escaped = (earlier == _BACKSLASH) & (values[before - 2] != _BACKSLASH)
    is_key = (character == _QUOTE) & ~is_escaped
    if not is_key.all():
        is_space = character <= _LAST_WHITESPACE
        is_key |= is_space & ((earlier == _QUOTE) | (earlier <= _LAST_WHITESPACE))
    # 3. The number in each line.
    ends = np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)) + 1)
    counts: list[int] = np.diff(np.searchsorted(before[is_key], ends), prepend=0).tolist()
    return counts


def _find_before_colons(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the positions of bytes up to the quote (34) that a colon follows, ascending."""
    found: list[NDArray[np.int64]] = []
    mask = np.zeros(_STEP, np.bool_)
    for start in range(0, max(0, len(values) - 1), _STEP):
        after = values[start + 1 : start + 1 + _STEP]
        mask[len(after) :] = False
        part = mask[: len(after)]
        np.equal(after, _COLON, out=part)
        part &= values[start : start + len(after)] <= _QUOTE
        # Eight bytes at once, since most are zero.
        groups = np.flatnonzero(mask.view(np.uint64))
        rows, columns = np.nonzero(mask.reshape(-1, 8)[groups])
        found.append(groups[rows] * 8 + columns + start)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def count_keys(value: Any) -> int:
    """Return the number of keys of all objects in a parsed value."""
    number = 0
    stack = [value]
    while stack:
        item = stack.pop()
        if type(item) is dict:
            number += len(item)
            stack.extend(item.values())
        elif type(item) is list:
            stack.extend(item)
    return number


def find_repeated_key(text: str | bytes, parsed: Any, num_keys: int | None = None) -> str | None:
    """Return a key that an object in a text of JSON has twice, or None.

    Args:
        text: The text.
        parsed: What a parser made of it.
        num_keys: The number of keys in the text, which is not too small; None: of colons.

    Example:
        '{"a": 1, "a": 2}', {"a": 2}  ->  "a"
    """
    if num_keys is None:
        num_keys = text.count(":") if isinstance(text, str) else text.count(b":")
    if num_keys == count_keys(parsed):
        return None
    try:
        # Integers are not converted: Python refuses those of more than 4,300 digits.
        json.loads(text, object_pairs_hook=_check_pairs, parse_int=str)
    except _RepeatedKeyError as error:
        return str(error)
    except (ValueError, RecursionError):  # the caller's parser decides about such a text
        return None
    return None


def _check_pairs(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise _RepeatedKeyError(key)
        seen.add(key)

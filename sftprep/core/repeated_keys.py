"""Keys that occur several times in one JSON object.

Parsers keep only the last value, so the others would disappear. To find them without a second parse
of everything:

1. The keys in all lines together are counted as colons after quotes, and compared with the keys of
   the parsed records. If there are as many, no key is repeated.
2. Otherwise the keys of each line are counted exactly: an escaped quote is a part of a string.
3. A line that has other keys than its record is parsed again by Python, which reports all keys.

Cost: two comparisons of the bytes, and a sum of lengths for each record; about 1 % of a build.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COLON, _QUOTE, _BACKSLASH = b':"\\'
_STEP = 1 << 17
"""Bytes that are compared at once; the results fit into the cache of a processor."""
_LAST_WHITESPACE = 32
_ONLY_OBJECTS = {dict}
_BEFORE_VALUE = b" \t\r\xef\xbb\xbf"
"""Bytes that may precede a value on a line."""


class _RepeatedKeyError(Exception):
    """The first repeated key that Python's parser found."""


def find_repeated_keys(
    data: bytes, lines: Sequence[bytes], records: Sequence[Any]
) -> dict[int, str]:
    """Return the lines with an object that has a key several times, by number, with the key.

    Args:
        data: The lines as one string of bytes.
        lines: The lines, without their newlines.
        records: What was parsed from each line; a list on a line may be under the key `messages`.
            Other values than objects and lists are ignored.
    """
    # A list on a line has no key `messages`, so sums could hide a repeated key elsewhere.
    if all(line[:1] == b"{" for line in lines):
        num_pairs = _count_pairs(data)
        if num_pairs == _estimate_keys(records):
            return {}
        if num_pairs == sum(map(count_keys, records)):
            return {}
    found: dict[int, str] = {}
    for number, num_keys in enumerate(count_keys_of_lines(data, lines)):
        line, record = lines[number], records[number]
        if isinstance(record, dict | list):
            is_list = line.lstrip(_BEFORE_VALUE)[:1] == b"[" and isinstance(record, dict)
            key = find_repeated_key(line, record, num_keys + is_list)
            if key is not None:
                found[number] = key
    return found


def _count_pairs(data: bytes) -> int:
    """Return the number of colons directly after a quote."""
    values: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
    is_colon, is_quote = np.empty(_STEP, np.bool_), np.empty(_STEP, np.bool_)
    number = 0
    for start in range(0, max(0, len(values) - 1), _STEP):
        after = values[start + 1 : start + 1 + _STEP]
        colons, quotes = is_colon[: len(after)], is_quote[: len(after)]
        np.equal(after, _COLON, out=colons)
        np.equal(values[start : start + len(after)], _QUOTE, out=quotes)
        colons &= quotes
        number += int(np.count_nonzero(colons))
    return number


def _estimate_keys(records: Sequence[Any]) -> int:
    """Return the number of keys of records and their messages; -1 if there are other records."""
    try:
        messages = [*chain.from_iterable([record["messages"] for record in records])]
    except (KeyError, TypeError, IndexError):
        messages = []
    if {*map(type, records)} == _ONLY_OBJECTS and {*map(type, messages)} <= _ONLY_OBJECTS:
        return sum(map(len, records)) + sum(map(len, messages))
    return -1


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

"""Keys that occur several times in one JSON object.

Parsers keep only the last value, so the others would disappear. To find them without a second parse
of everything:

1. The keys of each line are counted: the colons after a quote that is not escaped. The number is
   never too small, and only unusual texts make it too large.
2. The sum for some lines is compared with the keys of their records and messages, and if it is
   different, the number for each line. If it is equal, no key is repeated.
3. Otherwise, a line that has other keys than its record is parsed again by Python, which reports
   all keys.

Cost: a comparison of the bytes, and a sum of lengths for the records; about 1 % of a build.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COLON, _QUOTE, _BACKSLASH = b':"\\'
_STEP = 1 << 17
"""Bytes that are compared at once; the results fit into the cache of a processor."""
_LAST_WHITESPACE = 32
_NUMBER_OF_KEYS, _VALUES = dict.__len__, dict.values
_FIRST_BYTE, _OBJECTS_START = itemgetter(slice(0, 1)), {b"{"}
_BEFORE_VALUE = b" \t\r\xef\xbb\xbf"
"""Bytes that may precede a value on a line."""


class _RepeatedKeyError(Exception):
    """The first repeated key that Python's parser found."""


def find_repeated_keys(
    lines: Sequence[bytes], records: Sequence[Any], num_keys: Sequence[int]
) -> dict[int, str]:
    """Return the lines with an object that has a key several times, by number, with the key.

    Args:
        lines: The lines, without their newlines.
        records: What was parsed from each line; a list on a line may be under the key `messages`.
            Other values than objects and lists are ignored.
        num_keys: The result of `count_keys_of_lines` for the lines.
    """
    # A list on a line has no key `messages`, so the sum could hide a repeated key elsewhere.
    if {*map(_FIRST_BYTE, lines)} == _OBJECTS_START and sum(num_keys) == _sum_upper_keys(records):
        return {}
    found: dict[int, str] = {}
    for number, (line, record, of_line) in enumerate(zip(lines, records, num_keys, strict=True)):
        if not isinstance(record, dict | list):
            continue
        is_list = line[:1] != b"{" and line.lstrip(_BEFORE_VALUE)[:1] == b"["
        at_most = of_line + (is_list and isinstance(record, dict))  # with the key `messages`
        # Few records have deeper objects.
        if isinstance(record, dict) and _count_upper_keys(record) == at_most:
            continue
        key = find_repeated_key(line, record, at_most)
        if key is not None:
            found[number] = key
    return found


def _sum_upper_keys(records: Sequence[Any]) -> int:
    """Return the number of keys of records and of objects in lists, or -1 for other records.

    It is the sum of `_count_upper_keys` for records that have only lists of objects, as most do.
    """
    try:
        # The functions of dicts accept nothing else.
        values = chain.from_iterable(map(_VALUES, records))
        objects = chain.from_iterable(values)
        return sum(map(_NUMBER_OF_KEYS, chain(records, objects)))
    except TypeError:
        return -1


def _count_upper_keys(record: dict[str, Any]) -> int:
    """Return the number of keys of a record and of the objects in its lists."""
    number = len(record)
    for value in record.values():
        if type(value) is list:
            for item in value:
                if type(item) is dict:
                    number += len(item)
    return number


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
    found: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for start in range(0, max(0, len(values) - 1), _STEP):
        after = values[start + 1 : start + 1 + _STEP]
        is_before = after == _COLON
        is_before &= values[start : start + len(after)] <= _QUOTE
        found.append(np.flatnonzero(is_before) + start)
    return np.concatenate(found)


def count_keys(value: Any) -> int:
    """Return the number of keys of all objects in a parsed value."""
    number = 0
    values = [value]
    for item in values:  # it becomes longer meanwhile
        if type(item) is dict:
            number += len(item)
            values += item.values()
        elif type(item) is list:
            values += item
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

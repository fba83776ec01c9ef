"""Options for reading records, and helpers of all formats."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.json_values import describe_json_type
from sftprep.core.repeated_keys import find_repeated_key
from sftprep.records.roles import PASSED_ROLES
from sftprep.sources.readers.to_jsonl import OPAQUE

Record = dict[str, Any]

TRANSFORM = "transform"
"""The name of the setting for a function that converts records of any other format."""

# Maps every digit to "0", so that a substring search finds long numbers: five times as fast as a
# regular expression.
_DIGITS_TO_0 = bytes(48 if 48 <= byte < 58 else byte for byte in range(256))
_LONG_NUMBER = b"0" * 19
_UPPER_HALVES, _UPPER_HALVES_OF_DIGITS = np.uint32(0xF0F0F0F0), np.uint32(0x30303030)
_STEP = 1 << 15
"""Words that are examined at once; the results fit into the cache of a processor."""


class InvalidRecord(Exception):
    """An error for a record with content outside its format.

    The message is stored in the file of rejected records, so it must not contain references to
    settings.

    Args:
        reason: A short stable name such as `bad_row`, which the manifest counts.
        message: What is wrong with the record, and where in it.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """How the records of one input are read.

    Attributes:
        renames: Keys to rename, as pairs of old and new name.
        text_field: The key of plain text.
        chat: Whether requests and answers are read as turns; there is a chat template.
        as_chat: Whether this includes a prompt and a completion that are strings.
        tool_calls: Whether the template shows `tool_calls`.
        tool_parameters: Whether the template reads the parameters of tools one by one.
        tool_schemas: Whether the template shows parameters only if they are in a JSON schema.
        shown_roles: The roles among `roles.PASSED_ROLES` that the template shows.
        drop_images: Whether images are removed; otherwise a record with images is rejected.
        system: The system message of conversations without one, or None.
        template_kwargs: The variables of the template for all conversations, or None.
    """

    renames: tuple[tuple[str, str], ...] = ()
    text_field: str = "text"
    chat: bool = True
    as_chat: bool = False
    tool_calls: bool = True
    tool_parameters: bool = False
    tool_schemas: bool = False
    shown_roles: frozenset[str] = PASSED_ROLES
    drop_images: bool = False
    system: str | None = None
    template_kwargs: dict[str, Any] | None = None


def rename_keys(
    record: Record, renames: tuple[tuple[str, str], ...], replaced: Record | None = None
) -> Record:
    """Rename keys of a record in place, and return it.

    A renamed key replaces a key that already has the name, because the user asked for it. A key
    that does not exist renames nothing, and null replaces nothing.

    Args:
        record: The record.
        renames: Pairs of old and new name.
        replaced: Receives the values that others replace, by their original key.

    Example:
        {"question": "a", "text": "b", "output": "c"}, (("question", "text"), ("output", "text"))
            ->  {"text": "c"}, with replaced = {"question": "a", "text": "b"}
    """
    values = [(source, to, record.pop(source)) for source, to in renames if source in record]
    original: dict[str, str] = {}  # the original key of each renamed value, by its new key
    for source, target, value in values:
        present = record.get(target)
        if value is None and present is not None:
            continue
        if replaced is not None and present is not None and present != value:
            replaced[original.get(target, target)] = present
        record[target] = value
        original[target] = source
    return record


def has_long_number(line: bytes) -> bool:
    """Return whether a line may contain an integer beyond 64 bits."""
    return _LONG_NUMBER in line.translate(_DIGITS_TO_0)


def find_long_numbers(data: bytes) -> set[int]:
    """Return the numbers of the lines with long numbers, from 0.

    They are those for which `has_long_number` holds. A number of 19 digits contains four successive
    words of four digits, so the block is examined word by word.
    """
    words: NDArray[np.uint32] = np.frombuffer(data, np.uint32, len(data) // 4)
    starts: list[int] = []
    for first in range(0, len(words), _STEP):
        step = words[first : first + _STEP + 3]
        # The upper half of each byte is that of "0" to "9", which few other characters have.
        are_digits = (step & _UPPER_HALVES) == _UPPER_HALVES_OF_DIGITS
        pairs = are_digits[:-1] & are_digits[1:]
        starts += ((first + np.flatnonzero(pairs[:-2] & pairs[2:])) * 4).tolist()
    found: set[int] = set()
    number = end = 0  # the number of line breaks before `end`, which is the end of a line
    for start in starts:
        # The part of the line in which a number of 19 digits may contain these 16.
        if start >= end and has_long_number(data[max(0, start - 3) : start + 19]):
            number += data.count(b"\n", end, start)
            found.add(number)
            end = data.find(b"\n", start)
            if end < 0:
                break
    return found


def parse_exactly(line: bytes, record: Record) -> Record:
    """Return a record with all digits of its integers.

    orjson turns integers beyond 64 bits into floats, so lines that may have some are parsed again
    by Python.

    Args:
        line: A line that orjson accepts.
        record: The record that orjson made of it.

    Raises:
        InvalidRecord: Python does not accept the line.
    """
    if not has_long_number(line):
        return record
    try:
        exact: Record = json.loads(line)
    except (ValueError, RecursionError) as error:  # Python reads at most 4,300 digits
        what = "a number has too many digits, or values are nested too deeply"
        raise InvalidRecord("bad_json", what) from error
    return exact


def require_string(value: Any, label: str) -> str:
    """Return a value unchanged, or raise InvalidRecord if it is not a string.

    Args:
        value: The value.
        label: What the value is, for the message.

    Raises:
        InvalidRecord: It is anything else.
    """
    if type(value) is str:
        return value
    if value is None:
        raise InvalidRecord("bad_row", f"{label} is null")
    kind = opaque_kind(value)
    if kind is not None:
        raise InvalidRecord("bad_type", f"{label} holds {kind}, not text")
    raise InvalidRecord("bad_type", f"{label} is {describe_json_type(value)}, not text")


def opaque_kind(value: Any) -> str | None:
    """Return what a column of a table holds that is not JSON, or None.

    Such a value is replaced when the table is read, and functions of the user do not get it.

    Example:
        {"$opaque": "bytes"}  ->  "bytes"
    """
    is_opaque = type(value) is dict and value.keys() == {OPAQUE}
    return str(value[OPAQUE]) if is_opaque else None


def repeated_key_error(key: str) -> InvalidRecord:
    """Return the error for a record in which an object has a key several times."""
    return InvalidRecord("repeated_key", f"an object has the key {key!a} several times")


def load_json(text: str, label: str) -> Any:
    """Return the value of JSON text within a record.

    Args:
        text: The text.
        label: What the text is, for the message.

    Raises:
        ValueError, RecursionError: The text is not JSON, or nested too deeply.
        InvalidRecord: An object in it has a key several times.
    """
    # The standard library, not orjson: it reads integers of any size and keeps their digits.
    value = json.loads(text)
    check_keys(text, value, label)
    return value


def check_keys(text: str, value: Any, label: str) -> None:
    """Raise InvalidRecord if an object in JSON text has a key several times.

    Args:
        text: The text.
        value: What a parser made of it.
        label: What the text is, for the message.
    """
    key = find_repeated_key(text, value)
    if key is not None:
        raise InvalidRecord(
            "repeated_key", f"an object in {label} has the key {key!a} several times"
        )


def parse_if_string(value: Any, label: str) -> Any:
    """Parse the JSON in a string; return any other value unchanged.

    Args:
        value: The value.
        label: What the value is, for the message.

    Raises:
        InvalidRecord: The string is not JSON, or repeats a key.
    """
    if not isinstance(value, str):
        return value
    try:
        return load_json(value, label)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRecord("bad_tool", f"{label} is a string that is not JSON: {why}") from error

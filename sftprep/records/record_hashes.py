"""Hashes of records: to find duplicates, and to hold records out.

1. A record is what its format reads of it, or the values of the keys that the user named; of these,
   turns with calls are what is read of them. Ids, dates and scores differ between records that are
   trained on alike.
2. It is read as for a template that shows everything, so that the hash does not depend on the
   tokenizer. Of a message, only keys count that some template is known to show, or that this one
   mentions. The ids of calls are replaced by their positions in the conversation, or removed where
   the results are in the order of the calls.
3. It is written as JSON with sorted keys, which is hashed with and without whitespace.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from sftprep.core.omissions import NO_COMPARED_KEY
from sftprep.core.types import Counts, Example, Message, PretokenizedRow
from sftprep.records.formats import record_reader
from sftprep.records.messages import read_messages
from sftprep.records.options import InvalidRecord, Record, RecordOptions, parse_exactly
from sftprep.records.roles import SHOWN_KEYS
from sftprep.records.switches import SWITCH_KEYS
from sftprep.sources.readers.jsonl import parse_line, split_lines

HASHES_VERSION = 3
"""Incremented when the same record has another hash than before, so that hashes of older spills are
not compared with new ones."""

_MESSAGE_KEYS = SHOWN_KEYS | SWITCH_KEYS | {"role", "content", "images"}
"""Keys of messages that some template shows, or that specify what is trained."""
_NOT_COMPARED = (
    *("line", "bare", "images_dropped", "unread_texts", "unread_switch"),
    "system_added",
)
_CALL_KEYS_NOT_COMPARED = frozenset({"id", "index", "type"})
_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)
_OPTIONS = orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY


class RecordHasher:
    """Hashes of the records of one format.

    Args:
        format_name: The format.
        options: How records are read.
        keys: The keys that are compared; empty for everything that the format reads.
        template: The source of the chat template, or "".
    """

    def __init__(
        self, format_name: str, options: RecordOptions, keys: tuple[str, ...], template: str
    ) -> None:
        options = dataclasses.replace(
            options,
            chat=True,
            tool_calls=True,
            shown_roles=RecordOptions().shown_roles,
            # Settings are no part of a record: others must not hold out other records.
            system=None,
            template_kwargs=None,
        )
        self._read, self._keys = record_reader(format_name, options), keys
        self._options = options
        self._words = frozenset(re.findall(r"\w+", template))

    def hash_records(
        self, data: bytes, line_of: NDArray[np.int64], counts: Counts
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Return the hashes of the record of each sequence, with and without whitespace.

        Args:
            data: The lines of records.
            line_of: int64 [n]; the line of the record of each sequence.
            counts: Receives warnings about records without a key by which they are compared.

        Returns:
            Two arrays, uint64 [n].
        """
        lines = split_lines(data)
        numbers, record_of = np.unique(line_of, return_inverse=True)
        records: list[bytes] = []
        for number in numbers.tolist():
            record = _parse(lines[number])
            for key in self._keys:
                if record.get(key) is None:
                    counts.warn(f"{NO_COMPARED_KEY}{key}", number)
            records.append(self._to_bytes(record, lines[number]))

        def hash_all(texts: list[bytes]) -> NDArray[np.uint64]:
            hashes = [xxhash.xxh3_64_intdigest(text) for text in texts]
            return np.array(hashes, dtype=np.uint64)[record_of]

        return hash_all(records), hash_all([_without_whitespace(record) for record in records])

    def to_bytes(self, line: bytes) -> bytes:
        """Return the bytes of a record to hash.

        Example:
            b'{"id": 7, "text": "a b"}'  ->  b'{"text":"a b"}'
        """
        return self._to_bytes(_parse(line), line)

    def _to_bytes(self, record: Record, line: bytes) -> bytes:
        if any(record.get(key) is not None for key in self._keys):
            return _write([self._compared_value(record.get(key), key) for key in self._keys])
        try:
            return _write(self._content_of(self._read(record, 0)))
        except InvalidRecord:  # the templates that show everything differ from this
            return _write(_parse(line))  # reading may have changed the record

    def _compared_value(self, value: Any, key: str) -> Any:
        """Return the value of a key that the user named; turns with calls are without their ids."""
        if not (isinstance(value, list) and value and all(isinstance(t, dict) for t in value)):
            return value
        try:
            messages = read_messages(copy.deepcopy(value), key, self._options)
        except InvalidRecord:  # they are not turns
            return value
        if not _have_calls(messages):
            return value
        return [self._shown(message) for message in _number_calls(messages)]

    def _content_of(self, example: Example) -> dict[str, Any]:
        content = {
            field.name: getattr(example, field.name)
            for field in dataclasses.fields(example)
            if field.name not in _NOT_COMPARED
        }
        for name in ("messages", "prompt_messages"):
            if content[name] is not None:
                content[name] = [self._shown(message) for message in _number_calls(content[name])]
        if isinstance(example.pretokenized, PretokenizedRow):
            content["pretokenized"] = dataclasses.astuple(example.pretokenized)
        return {name: value for name, value in content.items() if value is not None}

    def _shown(self, message: Message) -> Message:
        """Return the keys of a message shown by some template, without empty values.

        An empty content is a turn of its own, but not alongside calls.
        """
        empty: tuple[Any, ...] = (None, [], {}, "") if message.get("tool_calls") else (None, [], {})
        return {
            key: value
            for key, value in message.items()
            if (key in _MESSAGE_KEYS or (key in self._words and key != "id")) and value not in empty
        }


def _number_calls(messages: list[Message]) -> list[Message]:
    """Return messages whose ids of calls and results are numbers, or absent.

    An id becomes the position of its first occurrence. If the results have the ids of the calls in
    order, or there are none, the order says as much as the ids, so these are removed.

    Example:
        ids of calls: "x7", "x9", ids of results: "x9", "x7"  ->  0, 1 and 1, 0
    """
    if not _have_calls(messages):
        return messages
    number_of: dict[str, int] = {}
    numbers_of_calls: list[int | None] = []
    numbers_of_results: list[int | None] = []

    def to_number(identifier: Any) -> int | None:
        if identifier in (None, ""):
            return None
        return number_of.setdefault(str(identifier), len(number_of))

    numbered: list[Message] = []
    for message in messages:
        copied = dict(message)
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            copied["tool_calls"] = copied_calls = []
            for call in calls:
                if not isinstance(call, dict):
                    copied_calls.append(call)
                    continue
                numbers_of_calls.append(to_number(call.get("id")))
                rest = {k: v for k, v in call.items() if k not in _CALL_KEYS_NOT_COMPARED}
                copied_calls.append({"id": numbers_of_calls[-1], **rest})
        if "tool_call_id" in message:
            numbers_of_results.append(to_number(message["tool_call_id"]))
            copied["tool_call_id"] = numbers_of_results[-1]
        numbered.append(copied)
    are_named = {*numbers_of_results} != {None}
    if are_named and numbers_of_results != numbers_of_calls[: len(numbers_of_results)]:
        return numbered
    return [_without_ids(message) for message in numbered]


def _have_calls(messages: list[Message]) -> bool:
    """Return whether a message has calls, or is the result of a call."""
    return any(message.get("tool_calls") or "tool_call_id" in message for message in messages)


def _without_ids(message: Message) -> Message:
    kept = {key: value for key, value in message.items() if key != "tool_call_id"}
    for call in kept.get("tool_calls") or ():
        if isinstance(call, dict):
            del call["id"]
    return kept


def _parse(line: bytes) -> Record:
    record = parse_line(line, 0)
    assert isinstance(record, dict), "only records that were read have a sequence"
    try:
        return parse_exactly(line, record)
    except InvalidRecord:  # nested too deeply for Python, in a record without tools
        return record


def _write(value: Any) -> bytes:
    """Return a value as JSON with sorted keys."""
    try:
        return orjson.dumps(value, option=_OPTIONS)
    except TypeError:  # an integer beyond 64 bits, or a lone surrogate from JSON inside JSON
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "surrogatepass")


def _without_whitespace(record: bytes) -> bytes:
    def remove(escape: re.Match[bytes]) -> bytes:
        return b"" if escape[1] in b"nrt" else escape[0]

    return _ESCAPE.sub(remove, record.translate(None, b" \t\r"))

"""Inspection of how an input is read, by its first records.

It finds the columns that are not read, and what may be wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from sftprep.core.notices import Notice
from sftprep.core.types import Example
from sftprep.errors import FormatError, setting, source_name
from sftprep.records.checks.unread_columns import UnreadColumns
from sftprep.records.conversations import ANSWER_KEYS
from sftprep.records.formats import FORMATS, read_record
from sftprep.records.images import is_filled
from sftprep.records.keys.pair_keys import ANSWER_REASONING_KEYS
from sftprep.records.options import (
    InvalidRecord,
    Record,
    RecordOptions,
    rename_keys,
)
from sftprep.records.unread_turns import find_replaced

_MESSAGE_KEYS = ("tools", "functions", "video", "videos", "audio", "audios")
"""Keys of a message with a meaning that is not read."""

_SHOWN_COLUMNS = 12
_EXAMPLE_LENGTH = 40


@dataclass(frozen=True, slots=True)
class SourceReading:
    """How the records of an input are read.

    Attributes:
        format: The name of the format.
        not_read: The columns that are not read: of its first records before pass 1, and of all
            records after it.
        trained: What is trained.
        template: The chat template that renders the records: its file, or the tokenizer that has
            it; "" if they are not rendered by one.
        notices: What the user should know about it.
        keys: All keys of its first records, before keys are renamed, if the settings name some.
        is_detected: Whether a record could be read, so that the format is known.
    """

    format: str
    not_read: tuple[str, ...] = ()
    trained: str = ""
    template: str = ""
    notices: tuple[Notice, ...] = ()
    keys: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    is_detected: bool = True

    @property
    def shown_format(self) -> str:
        """The format, as it is shown to the user."""
        return self.format if self.is_detected else "not detected"

    def add_columns(self, columns: Iterable[str]) -> SourceReading:
        """Return the reading with further columns that are not read."""
        return replace(self, not_read=tuple(dict.fromkeys((*self.not_read, *columns))))


def inspect_records(
    records: Sequence[Record],
    format_name: str,
    options: RecordOptions,
    *,
    is_table: bool,
) -> SourceReading:
    """Return how the first records of an input are read.

    Args:
        records: The records, which are not modified.
        format_name: Their format.
        options: How they are read.
        is_table: Whether their types come from a table, in which each object has all keys.
    """
    not_read: dict[str, bool] = {}  # column -> whether it appears to carry meaning
    columns = UnreadColumns(format_name, options)
    has_nulls = has_switches = False
    functions_of: dict[frozenset[str], set[str]] = {}  # by the keys of arguments with nulls
    notices: list[Notice] = []
    for record in records:
        example = _read_copy(record, format_name, options)
        if example is None:
            continue
        renamed = rename_keys(dict(record), options.renames)
        for key, is_meaningful in chain(
            columns.find(renamed, example, renamed), _keys_of_messages(renamed, format_name)
        ):
            not_read[key] = not_read.get(key, False) or is_meaningful
        not_read |= dict.fromkeys(find_replaced(example), True)
        has_switches |= example.weights is not None
        has_nulls |= is_table and any(map(_holds_null, _tool_values(example)))
        for name, keys in _calls_with_nulls(example):
            functions_of.setdefault(keys, set()).add(name)
        if not notices:
            notices += _joined_texts(example, format_name, options)
    meaningful = [key for key, is_meaningful in not_read.items() if is_meaningful]
    renames = _context_map(meaningful, format_name)
    if renames is not None:
        names = ", ".join(map(repr, meaningful[:_SHOWN_COLUMNS]))
        text = f"not read, although the names suggest content or a switch of training: {names}"
        notices.append(Notice(text, f"try: {setting('map', renames)}"))
    # Files that were written from a table have such objects as well: calls of different functions
    # with the same keys.
    if has_nulls or any(len(names) > 1 for names in functions_of.values()):
        notices.append(
            Notice(
                "every tool has the arguments of all tools, with null for those that it does not"
                " have, as the columns of a table require, and the chat template shows them",
                f"try: {setting('strip_nulls', True)}",
            )
        )
    trained = "the turns that the switches of the records select" if has_switches else ""
    return SourceReading(format_name, tuple(not_read), trained, notices=tuple(notices))


def check_answers(
    file: str, records: Sequence[Record], format_name: str, options: RecordOptions
) -> None:
    """Check that some conversation has a message of the assistant.

    Raises:
        FormatError: None of them has.
    """
    if FORMATS[format_name].kind != "conversation":
        return
    examples = [_read_copy(record, format_name, options) for record in records]
    read = [example for example in examples if example is not None]
    if not read or any(_has_target(example) for example in read):
        return
    raise FormatError(
        f"none of the first {len(read)} records of {source_name(file)} has a message of the"
        " assistant, so there is nothing to learn [no_target]",
        remedy=[
            "add the answers as messages, or as text under one of the keys"
            f" {', '.join(ANSWER_KEYS)} (with {ANSWER_REASONING_KEYS[0]}, if there is any)",
            f"train on the prompts with {setting('quality_checks', 'keep')}",
        ],
    )


def _has_target(example: Example) -> bool:
    return any(message["role"] == "assistant" for message in example.messages or ())


def _read_copy(record: Record, format_name: str, options: RecordOptions) -> Example | None:
    try:
        return read_record(copy.deepcopy(record), 0, format_name, options)
    except (InvalidRecord, RecursionError):
        return None  # reported by pass 1, with its line


def _keys_of_messages(record: Record, format_name: str) -> Iterator[tuple[str, bool]]:
    """Yield the keys of messages with a meaning that is not read."""
    kind = FORMATS[format_name]
    if kind.kind == "tokens":
        return
    values = [record[key] for key in kind.keys if isinstance(record.get(key), list)]
    for message in (item for value in values for item in value if isinstance(item, dict)):
        for key in _MESSAGE_KEYS:
            if is_filled(message.get(key)):
                yield f"{key} of a message", True


def _tool_values(example: Example) -> Iterator[Any]:
    yield example.tools
    for message in example.messages or ():
        yield message.get("tool_calls")


def _calls_with_nulls(example: Example) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield the names and the keys of the arguments of calls with a null among them."""
    for message in example.messages or ():
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") or call if isinstance(call, dict) else {}
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, dict) and None in arguments.values():
                yield str(function.get("name")), frozenset(arguments)


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return None in value.values() or any(map(_holds_null, value.values()))
    return isinstance(value, list) and any(map(_holds_null, value))


def _joined_texts(example: Example, format_name: str, options: RecordOptions) -> Iterator[Notice]:
    """Yield the notice of prompts and completions joined without a chat template."""
    if not options.chat or FORMATS[format_name].kind != "prompt" or example.prompt is None:
        return
    joined = f"{example.prompt[-_EXAMPLE_LENGTH:]}{(example.completion or '')[:_EXAMPLE_LENGTH]}"
    yield Notice(
        "prompt and completion are strings, so they are joined as they are, without the chat"
        " template",
        f"to read them as a user and an assistant, try: {setting('as_chat', True)}",
        repr(joined),
    )


def _context_map(keys: Sequence[str], format_name: str) -> str | None:
    """Return the new names of a pair with which its context is read, or None."""
    if FORMATS[format_name].kind != "pair" or "context" not in keys or "/" not in format_name:
        return None
    request, answer = format_name.split("/")
    if {"instruction", "input", "output"} & ({*keys} | {request, answer}):
        return None  # a key that is replaced would be lost
    return f"{request}=instruction,context=input,{answer}=output"

"""Inspection of how an input is read, by its first records.

It finds the columns that are not read, and what may be wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sftprep.core.notices import Notice
from sftprep.core.types import Example
from sftprep.errors import FormatError, setting, source_name
from sftprep.records.conversations import ANSWER_KEYS, ANSWER_REASONING_KEYS, CHAT_KEYS
from sftprep.records.formats import FORMATS, Format, detect_format, keys_of, read_record
from sftprep.records.images import IMAGE_KEYS, is_filled
from sftprep.records.options import (
    TRANSFORM,
    InvalidRecord,
    Record,
    RecordOptions,
    rename_keys,
)

_MEANINGFUL = (
    frozenset(key for kind in FORMATS.values() for key in kind.keys | kind.optional)
    | {"role", "code", "choices", "options", "label", "hint", "explanation", "rationale"}
    | {"cot", "think", "thought", "chosen", "rejected", "answers", "solutions", "generations"}
    | {"video", "videos", "audio", "audios"}
)
"""Keys whose values are usually meant to be trained on, or to be shown to the model."""

_MESSAGE_KEYS = ("tools", "functions", "video", "videos", "audio", "audios")
"""Keys of a message with a meaning that is not read."""

_SHOWN_COLUMNS = 12
_EXAMPLE_LENGTH = 40


@dataclass(frozen=True, slots=True)
class SourceReading:
    """How the records of an input are read.

    Attributes:
        format: The name of the format.
        not_read: The columns of its first records that are not read.
        trained: What is trained.
        template: The chat template that renders the records: its file, or the tokenizer that has
            it; "" if they are not rendered by one.
        notices: What the user should know about it.
    """

    format: str
    not_read: tuple[str, ...] = ()
    trained: str = ""
    template: str = ""
    notices: tuple[Notice, ...] = ()


def inspect_records(
    records: Sequence[Record], format_name: str, options: RecordOptions, *, is_table: bool
) -> SourceReading:
    """Return how the first records of an input are read.

    Args:
        records: The records, which are not modified.
        format_name: Their format.
        options: How they are read.
        is_table: Whether their types come from a table, in which each object has all keys.
    """
    not_read: dict[str, bool] = {}  # column -> whether it appears to carry meaning
    has_nulls = has_switches = False
    notices: list[Notice] = []
    for record in records:
        example = _read_copy(record, format_name, options)
        if example is None:
            continue
        renamed = rename_keys(dict(record), options.renames)
        for key, is_meaningful in _not_read(renamed, example, format_name, options):
            not_read[key] = not_read.get(key, False) or is_meaningful
        has_switches |= example.weights is not None
        has_nulls |= is_table and any(map(_holds_null, _tool_values(example)))
        if not notices:
            notices += _joined_texts(example, format_name, options)
    meaningful = [key for key, is_meaningful in not_read.items() if is_meaningful]
    if meaningful:
        names = ", ".join(map(repr, meaningful[:_SHOWN_COLUMNS]))
        text = f"not read, although the names suggest content: {names}"
        notices.append(Notice(text, _remedy(meaningful, format_name)))
    if has_nulls:
        notices.append(
            Notice(
                "the columns of the table give every tool the arguments of all tools, with null for"
                " those that it does not have, and the chat template shows them",
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


def _not_read(
    record: Record, example: Example, format_name: str, options: RecordOptions
) -> Iterator[tuple[str, bool]]:
    """Yield the unread columns of a record.

    Each comes with whether it appears to carry meaning.
    """
    if any(record.get(key) is None for key in keys_of(format_name, options)):
        # A conversation under the key of another layout; keys were renamed before.
        format_name = detect_format(record, replace(options, renames=())) or format_name
    kind: Format = FORMATS[format_name]
    certain = kind.keys | (kind.optional & (CHAT_KEYS | {"history"}))
    if kind.kind == "text":
        certain |= {options.text_field}
    if example.prompt is not None:  # joined as text
        certain -= {"tools", "functions", "chat_template_kwargs"}
    if kind.kind == "tokens":
        certain |= kind.optional | {"text"}
    texts = "\n".join(_strings(example))
    for key, value in record.items():
        if (
            not is_filled(value)
            or key in IMAGE_KEYS
            or (key in certain and not _is_unused(key, value, texts))
        ):
            continue
        # Many data sets repeat a part of the conversation in another column.
        is_repeated = isinstance(value, str) and value.strip() in texts
        if not (is_repeated and key in kind.optional):
            yield key, key.lower() in _MEANINGFUL and not is_repeated
    for message in _raw_messages(record, kind):
        for key in _MESSAGE_KEYS:
            if is_filled(message.get(key)):
                yield f"{key} of a message", True


def _is_unused(key: str, value: Any, texts: str) -> bool:
    """Return whether a system prompt or a history is not used.

    The conversation may have another system prompt, and a history may be in another layout.
    """
    if key == "history":
        return not all(text.strip() in texts for text in _strings(value))
    return key.startswith("system") and isinstance(value, str) and value.strip() not in texts


def _raw_messages(record: Record, kind: Format) -> list[dict[str, Any]]:
    values = [record[key] for key in kind.keys if isinstance(record.get(key), list)]
    if kind.kind == "tokens":
        return []
    return [message for value in values for message in value if isinstance(message, dict)]


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in the contents of an example."""
    if isinstance(value, Example):
        value = [value.text, value.prompt, value.completion, value.messages, value.tools]
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _tool_values(example: Example) -> Iterator[Any]:
    yield example.tools
    for message in example.messages or ():
        yield message.get("tool_calls")


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
        f" template: {joined!r}",
        f"to read them as a user and an assistant, try: {setting('as_chat', True)}",
    )


def _remedy(keys: Sequence[str], format_name: str) -> str:
    """Return a remedy for unread columns."""
    if FORMATS[format_name].kind == "pair" and "context" in keys and "/" in format_name:
        request, answer = format_name.split("/")
        return f"try: {setting('map', f'{request}=instruction,context=input,{answer}=output')}"
    return f"if they belong to the text, add them with {setting(TRANSFORM, 'FILE.py:NAME')}"

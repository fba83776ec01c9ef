"""Suggestions for records without a format: flags chosen by their keys."""

from __future__ import annotations

import shlex
from typing import Any

from sftprep.errors import FormatError, setting, source_name
from sftprep.records.formats import FORMATS, is_turn
from sftprep.records.messages import read_messages
from sftprep.records.options import (
    TRANSFORM,
    InvalidRecord,
    Record,
    RecordOptions,
    rename_keys,
)
from sftprep.records.pair_keys import PAIRS, find_pair, split_key

_REQUEST_WORDS = {request for request, _ in PAIRS} | {"ask", "task", "request", "src"}
_ANSWER_WORDS = {answer for _, answer in PAIRS} | {
    "reply",
    "label",
    "code",
    "summary",
    "result",
    "tgt",
}
_CONVERSATION_WORDS = {"data", "dialog", "dialogue", "conversation", "chat", "utterances"}
_NOT_ANSWERS = {"system", "reasoning", "thinking", "thought", "rationale", "meta", "source"}
_ID_WORDS = {"id", "uid", "uuid"}
_MAPPED_PAIR = ("instruction", "output")


def unknown_format(file: str, record: Record, options: RecordOptions) -> FormatError:
    """Return the error for a file with records of no known format.

    Its last line is what to try for the keys of these records.

    Args:
        file: The file.
        record: One of its records.
        options: The options with which it was read.
    """
    record = rename_keys(dict(record), options.renames) if options.renames else record
    known = ", ".join("/".join(sorted(kind.keys)) for kind in FORMATS.values())
    keys = ", ".join(map(repr, list(record)[:12])) or "none"
    return FormatError(
        f"no format fits {source_name(file)}: its records have the keys {keys}"
        + (f" after {setting('map')}" if options.renames else "")
        + (_wrong_types(record) or f"; known keys are {known}"),
        remedy=suggest(record, options),
    )


def _wrong_types(record: Record) -> str:
    """Return which values of a known pair of keys are neither text nor messages; "" if none."""
    pair = find_pair(record)
    if pair is None:
        return ""
    wrong = [key for key in pair if not is_turn(record[key])]
    kinds = ", ".join(f"{key!r} is of type {type(record[key]).__name__}" for key in wrong)
    return f"; {kinds}, not a text or a list of messages" if wrong else ""


def suggest(record: Record, options: RecordOptions) -> list[str]:
    """Return the remedies for a record without a format, the best first."""
    if "role" in record and not isinstance(record["role"], (list, dict)):
        return [
            "group the messages: each record is a single message, and a conversation is a record"
            ' {"messages": [...]}'
        ]
    renames = _conversation_map(record, options) or _pair_map(record)
    if renames is not None:
        text = ",".join(f"{source}={target}" for source, target in renames.items())
        return [f"try: {setting('map', shlex.quote(text))}"]
    texts = [key for key, value in record.items() if isinstance(value, str)]
    has_answer = any(_words(key) & _ANSWER_WORDS for key in record if key not in texts)
    if (
        len(texts) == 1
        and not has_answer
        and not any(isinstance(value, (list, dict)) for value in record.values())
    ):
        return [f"try: {setting('text_field', shlex.quote(texts[0]))}"]
    return [_transform_example(record)]


def _conversation_map(record: Record, options: RecordOptions) -> dict[str, str] | None:
    """Find a key with a conversation as its value, to be renamed to "messages"."""
    for key, value in record.items():
        # Other lists of texts are choices, references, or turns of one speaker.
        is_texts = isinstance(value, list) and bool(value) and isinstance(value[0], str)
        if isinstance(value, (list, str)) and not (
            is_texts and not _words(key) & _CONVERSATION_WORDS
        ):
            try:
                if len(read_messages(value, key, options)) > 1:
                    return {key: "messages"}
            except InvalidRecord:
                continue
    return None


def _pair_map(record: Record) -> dict[str, str] | None:
    """Return the names of a request and its answer, renamed to a known pair."""
    texts = {key: _words(key) for key, value in record.items() if isinstance(value, str)}
    request = next((key for key, words in texts.items() if words & _REQUEST_WORDS), None)
    answer = next(
        (key for key, words in texts.items() if words & _ANSWER_WORDS and key != request), None
    )
    if request is None or answer is None:
        return None
    renames = {request: _MAPPED_PAIR[0], answer: _MAPPED_PAIR[1]}
    context = next((key for key, words in texts.items() if words & {"context", "passage"}), None)
    if context is not None and context not in renames:
        renames[context] = "input"
    renames = {source: target for source, target in renames.items() if source != target}
    # A key that is replaced would be lost.
    return renames if not set(renames.values()) & record.keys() else None


def _words(key: str) -> set[str]:
    """Return the words of a key, in lower case.

    "Full_Answer" has "full" and "answer". A key of ids has none: its value is not text.

    A key of ids has none, because its value is not a text.
    """
    words = split_key(key) | {key.strip().lower()}
    return set() if words & _ID_WORDS else words


def _text_of(path: str, value: Any) -> str:
    """Return the expression for a value as text; of a list of texts, the first one is used."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        return f"{path}[0]"
    return path if isinstance(value, (str, dict)) else f"str({path})"


def _transform_example(record: Record) -> str:
    """Return the setting for a transform, with an example for the keys of a record."""
    paths = {_text_of(f"record[{key!r}]", value): key for key, value in record.items()}
    paths |= {
        _text_of(f"record[{key!r}][{inner!r}]", item): inner
        for key, value in record.items()
        if isinstance(value, dict)
        for inner, item in value.items()
    }
    # The names decide first, then the order of the texts.
    texts = [
        f"record[{key!r}]"
        for key, value in record.items()
        if isinstance(value, str) and not _words(key) & _NOT_ANSWERS
    ]
    nested = [path for path in paths if path.count("][") == 1]
    others = [*texts, *nested, *paths, "record['question']", "record['answer']"]
    request = next((p for p, key in paths.items() if _words(key) & _REQUEST_WORDS), others[0])
    answer = next(
        (p for p, key in paths.items() if _words(key) & _ANSWER_WORDS and p != request),
        next(path for path in others if path != request),
    )
    return (
        f"try: {setting(TRANSFORM, 'convert.py:to_chat')}  # with this function in convert.py:\n"
        "    def to_chat(record):\n"
        '        return {"messages": [\n'
        f'            {{"role": "user", "content": {request}}},\n'
        f'            {{"role": "assistant", "content": {answer}}},\n'
        "        ]}"
    )

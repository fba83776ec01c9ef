"""Suggestions for records without a format: flags chosen by their keys."""

from __future__ import annotations

from sftprep.core.json_values import describe_json_type
from sftprep.errors import FormatError, setting, source_name
from sftprep.records.conversations import ANSWER_KEYS
from sftprep.records.formats import FORMATS, is_turn
from sftprep.records.inspection.record_paths import (
    ANSWER_WORDS,
    ID_WORDS,
    Part,
    choose_text,
    find_choices,
    find_context,
    find_texts,
    words_of,
)
from sftprep.records.inspection.transform_example import (
    CONVERSATION_WORDS,
    find_marks,
    transform_example,
)
from sftprep.records.inspection.turn_examples import (
    EDIT,
    find_history,
    find_items,
    find_task,
    roles_of,
)
from sftprep.records.keys.pair_keys import find_pair
from sftprep.records.messages import read_messages
from sftprep.records.options import (
    TRANSFORM,
    InvalidRecord,
    Record,
    RecordOptions,
    opaque_kind,
    rename_keys,
)

_MAPPED_PAIR = ("instruction", "output")


def unknown_format(file: str, record: Record, options: RecordOptions) -> FormatError:
    """Return the error for a file with records of no known format.

    Its last line is what to try for the keys of these records.

    Args:
        file: The file.
        record: One of its records.
        options: The options with which it was read.
    """
    renamed = rename_keys(dict(record), options.renames) if options.renames else record
    known = ", ".join("/".join(sorted(kind.keys)) for kind in FORMATS.values())
    keys = ", ".join(map(repr, list(renamed)[:12])) or "none"
    return FormatError(
        f"no format fits {source_name(file)}: its records have the keys {keys}"
        + (f" after {setting('map')}" if options.renames else "")
        + (_wrong_types(renamed) or f"; known keys are {known}"),
        remedy=suggest(record, options),
    )


def _wrong_types(record: Record) -> str:
    """Return which values of known keys are neither text nor messages; "" if none."""
    kinds_of_chats = [kind for kind in FORMATS.values() if kind.kind == "conversation"]
    for key in (key for kind in kinds_of_chats for key in kind.keys):
        if isinstance(record.get(key), dict):
            return f"; {key!r} is an object, not a list of messages"
    pair = find_pair(record)
    if pair is None:
        return ""
    wrong = [key for key in pair if not is_turn(record[key])]
    kinds = ", ".join(
        f"{key!r} is {opaque_kind(record[key]) or describe_json_type(record[key])}" for key in wrong
    )
    return f"; {kinds}, not a text or a list of messages" if wrong else ""


def suggest(record: Record, options: RecordOptions) -> list[str]:
    """Return the remedies for a record without a format, the best first."""
    if "role" in record and not isinstance(record["role"], (list, dict)):
        return [
            "group the messages: each record is a single message, and a conversation is a record"
            ' {"messages": [...]}'
        ]
    finders = (find_history, find_task, find_items)
    if any(find(record, options) is not None for find in finders):
        return [_transform_remedy(record, options)]  # a map would lose a text or a turn
    renames = _conversation_map(record, options) or _pair_map(record)
    if renames is not None and not all(map(_can_be_mapped, renames)):
        return [_transform_remedy(record, options)]
    if renames is not None:
        text = ",".join(f"{source}={target}" for source, target in renames.items())
        return [f"try: {setting('map', text)}"]
    texts = [key for key, value in record.items() if isinstance(value, str)]
    has_answer = any(_words(key) & ANSWER_WORDS for key in record if key not in texts)
    if (
        len(texts) == 1
        and not has_answer
        and not find_marks(record[texts[0]])
        and not any(isinstance(value, (list, dict)) for value in record.values())
    ):
        return [f"try: {setting('text_field', texts[0])}"]
    return [_transform_remedy(record, options)]


def _can_be_mapped(key: str) -> bool:
    """Return whether the setting `map`, a list of KEY=NAME with commas, can express a key."""
    return key == key.strip() and "," not in key and "=" not in key


def _conversation_map(record: Record, options: RecordOptions) -> dict[str, str] | None:
    """Find a key with a conversation as its value, to be renamed to "messages"."""
    for key, value in record.items():
        # Other lists of texts are choices, references, or turns of one speaker.
        is_texts = isinstance(value, list) and bool(value) and isinstance(value[0], str)
        if isinstance(value, (list, str)) and not (
            is_texts and not _words(key) & CONVERSATION_WORDS
        ):
            try:
                if len(read_messages(value, key, options)) > 1 and _can_be_trained(
                    key, record, options
                ):
                    return {key: "messages"}
            except InvalidRecord:
                continue
    return None


def _can_be_trained(key: str, record: Record, options: RecordOptions) -> bool:
    """Return whether turns have an answer, or the record has it."""
    roles = roles_of(record[key], options)
    return "assistant" in roles or ("user" in roles and any(map(record.get, ANSWER_KEYS)))


def _pair_map(record: Record) -> dict[str, str] | None:
    """Return the names of a request and its answer, renamed to a known pair."""
    if find_choices(record):
        return None  # they belong to the request
    texts = [text for text in find_texts(record) if len(text.path) == 1]
    request, has_request = choose_text(texts, "request", None)
    answer, has_answer = choose_text(texts, "answer", request)
    if not has_request or not has_answer:
        return None
    parts: dict[Part, str] = {"reasoning": "reasoning", "system": "system"}
    context = find_context(record, request, answer)
    others = [text for text in texts if text.part in parts and text.is_prose]
    renames: dict[str, str] = {}
    for text, target in (
        (request, _MAPPED_PAIR[0]),
        (answer, _MAPPED_PAIR[1]),
        *((text, parts[text.part]) for text in others if text.part is not None),
    ):
        if text is not None and target not in renames.values():
            renames[str(text.path[0])] = target
    if context is not None:
        renames[context] = "input"
    renames = {source: target for source, target in renames.items() if source != target}
    # A key that is replaced would be lost.
    return renames if not set(renames.values()) & record.keys() else None


def _transform_remedy(record: Record, options: RecordOptions) -> str:
    """Return the setting for a transform, with an example for a record."""
    code = transform_example(record, options)
    edited = ", edited at the marked places" if EDIT in code else ""
    lines = "\n".join(f"    {line}".rstrip() for line in code.split("\n"))
    return (
        f"try: {setting(TRANSFORM, 'convert.py:to_chat')}  # with this function in"
        f" convert.py{edited}:\n{lines}"
    )


def _words(key: str) -> set[str]:
    """Return the words of a key, in lower case.

    A key of ids has none, because its value is not a text.

    Example:
        "Full_Answer"  ->  {"full", "answer", "full_answer"}
    """
    words = words_of(key)
    return set() if words & ID_WORDS else words

"""The messages of a conversation, from all layouts of public data sets.

Most conversations consist of plain messages: a known role and a text. They are recognised first and
used as they are; this loop runs for every message of a build. All other turns are converted one by
one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from sftprep.core.json_values import describe_json_type
from sftprep.core.types import Message
from sftprep.records.content_parts import from_parts
from sftprep.records.images import IMAGE_KEYS, is_filled
from sftprep.records.keys.pair_keys import (
    ANSWER_REASONING_KEYS,
    CONTEXT_KEYS,
    SYSTEM_KEYS,
    find_pair,
    find_reasoning,
)
from sftprep.records.options import InvalidRecord, Record, RecordOptions, load_json, require_string
from sftprep.records.roles import PASSED_ROLES, PLAIN_ROLES, ROLES, SHOWN_KEYS, TOOL_CALL, to_role
from sftprep.records.switches import SWITCH_KEYS
from sftprep.records.tool_calls import clean_calls, parse_calls

_CONTENT_KEYS = ("content", "value", "text", "parts", "message")
"""Keys of the content of a turn: those of OpenAI, sharegpt, OpenAssistant and Gemini."""

_SPEAKER_KEYS = ("speaker", "author", "type")
"""Keys of the speaker of a turn without `role` and `from`; `type` is LangChain's."""

_KEPT_KEYS = SWITCH_KEYS | SHOWN_KEYS | IMAGE_KEYS
"""Keys of a from/value turn that are kept in its message, because some template shows them."""

_CONVERTED_KEYS = frozenset({"tool_calls", "function_call", *IMAGE_KEYS})
"""Keys of a message that are not passed to the template as they are."""


def read_messages(value: Any, name: str, options: RecordOptions) -> list[Message]:
    """Convert the turns of a conversation to messages.

    The content of a message is a string; it may be absent in a message with tool calls.

    Args:
        value: The turns, or JSON text of them: messages with role and content, turns with from and
            value, pairs, or strings of the user and the assistant in turn.
        name: The key of the record, for messages of errors.
        options: What the template can show.

    Raises:
        InvalidRecord: A turn has no role or no content, or one of a wrong type.

    Example:
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]  ->
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    """
    if type(value) is list and _are_plain(value):
        return value
    turns = value if type(value) is list and value else _parse_turns(value, name)
    plain = [*map(_plain_message, turns)]
    if None not in plain:
        return plain  # type: ignore[return-value]
    if len(turns) > 1 and all(type(turn) is str for turn in turns):
        return _alternate(turns)
    messages: list[Message] = []
    for number, (turn, message) in enumerate(zip(turns, plain, strict=True), 1):
        if message is None:
            messages += _read_turn(turn, number, name, options)
        else:
            messages.append(message)
    return messages


def _are_plain(messages: list[Any]) -> bool:
    """Return whether all turns are messages with only a usual role and a string."""
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return False
        role = message.get("role")
        if type(role) is not str or role not in PLAIN_ROLES:
            return False
        if type(message.get("content")) is not str:
            return False
    return bool(messages)


def _plain_message(turn: Any) -> Message | None:
    """Return the message of a turn, or None if more than its keys must be converted."""
    if type(turn) is not dict:
        return None
    role, content = turn.get("role"), turn.get("content")
    if type(content) is str and type(role) is str:
        # An empty content may hide one under another key.
        is_plain = len(turn) == 2 or (bool(content) and _CONVERTED_KEYS.isdisjoint(turn))
        return turn if is_plain and role in PLAIN_ROLES else None
    speaker, content = turn.get("from"), turn.get("value")
    if type(content) is str and type(speaker) is str and role is None:
        role = ROLES.get(speaker)
        is_plain = len(turn) == 2 or (bool(content) and _KEPT_KEYS.isdisjoint(turn))
        if is_plain and role in PLAIN_ROLES:
            return {"role": role, "content": content}
    return None


def _parse_turns(value: Any, name: str) -> list[Any]:
    if type(value) is str and value.lstrip().startswith("["):
        try:
            value = load_json(value, f'"{name}"')
        except (ValueError, RecursionError) as error:
            raise InvalidRecord(
                "bad_row", f'"{name}" is text that is not JSON: {type(error).__name__}'
            ) from error
    if not isinstance(value, list):
        what = describe_json_type(value)
        if value is not None:
            what += ', not a list of messages such as {"role": "user", "content": "..."}'
        raise InvalidRecord("bad_row", f'"{name}" is {what}')
    if not value:
        raise InvalidRecord("bad_row", f'"{name}" has no message')
    return value


def _alternate(texts: list[str]) -> list[Message]:
    return [
        {"role": "assistant" if number % 2 else "user", "content": text}
        for number, text in enumerate(texts)
    ]


def _read_turn(turn: Any, number: int, name: str, options: RecordOptions) -> list[Message]:
    """Return the messages of a turn; usually one."""
    if type(turn) is list and len(turn) == 2 and all(type(text) is str for text in turn):
        return _alternate(turn)
    if type(turn) is str:
        raise InvalidRecord(
            "bad_row",
            f'message {number} of "{name}" is a string; a list of strings, which are turns of the'
            " user and the assistant, needs two or more, and no other values",
        )
    if type(turn) is not dict:
        what = describe_json_type(turn)
        raise InvalidRecord("bad_row", f'message {number} of "{name}" is {what}, not an object')
    if turn.get("role") is None and turn.get("from") is None:
        pair = find_pair(turn)
        if pair is not None:
            return [
                message
                for part in _split_pair(turn, *pair)
                for message in _read_turn(part, number, name, options)
            ]
        speaker_key = next((key for key in _SPEAKER_KEYS if to_role(turn.get(key))), None)
        if speaker_key is not None:
            turn = {**turn, "role": turn[speaker_key]}
        elif len(turn) == 1 and to_role(next(iter(turn))) is not None:
            ((speaker, content),) = turn.items()
            turn = {"role": speaker, "content": content}
    return _convert(_rename(turn, number, name, options), number, name, options)


def _split_pair(turn: Record, request: str, answer: str) -> Iterator[Record]:
    """Yield the turns of the system, the user and the assistant in one turn.

    The other keys, such as switches and tool calls, belong to the assistant.
    """
    rest = {key: value for key, value in turn.items() if key not in (request, answer)}
    for key in SYSTEM_KEYS:
        if rest.get(key):
            yield {"role": "system", "content": rest.pop(key)}
            break
    question = turn[request]
    context_key = next((key for key in CONTEXT_KEYS if rest.get(key)), None)
    if request == "instruction" and type(question) is str and context_key is not None:
        question += "\n" + require_string(rest.pop(context_key), f'"{context_key}"')
    yield {"role": "user", "content": question}
    reasoning = find_reasoning(rest)
    rest = {key: value for key, value in rest.items() if key not in ANSWER_REASONING_KEYS}
    if reasoning is not None:
        rest["reasoning_content"] = reasoning
    yield {"role": "assistant", "content": turn[answer], **rest}


def _first_filled(turn: Record, keys: Iterable[str]) -> Any:
    """Return the first value under some keys that is not empty, or None."""
    return next((turn[key] for key in keys if turn.get(key)), None)


def _rename(turn: Record, number: int, name: str, options: RecordOptions) -> Message:
    """Rename the keys and the role of a turn to those of templates."""
    speaker = turn.get("role")
    is_sharegpt = speaker is None and turn.get("from") is not None
    if is_sharegpt:
        speaker = turn["from"]
    role = to_role(speaker)
    if role is None:
        raise _unknown_role(turn, speaker, number, name)
    if role in PASSED_ROLES and role not in options.shown_roles:
        role = "tool"
    if is_sharegpt:
        content = _first_filled(turn, (*_CONTENT_KEYS[1:], "content"))
        if content is None:  # the first key that is there, although it may be empty
            key = next((key for key in (*_CONTENT_KEYS[1:], "content") if key in turn), None)
            content = None if key is None else turn[key]
            if content is None and not _holds_calls(turn):
                what = "missing" if key is None else "null"
                raise InvalidRecord("bad_row", f'"value" is {what} in turn {number} of "{name}"')
        kept = {k: v for k, v in turn.items() if k in _KEPT_KEYS} if len(turn) > 2 else {}
        return {"role": role, "content": content, **kept}
    if not turn.get("content"):
        key = next((key for key in _CONTENT_KEYS[1:] if turn.get(key)), None)
        if key is None and turn.get("content") is None:
            key = next((key for key in _CONTENT_KEYS[1:] if turn.get(key) is not None), None)
        if key is not None:
            turn = {("content" if k == key else k): v for k, v in turn.items() if k != "content"}
    return turn if role == speaker else {**turn, "role": role}


def _convert(message: Message, number: int, name: str, options: RecordOptions) -> list[Message]:
    """Convert a message to string content, and its calls to the form for templates."""
    where = f'message {number} of "{name}"'
    if len(message) > 2 or "content" not in message:
        message = clean_calls(message, where)
        if any(is_filled(message[key]) for key in IMAGE_KEYS.intersection(message)):
            raise InvalidRecord("images", f"{where} has images, and only text is read")
    if message["role"] == TOOL_CALL:
        return [_from_call(message, where, options)]
    content = message.get("content")
    if type(content) is str:
        return [message]
    if content is None:
        if message.get("tool_calls"):
            return [message]
        raise InvalidRecord("bad_row", f"{where} has no content")
    if isinstance(content, list):
        return from_parts(message, content, where, options)
    if isinstance(content, dict) and message["role"] in ("tool", *PASSED_ROLES):
        # The result of a tool as an object.
        return [{**message, "content": json.dumps(content, ensure_ascii=False)}]
    if isinstance(content, dict) and (content.get("type") or content.keys() <= {"text"}):
        return from_parts(message, [content], where, options)
    raise InvalidRecord(
        "bad_type", f"the content of {where} is {describe_json_type(content)}, not text"
    )


def _holds_calls(turn: Record) -> bool:
    return bool(turn.get("tool_calls") or turn.get("function_call"))


def _from_call(message: Message, where: str, options: RecordOptions) -> Message:
    """Convert a turn of tool calls to a message of the assistant.

    It has `tool_calls` if the template shows them, and the text of the calls otherwise.
    """
    calls = message.get("content")
    if not isinstance(calls, (str, dict, list)):
        raise InvalidRecord("bad_tool", f"{where} has no tool call")
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    if not options.tool_calls:
        text = calls if isinstance(calls, str) else json.dumps(calls, ensure_ascii=False)
        return {"role": "assistant", "content": text, **rest}
    parsed = parse_calls(calls, f"the function call in {where}")
    return {"role": "assistant", "content": "", "tool_calls": parsed, **rest}


def _unknown_role(turn: Record, speaker: Any, number: int, name: str) -> InvalidRecord:
    where = f'message {number} of "{name}"'
    if speaker is None:
        return InvalidRecord("bad_row", f'{where} has no "role"')
    known = ", ".join(sorted(ROLES))
    what = f"is from {speaker!r}" if "from" in turn else f"has the role {speaker!r}"
    return InvalidRecord("unknown_role", f"{where} {what}; known roles: {known}")

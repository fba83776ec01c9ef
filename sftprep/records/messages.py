"""The messages of a conversation: validated, with text as content and the roles of templates."""

from __future__ import annotations

import math
from typing import Any

from sftprep.core.types import Message
from sftprep.records.options import InvalidRecord, RecordOptions, parse_if_string, require_string

ROLES = frozenset(
    {"system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"}
)

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}


def check_messages(value: Any, name: str, options: RecordOptions) -> list[Message]:
    """Return validated messages whose content is a string, or absent with tool calls.

    Messages whose content is a list of parts are replaced in the list.

    Args:
        value: The value of the key.
        name: The key, for messages of errors.
        options: What the template can show.

    Raises:
        InvalidRecord: A message has no role or no content, or one of a wrong type.

    Example:
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}]  ->
            [{"role": "user", "content": "a"}]
    """
    if not isinstance(value, list):
        raise InvalidRecord(
            "bad_row", f'"{name}" is {"null" if value is None else "not a list of messages"}'
        )
    if not value:
        raise InvalidRecord("bad_row", f'"{name}" has no message')
    # This loop runs for every message of a build, so plain messages are accepted first.
    for number, message in enumerate(value):
        if type(message) is not dict:
            raise InvalidRecord("bad_row", f'message {number + 1} of "{name}" is not an object')
        role = message.get("role")
        if type(role) is not str or role not in ROLES:
            raise _invalid_role(message, role, number, name)
        content = message.get("content")
        if type(content) is str:
            continue
        where = f'message {number + 1} of "{name}"'
        value[number] = _with_text_content(message, content, where, options)
    return value


WEIGHT_KEYS = ("weight", "train", "loss_weight")
"""Keys by which a message specifies whether it is trained: those of OpenAI, axolotl and
LLaMA-Factory."""


def message_weight(message: Message, number: int) -> float | None:
    """Return the weight of a message in the loss, or None if it does not specify one.

    Args:
        message: The message.
        number: Its index in the conversation, 0-based.

    Raises:
        InvalidRecord: The weight is not a non-negative number.
    """
    for key in WEIGHT_KEYS:
        value = message.get(key)
        if value is None:
            continue
        # A boolean is an int in Python, so `train: true` is the weight 1.
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise InvalidRecord(
                "bad_type",
                f'"{key}" of message {number + 1} is {value!r}, not a non-negative number',
            )
        return float(value)
    return None


def _invalid_role(message: Message, role: Any, number: int, name: str) -> InvalidRecord:
    where = f'message {number + 1} of "{name}"'
    if role is None:
        hint = ': it has "from" and "value", as sharegpt turns have' if "from" in message else ""
        return InvalidRecord("bad_row", f'{where} has no "role"{hint}')
    return InvalidRecord(
        "unknown_role", f"{where} has the role {role!r}; known roles: {', '.join(sorted(ROLES))}"
    )


def _with_text_content(
    message: Message, content: Any, where: str, options: RecordOptions
) -> Message:
    """Return a message whose content is not a string in the form that templates read.

    Parts of text are joined. Parts with reasoning or tool calls become keys of the message. No
    content is valid in a message with tool calls.
    """
    if content is None:
        if message.get("tool_calls"):
            return message
        raise InvalidRecord("bad_row", f"{where} has no content")
    if isinstance(content, list):
        # A string in the list is a part of text.
        parts = [
            part if isinstance(part, dict) else {"type": "text", "text": part} for part in content
        ]
        converted = {
            **message,
            "content": "".join(
                _part_text(part, where) for part in parts if part.get("type") == "text"
            ),
        }
        for part in parts:
            if part.get("type") != "text":
                _add_part(converted, part, where, options)
        return converted
    raise InvalidRecord(
        "bad_type", f"the content of {where} is a {type(content).__name__}, not text"
    )


_TEXT_KEYS = ("text", "value", "content", "reasoning", "thinking")


def _part_text(part: dict[str, Any], where: str) -> str:
    for key in _TEXT_KEYS:
        if key in part:
            return require_string(part[key], f"a {part['type']} part of {where}")
    raise InvalidRecord("bad_row", f"a {part['type']} part of {where} has no text")


def _add_part(message: Message, part: dict[str, Any], where: str, options: RecordOptions) -> None:
    """Add a part that is not text to a message. Raises InvalidRecord.

    A part that the template cannot show is an error: it would be missing without notice.
    """
    kind = part.get("type")
    if kind in ("reasoning", "thinking") and options.reasoning:
        earlier = message.get("reasoning_content", "")
        message["reasoning_content"] = earlier + _part_text(part, where)
    elif kind == "tool_call" and options.tool_calls:
        calls = _parse_calls(_part_text(part, where), f"a tool call part of {where}")
        message["tool_calls"] = [*message.get("tool_calls", ()), *calls]
    else:
        raise InvalidRecord(
            "unsupported_part",
            f"{where} has a content part of type {kind!r}, which the chat template cannot show",
        )


def from_sharegpt_turn(turn: Any, number: int, options: RecordOptions) -> Message:
    """Return the message of a sharegpt turn.

    Args:
        turn: The turn.
        number: Its number in the conversation, 1-based.
        options: What the template can show.

    Raises:
        InvalidRecord: It is not a turn.

    Example:
        {"from": "human", "value": "a"}  ->  {"role": "user", "content": "a"}
    """
    if type(turn) is not dict:
        raise InvalidRecord("bad_row", f'turn {number} of "conversations" is not an object')
    if "role" in turn and "from" not in turn:
        return turn  # a message already; `check_messages` validates it
    for key in ("from", "value"):
        if key not in turn:
            raise InvalidRecord(
                "bad_row", f'"{key}" is missing in turn {number} of "conversations"'
            )
    speaker, value = turn["from"], turn["value"]
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(sorted(SHAREGPT_ROLES))
        raise InvalidRecord(
            "unknown_role", f'turn {number} of "conversations" is from {speaker!r}; known: {known}'
        )
    message = (
        _from_function_call(require_string(value, f"turn {number}"), number, options)
        if role == "function_call"
        else {"role": role, "content": value}
    )
    # Of the other keys, templates do not know any; only the weights are copied.
    if len(turn) > 2:
        message.update({key: turn[key] for key in WEIGHT_KEYS if key in turn})
    return message


def _from_function_call(text: str, number: int, options: RecordOptions) -> Message:
    """Return a sharegpt function call as a message of the assistant.

    It has `tool_calls` if the template shows them, and the text of the call otherwise.
    """
    if not options.tool_calls:
        return {"role": "assistant", "content": text}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": _parse_calls(text, f"the function call in turn {number}"),
    }


def _parse_calls(text: str, what: str) -> list[dict[str, Any]]:
    """Return the tool calls in a JSON string, which has one call or a list of calls."""
    calls = parse_if_string(text, what)
    calls = calls if isinstance(calls, list) else [calls]
    # A call is {"function": {"name", "arguments"}}, as in OpenAI's API, or the inner object alone.
    functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
    if not all(isinstance(function, dict) and "name" in function for function in functions):
        raise InvalidRecord("bad_tool", f"{what} has no name")
    return [
        {"type": "function", "function": {"name": f["name"], "arguments": f.get("arguments", {})}}
        for f in functions
        if f
    ]

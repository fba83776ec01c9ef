"""The messages of a conversation: checked, their parts joined to text, their roles by one set of
names."""

from __future__ import annotations

import math
from typing import Any

from sftprep.core.types import Message
from sftprep.records.options import InvalidRecord, RecordOptions, decoded, string_of

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


def check_messages(value: Any, name: str, reading: RecordOptions) -> list[Message]:
    """The messages, with typed parts joined to text; raises InvalidRecord where one has no role, no
    content, or a wrong type."""
    if not isinstance(value, list):
        raise InvalidRecord(
            "bad_row", f'"{name}" is {"null" if value is None else "not a list of messages"}'
        )
    if not value:
        raise InvalidRecord("bad_row", f'"{name}" holds no message')
    for number, message in enumerate(value):
        if type(message) is not dict:
            raise InvalidRecord("bad_row", f'message {number + 1} of "{name}" is not an object')
        role = message.get("role")
        if type(role) is not str or role not in ROLES:
            raise _bad_role(message, role, number, name)
        content = message.get("content")
        if type(content) is str:
            continue
        value[number] = _with_text(message, content, f'message {number + 1} of "{name}"', reading)
    return value


SWITCHES = ("weight", "train", "loss_weight")
"""Keys by which a message says whether it is trained: those of OpenAI, axolotl and
LLaMA-Factory."""


def weight_of(message: Message, number: int) -> float | None:
    for key in SWITCHES:
        value = message.get(key)
        if value is None:
            continue
        # A truth value is a number too, and so are those of NumPy that came through JSON as such.
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise InvalidRecord(
                "bad_type", f'"{key}" of message {number + 1} is {value!r}, not a number from 0 on'
            )
        return float(value)
    return None


def _bad_role(message: Message, role: Any, number: int, name: str) -> InvalidRecord:
    where = f'message {number + 1} of "{name}"'
    if role is None:
        hint = ': it has "from" and "value", as sharegpt turns have' if "from" in message else ""
        return InvalidRecord("bad_row", f'{where} has no "role"{hint}')
    return InvalidRecord(
        "unknown_role", f"{where} has the role {role!r}; known roles: {', '.join(sorted(ROLES))}"
    )


def _with_text(message: Message, content: Any, where: str, reading: RecordOptions) -> Message:
    """A message whose content is not a string: typed parts are joined, no content is fine beside
    tool calls.

    Parts that are reasoning or tool calls stand beside the text, under the names that templates
    read.
    """
    if content is None:
        if message.get("tool_calls"):
            return message
        raise InvalidRecord("bad_row", f"{where} has no content")
    if isinstance(content, list):
        parts = [
            part if isinstance(part, dict) else {"type": "text", "text": part} for part in content
        ]
        made = {
            **message,
            "content": "".join(
                _part_text(part, where) for part in parts if part.get("type") == "text"
            ),
        }
        for part in parts:
            if part.get("type") != "text":
                _set_beside(made, part, where, reading)
        return made
    raise InvalidRecord(
        "bad_type", f"the content of {where} is a {type(content).__name__}, not text"
    )


_TEXT_KEYS = ("text", "value", "content", "reasoning", "thinking")


def _part_text(part: dict[str, Any], where: str) -> str:
    for key in _TEXT_KEYS:
        if key in part:
            return string_of(part[key], f"a {part['type']} part of {where}")
    raise InvalidRecord("bad_row", f"a {part['type']} part of {where} has no text")


def _set_beside(made: Message, part: dict[str, Any], where: str, reading: RecordOptions) -> None:
    """Put a part that is no text beside the content. Raises InvalidRecord for a part that the
    template cannot show."""
    kind = part.get("type")
    if kind in ("reasoning", "thinking") and reading.reasoning:
        made["reasoning_content"] = made.get("reasoning_content", "") + _part_text(part, where)
    elif kind == "tool_call" and reading.tool_calls:
        calls = _calls(_part_text(part, where), f"a tool call part of {where}")
        made["tool_calls"] = [*made.get("tool_calls", ()), *calls]
    else:
        raise InvalidRecord(
            "unsupported_part",
            f"{where} has a content part of type {kind!r}, which the chat template cannot show",
        )


def sharegpt_message(turn: Any, number: int, reading: RecordOptions) -> Message:
    if type(turn) is not dict:
        raise InvalidRecord("bad_row", f'turn {number} of "conversations" is not an object')
    if "role" in turn and "from" not in turn:
        return turn
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
        _call_message(string_of(value, f"turn {number}"), number, reading)
        if role == "function_call"
        else {"role": role, "content": value}
    )
    if len(turn) > 2:
        message.update({key: turn[key] for key in SWITCHES if key in turn})
    return message


def _call_message(text: str, number: int, reading: RecordOptions) -> Message:
    """A sharegpt function call as an assistant turn: with `tool_calls` where the template shows
    them, as its text otherwise."""
    if not reading.tool_calls:
        return {"role": "assistant", "content": text}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": _calls(text, f"the function call in turn {number}"),
    }


def _calls(text: str, what: str) -> list[dict[str, Any]]:
    """Tool calls from the JSON of one, or of a list of them."""
    calls = decoded(text, what)
    calls = calls if isinstance(calls, list) else [calls]
    functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
    if not all(isinstance(function, dict) and "name" in function for function in functions):
        raise InvalidRecord("bad_tool", f"{what} has no name")
    return [
        {"type": "function", "function": {"name": f["name"], "arguments": f.get("arguments", {})}}
        for f in functions
        if f
    ]

"""Leaves of a conversation: its meaningful contents.

`to_leaves` and `sentinels.SentinelCopy` walk through a record in the same order: leaf k has
sentinel k.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sftprep.chat_template.reasoning_tags import split_tagged
from sftprep.chat_template.reference.rendering import REASONING_KEYS
from sftprep.core.omissions import (
    ARGUMENT,
    CALL,
    KEY,
    MESSAGE,
    NAME,
    REASONING,
    TEXT_WITH_CALL,
    TOOLS,
)
from sftprep.core.types import Message, function_of
from sftprep.render.omissions.tool_leaves import Scalar, copy_tool, find_tool_leaves
from sftprep.render.omissions.written_values import WrittenValues

ANYWHERE = -1
"""The turn of leaves that may occur anywhere in the text: system messages and tools."""

_SPEAKERS = ("system", "developer", "user", "assistant")


@dataclass(slots=True)
class Leaf:
    """A meaningful string or number of a record.

    Attributes:
        kind: The kind of omission that it is counted as if the text lacks it.
        turn: The number of its message, or `ANYWHERE`.
        value: The string (stripped) or number.
        call: The number of its call within the record; -1 outside calls.
    """

    kind: str
    turn: int
    value: str | int | float
    call: int = -1


def to_leaves(
    messages: Sequence[Message],
    tools: list[Any] | None,
    written_values: WrittenValues | None = None,
) -> list[Leaf]:
    """Return the leaves of a conversation, turn after turn, then those of its tools.

    Args:
        messages: The conversation.
        tools: Its tools.
        written_values: The values that are known to be in the text, which are left out.
    """
    written_values = written_values or WrittenValues()
    leaves: list[Leaf] = []
    calls = 0
    for number, message in enumerate(messages):
        is_written = written_values.take(message.get("content"))
        if is_written and len(message) == 2:
            continue
        turn = ANYWHERE if message.get("role") in ("system", "developer") else number
        calls_of_turn = find_calls(message)
        for key in _find_reasoning_keys(message):
            # Only an assistant reasons; in other turns, it is a key without a known meaning.
            kind = REASONING if message.get("role") == "assistant" else KEY
            _add_text(leaves, kind, turn, message[key], written_values)
        if not is_written:
            kind = TEXT_WITH_CALL if calls_of_turn else MESSAGE
            for role, part in split_content(message):
                _add_text(
                    leaves, REASONING if role == "think" else kind, turn, part, written_values
                )
        if has_speaker(message):
            _add_text(leaves, NAME, turn, message["name"], written_values)
        if calls_of_turn and not written_values.take(message["tool_calls"]):
            for call in calls_of_turn:
                _add_call(leaves, turn, call, calls, written_values)
                calls += 1
    if tools and not written_values.take(tools):
        _add_tools(leaves, tools, written_values)
    return leaves


def find_structural_strings(messages: Sequence[Message]) -> list[str]:
    """Return the strings of messages that are not leaves but that templates may write.

    They are roles, names of the tools of results, ids, and the types of calls.
    """
    found = [message.get("role") for message in messages]
    for message in messages:
        if len(message) > 2:
            found += [message.get(key) for key in ("tool_call_id", "id")]
            found += [call.get(key) for call in find_calls(message) for key in ("id", "type")]
            found += [] if has_speaker(message) else [message.get("name")]
    return [value for value in found if isinstance(value, str)]


def _add_text(
    leaves: list[Leaf], kind: str, turn: int, text: str, written_values: WrittenValues
) -> None:
    if not written_values.take(text) and (stripped := text.strip()):
        leaves.append(Leaf(kind, turn, stripped))


def _add_call(
    leaves: list[Leaf], turn: int, call: dict[str, Any], number: int, written_values: WrittenValues
) -> None:
    function = function_or_call(call)
    if written_values.take(call) or written_values.take(function):
        return
    name = function.get("name")
    if isinstance(name, str) and not written_values.take(name):
        leaves.append(Leaf(CALL, turn, name.strip(), number))
    if not written_values.take(function.get("arguments")):
        for value in _iter_scalars(parse_arguments(function), written_values):
            leaves.append(Leaf(ARGUMENT, turn, value, number))


def _add_tools(leaves: list[Leaf], tools: list[Any], written_values: WrittenValues) -> None:
    # Strings are not taken: parsers share the keys of objects, so the piece that is the name of a
    # parameter may be a key of a call.
    if any(map(written_values.has_part_of, tools)):
        values: list[Scalar] = []

        def add(value: Scalar) -> Scalar:
            values.append(value)
            return value

        for tool in tools:
            copy_tool(tool, add, written_values.take)
    else:
        values = [*find_tool_leaves(tools).values]
    leaves += [
        Leaf(TOOLS, ANYWHERE, value.strip() if isinstance(value, str) else value)
        for value in values
    ]


def has_speaker(message: Message) -> bool:
    """Return whether the name of a message names its speaker.

    The name of a tool result does not; see `find_other_names`.
    """
    return isinstance(message.get("name"), str) and message.get("role") in _SPEAKERS


def find_other_names(messages: Sequence[Message]) -> list[tuple[int, bool]]:
    """Return the results of tools whose names are not those of the calls that they answer.

    A result answers the call with its id, or else the first call that has no answer yet.

    Returns:
        The number of each such message, and whether the call that it answers is known.
    """
    found: list[tuple[int, bool]] = []
    name_of: dict[Any, Any] = {}  # by the id of the call
    unanswered: list[Any] = []  # the ids or the numbers of calls
    for number, message in enumerate(messages):
        calls = find_calls(message)
        if message.get("role") in _SPEAKERS:
            unanswered = [call.get("id") or (number, k) for k, call in enumerate(calls)]
            names = [function_or_call(call).get("name") for call in calls]
            name_of.update(zip(map(str, unanswered), names, strict=True))
            continue
        answered: Any = str(message.get("tool_call_id"))
        if answered not in name_of:
            answered = str(unanswered[0]) if unanswered else None
        unanswered = [call for call in unanswered if str(call) != answered]
        name = message.get("name")
        if isinstance(name, str) and name.strip() and name != name_of.get(answered):
            found.append((number, answered is not None))
    return found


def _find_reasoning_keys(message: Message) -> list[str]:
    """Return the keys with reasoning; several keys with the same text are one."""
    keys: list[str] = []
    for key in REASONING_KEYS:
        text = message.get(key)
        if not isinstance(text, str) or not text.strip():
            continue
        if text.strip() not in [message[other].strip() for other in keys]:
            keys.append(key)
    return keys


def split_content(message: Message) -> list[tuple[str, str]]:
    """Return the content in two parts: reasoning in tags, and the rest.

    Templates separate these parts.
    """
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return [("text", text) for text in texts if isinstance(text, str)]
    if not isinstance(content, str):
        return []
    if message.get("role") == "assistant" and "</think>" in content:
        parts = split_tagged(content)
        role = "think" if parts.is_reasoning else "text"
        return [("text", parts.before), (role, parts.inside), ("text", parts.after)]
    return [("text", content)]


def find_calls(message: Message) -> list[Any]:
    """Return the calls of a message; null and other values are none."""
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def function_or_call(call: dict[str, Any]) -> dict[str, Any]:
    """Return the function of a call, or the call if it is flat."""
    function = function_of(call)
    return function if isinstance(function, dict) else call


def parse_arguments(function: dict[str, Any]) -> Any:
    """Return the arguments as values.

    Templates show JSON text as it is, or its values.
    """
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return arguments


def _iter_scalars(value: Any, written_values: WrittenValues) -> Iterator[str | int | float]:
    """Yield the strings and numbers of a JSON value.

    Booleans and null are not searched for.
    """
    stack = [value]
    while stack:
        item = stack.pop()
        if written_values.take(item):
            continue
        if isinstance(item, dict):
            stack.extend(reversed(item.values()))
        elif isinstance(item, list):
            stack.extend(reversed(item))
        elif isinstance(item, str):
            if item.strip():
                yield item.strip()
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield item

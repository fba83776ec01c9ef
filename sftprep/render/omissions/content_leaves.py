"""Leaves of a conversation: its meaningful contents.

A copy of a conversation has sentinels in their place.

`to_leaves` and `SentinelCopy` walk through a record in the same order: leaf k has sentinel k.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftprep.chat_template.reference.rendering import REASONING_KEYS
from sftprep.core.omissions import (
    ARGUMENT,
    CALL,
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
        calls_of_turn = _find_calls(message)
        for key in _find_reasoning_keys(message):
            _add_text(leaves, REASONING, turn, message[key], written_values)
        if not is_written:
            kind = TEXT_WITH_CALL if calls_of_turn else MESSAGE
            for role, part in _split_content(message):
                _add_text(
                    leaves, REASONING if role == "think" else kind, turn, part, written_values
                )
        if _has_speaker(message):
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
            found += [call.get(key) for call in _find_calls(message) for key in ("id", "type")]
            found += [] if _has_speaker(message) else [message.get("name")]
    return [value for value in found if isinstance(value, str)]


def _add_text(
    leaves: list[Leaf], kind: str, turn: int, text: str, written_values: WrittenValues
) -> None:
    if not written_values.take(text) and (stripped := text.strip()):
        leaves.append(Leaf(kind, turn, stripped))


def _add_call(
    leaves: list[Leaf], turn: int, call: dict[str, Any], number: int, written_values: WrittenValues
) -> None:
    function = _function_or_call(call)
    if written_values.take(call) or written_values.take(function):
        return
    name = function.get("name")
    if isinstance(name, str) and not written_values.take(name):
        leaves.append(Leaf(CALL, turn, name.strip(), number))
    if not written_values.take(function.get("arguments")):
        for value in _iter_scalars(_parse_arguments(function), written_values):
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


def _has_speaker(message: Message) -> bool:
    """Return whether the name of a message names its speaker.

    The name of a tool result does not; it repeats the call.
    """
    return isinstance(message.get("name"), str) and message.get("role") in _SPEAKERS


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


def _split_content(message: Message) -> list[tuple[str, str]]:
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
        before, _, answer = content.partition("</think>")
        text, tag, reasoning = before.partition("<think>")
        if tag:
            return [("text", text), ("think", reasoning), ("text", answer)]
        # The template of DeepSeek-R1 writes the opening tag. The closing tag is then on a line of
        # its own, as opposed to one that an answer mentions.
        role = "think" if _is_line(before, answer) else "text"
        return [("text", ""), (role, before), ("text", answer)]
    return [("text", content)]


def _is_line(before: str, after: str) -> bool:
    """Return whether a tag between two texts is on a line of its own."""
    return (not before or before.endswith("\n")) and (not after or after.startswith("\n"))


def _find_calls(message: Message) -> list[Any]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def _function_or_call(call: dict[str, Any]) -> dict[str, Any]:
    function = function_of(call)
    return function if isinstance(function, dict) else call


def _parse_arguments(function: dict[str, Any]) -> Any:
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


# --- sentinels ------------------------------------------------------------------------------------


_SENTINEL = re.compile(r"zqx(\d{8})xqz|918(\d{8})|jv(\d+)w+|917(\d{8})", re.IGNORECASE)
_FIRST_NUMBER = 918_0000_0000


_CASES: tuple[Callable[[str], str], ...] = (str, str.upper, str.capitalize, str.title)
"""What a template may do to the case of a content."""


@dataclass(frozen=True, slots=True)
class SentinelRendering:
    """What a template writes for a record whose leaves are sentinels.

    Attributes:
        unwritten: The numbers of the leaves that it does not write.
        structure: What it writes besides the leaves: its own text, roles, keys and dates. A leaf
            that is in this text may be found although it is not written.
        recased: By number, how it changes the case of a leaf.
    """

    unwritten: frozenset[int]
    structure: str
    recased: dict[int, Callable[[str], str]]

    def lacks(self, number: int, value: str | int | float) -> bool:
        """Return whether the template does not write a leaf, or in another case."""
        case = self.recased.get(number)
        is_changed = case is not None and isinstance(value, str) and case(value) != value
        return number in self.unwritten or is_changed


@dataclass(slots=True)
class SentinelCopy:
    """A copy of a record with a unique sentinel for every leaf.

    Args:
        sentinels: The sentinels, in the order of the leaves.
        shape: What the rendering depends on apart from the leaves.
    """

    sentinels: list[str] = field(default_factory=list)
    shape: list[Any] = field(default_factory=list)
    _first_of_tools: int = 0  # the number of the first sentinel in the tools

    def copy_message(self, message: Message) -> Message:
        """Return the copy of a message."""
        copy = dict(message)
        self.shape.append((message.get("role"), *sorted(map(str, message))))
        sentinel_of: dict[str, str] = {}  # keys with the same text are one leaf
        for key in REASONING_KEYS:
            text = message.get(key)
            if isinstance(text, str) and text.strip():
                if text.strip() not in sentinel_of:
                    sentinel_of[text.strip()] = self._new_sentinel()
                # Which keys have the same text is a part of the shape.
                self.shape.append((key, [*sentinel_of].index(text.strip())))
                copy[key] = sentinel_of[text.strip()]
        self._copy_content(message, copy)
        if _has_speaker(message) and message["name"].strip():
            copy["name"] = self._new_sentinel()
        calls = _find_calls(message)
        if calls:
            copy["tool_calls"] = [self._copy_call(call) for call in calls]
        return copy

    def copy_tools(self, tools: list[Any]) -> list[Any]:
        """Return the copy of the tools, which come after all messages."""
        found = find_tool_leaves(tools)
        self._first_of_tools = len(self.sentinels)
        self.sentinels += found.sentinels
        self.shape.append(("tools", found.shape))
        return found.copy

    def read(self, text: str) -> SentinelRendering:
        """Return what a text of the copy shows."""
        unwritten, recased = set(range(len(self.sentinels))), {}
        for match in _SENTINEL.finditer(text):
            word, argument, tool, value = match.groups()
            number = int(word or argument or tool or value)
            number += self._first_of_tools if tool or value else 0
            shown, unchanged = match[0], match[0].lower()
            case = next((case for case in _CASES if case(unchanged) == shown), None)
            if case is not None and number in unwritten:
                unwritten.remove(number)
                recased[number] = case
            if case is str:
                recased.pop(number, None)
        return SentinelRendering(frozenset(unwritten), _SENTINEL.sub("\0", text), recased)

    def _copy_content(self, message: Message, copy: Message) -> None:
        parts = _split_content(message)
        self.shape.append(tuple((role, bool(part.strip())) for role, part in parts))
        if len(parts) > 1 and isinstance(message.get("content"), str):
            self.shape.append("<think>" in message["content"].partition("</think>")[0])
        if isinstance(message.get("content"), list):
            new_parts = []
            for part in message["content"]:
                text = part.get("text") if isinstance(part, dict) else None
                shown = isinstance(text, str) and text.strip()
                new_parts.append({**part, "text": self._new_sentinel()} if shown else part)
            copy["content"] = new_parts
        elif len(parts) == 1 and parts[0][1].strip():
            copy["content"] = self._new_sentinel()
        elif len(parts) > 1:
            text, inside, after = (
                self._new_sentinel() if part.strip() else "" for _, part in parts
            )
            before, _, _ = message["content"].partition("</think>")
            opening = "<think>" if "<think>" in before else ""
            copy["content"] = f"{text}{opening}\n{inside}\n</think>\n\n{after}"

    def _copy_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = dict(_function_or_call(call))
        if isinstance(function.get("name"), str):
            function["name"] = self._new_sentinel()
        arguments = _parse_arguments(function)
        self.shape.append(("call", json.dumps(_to_skeleton(arguments), default=str)))
        new_arguments = self._copy_value(arguments)
        if isinstance(function.get("arguments"), str) and not isinstance(new_arguments, str):
            new_arguments = json.dumps(new_arguments)
        if "arguments" in function:
            function["arguments"] = new_arguments
        return {**call, "function": function} if "function" in call else function

    def _copy_value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._copy_value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy_value(item) for item in value]
        if isinstance(value, str):
            return self._new_sentinel() if value.strip() else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = _FIRST_NUMBER + len(self.sentinels)
            self.sentinels.append(str(number))
            return number
        return value

    def _new_sentinel(self) -> str:
        # Lowercase letters and digits only: no template changes or splits it.
        sentinel = f"zqx{len(self.sentinels):08d}xqz"
        self.sentinels.append(sentinel)
        return sentinel


def _to_skeleton(value: Any) -> Any:
    """Return a JSON value without its strings and numbers."""
    if isinstance(value, dict):
        return {key: _to_skeleton(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_skeleton(item) for item in value]
    return "" if isinstance(value, str) and not value.strip() else type(value).__name__

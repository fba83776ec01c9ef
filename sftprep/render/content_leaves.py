"""Leaves of a conversation: its meaningful contents.

A copy of a conversation has sentinels in their place.

`to_leaves` and `SentinelCopy` walk through a record in the same order: leaf k has sentinel k.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
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
from sftprep.core.types import Message

ANYWHERE = -1
"""The turn of leaves that may occur anywhere in the text: system messages and tools."""

_SPEAKERS = ("system", "developer", "user", "assistant")


@dataclass(slots=True)
class Leaf:
    """A meaningful string or number of a record.

    Args:
        kind: The kind of omission that it is counted as if the text lacks it.
        turn: The number of its message, or `ANYWHERE`.
        value: The string (stripped) or number.
        call: The number of its call within the record; -1 outside calls.
    """

    kind: str
    turn: int
    value: str | int | float
    call: int = -1


class WrittenValues:
    """The objects written by a rendering.

    Args:
        text: The rendered text.
        pieces: The strings that it consists of.
        as_json: Values that the template converted to JSON, with the results.
    """

    def __init__(
        self, text: str = "", pieces: Iterable[str] = (), as_json: Iterable[tuple[Any, str]] = ()
    ) -> None:
        # A string that is written for one leaf is not written for another one, but everything in an
        # object or a list is written with it.
        self._strings = set(map(id, pieces))
        self._containers: set[int] = set()
        for value, json_text in as_json:
            if id(json_text) in self._strings or json_text in text:
                (self._strings if isinstance(value, str) else self._containers).add(id(value))

    def take(self, value: Any) -> bool:
        """Return whether a value was written; for a string, only the first time."""
        key = id(value)
        if key in self._containers:
            return isinstance(value, dict | list)
        # Python has only one object for each single character, so those are never certain.
        if key not in self._strings or not isinstance(value, str) or len(value) < 2:
            return False
        self._strings.remove(key)
        return True


def to_leaves(
    messages: Sequence[Message], tools: list[Any] | None, written: WrittenValues | None = None
) -> list[Leaf]:
    """Return the leaves of a conversation, turn after turn, then those of its tools.

    Args:
        messages: The conversation.
        tools: Its tools.
        written: The values that are known to be in the text, which are left out.
    """
    written = written or WrittenValues()
    leaves: list[Leaf] = []
    calls = 0
    for number, message in enumerate(messages):
        is_written = written.take(message.get("content"))
        if is_written and len(message) == 2:
            continue
        turn = ANYWHERE if message.get("role") in ("system", "developer") else number
        own_calls = _calls_of(message)
        for key in _reasoning_keys(message):
            _add_text(leaves, REASONING, turn, message[key], written)
        if not is_written:
            kind = TEXT_WITH_CALL if own_calls else MESSAGE
            for role, part in _content_parts(message):
                _add_text(leaves, REASONING if role == "think" else kind, turn, part, written)
        if _has_speaker(message):
            _add_text(leaves, NAME, turn, message["name"], written)
        if own_calls and not written.take(message["tool_calls"]):
            for call in own_calls:
                _add_call(leaves, turn, call, calls, written)
                calls += 1
    if tools and not written.take(tools):
        for tool in tools:
            for value in _tool_strings(tool, written):
                _add_text(leaves, TOOLS, ANYWHERE, value, written)
    return leaves


def _add_text(leaves: list[Leaf], kind: str, turn: int, text: str, written: WrittenValues) -> None:
    if not written.take(text) and (stripped := text.strip()):
        leaves.append(Leaf(kind, turn, stripped))


def _add_call(
    leaves: list[Leaf], turn: int, call: dict[str, Any], number: int, written: WrittenValues
) -> None:
    function = _function_of(call)
    if written.take(call) or written.take(function):
        return
    name = function.get("name")
    if isinstance(name, str) and not written.take(name):
        leaves.append(Leaf(CALL, turn, name.strip(), number))
    if not written.take(function.get("arguments")):
        for value in _scalars(_arguments_of(function), written):
            leaves.append(Leaf(ARGUMENT, turn, value, number))


def _has_speaker(message: Message) -> bool:
    """Return whether the name of a message names its speaker.

    The name of a tool result does not; it repeats the call.
    """
    return isinstance(message.get("name"), str) and message.get("role") in _SPEAKERS


def _reasoning_keys(message: Message) -> list[str]:
    """Return the keys with reasoning; several keys with the same text are one."""
    keys: list[str] = []
    for key in REASONING_KEYS:
        text = message.get(key)
        if isinstance(text, str) and text.strip() and text not in [message[k] for k in keys]:
            keys.append(key)
    return keys


def _content_parts(message: Message) -> list[tuple[str, str]]:
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
        reasoning, _, answer = content.partition("</think>")
        return [("think", reasoning.lstrip().removeprefix("<think>")), ("text", answer)]
    return [("text", content)]


def _calls_of(message: Message) -> list[Any]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def _function_of(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _arguments_of(function: dict[str, Any]) -> Any:
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


def _scalars(value: Any, written: WrittenValues) -> Iterator[str | int | float]:
    """Yield the strings and numbers of a JSON value.

    Booleans and null are not searched for.
    """
    stack = [value]
    while stack:
        item = stack.pop()
        if written.take(item):
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


def _tool_strings(tool: Any, written: WrittenValues) -> list[str]:
    """Return the name and the description of a tool."""
    if not isinstance(tool, dict) or written.take(tool):
        return []
    function = _function_of(tool)
    if written.take(function):
        return []
    values = [function.get(key) for key in ("name", "description")]
    return [value for value in values if isinstance(value, str) and value.strip()]


# --- sentinels ------------------------------------------------------------------------------------


_SENTINEL = re.compile(r"zqx(\d{8})xqz|918(\d{8})")
_FIRST_NUMBER = 918_0000_0000


@dataclass(slots=True)
class SentinelCopy:
    """A copy of a record with a unique sentinel for every leaf.

    Args:
        sentinels: The sentinels, in the order of the leaves.
        shape: What the rendering depends on apart from the leaves.
    """

    sentinels: list[str] = field(default_factory=list)
    shape: list[Any] = field(default_factory=list)

    def message(self, message: Message) -> Message:
        """Return the copy of a message."""
        copy = dict(message)
        self.shape.append((message.get("role"), *sorted(map(str, message))))
        sentinel_of: dict[str, str] = {}  # keys with the same text are one leaf
        for key in REASONING_KEYS:
            text = message.get(key)
            if isinstance(text, str) and text.strip():
                if text not in sentinel_of:
                    sentinel_of[text] = self._next()
                # Which keys have the same text is a part of the shape.
                self.shape.append((key, [*sentinel_of].index(text)))
                copy[key] = sentinel_of[text]
        self._content(message, copy)
        if _has_speaker(message) and message["name"].strip():
            copy["name"] = self._next()
        calls = _calls_of(message)
        if calls:
            copy["tool_calls"] = [self._call(call) for call in calls]
        return copy

    def tool(self, tool: Any) -> Any:
        """Return the copy of a tool."""
        if not isinstance(tool, dict):
            return tool
        function = dict(_function_of(tool))
        for key in ("name", "description"):
            if isinstance(function.get(key), str) and function[key].strip():
                function[key] = self._next()
        self.shape.append(("tool", json.dumps(_skeleton(tool), default=str)))
        return {**tool, "function": function} if "function" in tool else function

    def find_hidden(self, text: str) -> frozenset[int]:
        """Return the numbers of the sentinels missing in a text."""
        return frozenset(range(len(self.sentinels))) - {
            int(word or number) for word, number in _SENTINEL.findall(text)
        }

    def _content(self, message: Message, copy: Message) -> None:
        parts = _content_parts(message)
        self.shape.append(tuple((role, bool(part.strip())) for role, part in parts))
        if isinstance(message.get("content"), list):
            made = []
            for part in message["content"]:
                text = part.get("text") if isinstance(part, dict) else None
                shown = isinstance(text, str) and text.strip()
                made.append({**part, "text": self._next()} if shown else part)
            copy["content"] = made
        elif len(parts) == 1 and parts[0][1].strip():
            copy["content"] = self._next()
        elif len(parts) > 1:
            content = message["content"]
            opening = content[: content.index("<think>") + 7] if "<think>" in content else ""
            inside = self._next() if parts[0][1].strip() else ""
            after = self._next() if parts[1][1].strip() else ""
            copy["content"] = f"{opening and '<think>'}\n{inside}\n</think>\n\n{after}"

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = dict(_function_of(call))
        if isinstance(function.get("name"), str):
            function["name"] = self._next()
        arguments = _arguments_of(function)
        self.shape.append(("call", json.dumps(_skeleton(arguments), default=str)))
        replaced = self._replaced(arguments)
        if isinstance(function.get("arguments"), str) and not isinstance(replaced, str):
            replaced = json.dumps(replaced)
        if "arguments" in function:
            function["arguments"] = replaced
        return {**call, "function": function} if "function" in call else function

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._replaced(item) for item in value]
        if isinstance(value, str):
            return self._next() if value.strip() else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = _FIRST_NUMBER + len(self.sentinels)
            self.sentinels.append(str(number))
            return number
        return value

    def _next(self) -> str:
        # Lowercase letters and digits only: no template changes or splits it.
        sentinel = f"zqx{len(self.sentinels):08d}xqz"
        self.sentinels.append(sentinel)
        return sentinel


def _skeleton(value: Any) -> Any:
    """Return a JSON value without its strings and numbers."""
    if isinstance(value, dict):
        return {key: _skeleton(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_skeleton(item) for item in value]
    return "" if isinstance(value, str) and not value.strip() else type(value).__name__

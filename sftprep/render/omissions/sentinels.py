"""A copy of a conversation whose leaves are sentinels, and what a template writes of it.

The rendering of the copy is fixed text with a slot for each sentinel. A record with the same shape
(roles, keys, kinds of leaves) has the same fixed text and slots. So its leaves are those of the
slots if its text is this fixed text with its values in the slots; nothing needs to be searched for,
and nothing can be found by chance (`SentinelRendering.fits`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftprep.chat_template.reasoning_tags import split_tagged
from sftprep.chat_template.reference.rendering import REASONING_KEYS
from sftprep.core.types import Message
from sftprep.render.omissions.content_leaves import (
    Leaf,
    find_calls,
    function_or_call,
    has_speaker,
    parse_arguments,
    split_content,
)
from sftprep.render.omissions.spellings import first_spelling, iter_spellings
from sftprep.render.omissions.tool_leaves import find_tool_leaves

_SENTINEL = re.compile(r"zqx(\d{8})xqz|918(\d{8})|jv(\d+)w+|917(\d{8})", re.IGNORECASE)
_FIRST_NUMBER = 918_0000_0000
_ID_KEYS = frozenset({"id", "tool_call_id"})
_LEAF_KEYS = frozenset({"content", "tool_calls", *REASONING_KEYS})
"""Keys of messages whose values have leaves."""
_CASES: tuple[Callable[[str], str], ...] = (str, str.upper, str.capitalize, str.title)
"""What a template may do to the case of a content."""


@dataclass(frozen=True, slots=True)
class SentinelRendering:
    """What a template writes for a record whose leaves are sentinels.

    Attributes:
        fixed: What it writes before each slot, and after the last one: its own text, roles, keys
            and dates. A leaf that is in this text may be found although it is not written.
        slots: The number of the leaf in each slot.
        unwritten: The numbers of the leaves that it does not write.
        recased: By number, how it changes the case of a leaf.
    """

    fixed: tuple[str, ...]
    slots: tuple[int, ...]
    unwritten: frozenset[int]
    recased: dict[int, Callable[[str], str]]

    @property
    def structure(self) -> str:
        """What the template writes besides the leaves."""
        return "\0".join(self.fixed)

    def lacks(self, number: int, value: str | int | float) -> bool:
        """Return whether the template does not write a leaf, or in another case."""
        case = self.recased.get(number)
        is_changed = case is not None and isinstance(value, str) and case(value) != value
        return number in self.unwritten or is_changed

    def fits(self, leaves: Sequence[Leaf], text: str) -> bool:
        """Return whether a text is the fixed text with the values of leaves in its slots.

        Whitespace around a value is ignored, because values are stripped.
        """
        position = 0
        for fixed, number in zip(self.fixed, self.slots, strict=False):
            position = _find_end((fixed,), text, position)
            if position < 0:
                return False
            value = leaves[number].value
            end = _find_end((first_spelling(value),), text, position)
            if end < 0:
                end = _find_end(tuple(iter_spellings(value)), text, position)
            if end < 0:
                return False
            position = end
        position = _find_end((self.fixed[-1],), text, position)
        return position >= 0 and not text[position:].strip()


def _find_end(forms: Sequence[str], text: str, start: int) -> int:
    """Return the end of the first form that is at a position, after any whitespace; or -1."""
    while True:
        for form in forms:
            if text.startswith(form, start):
                return start + len(form)
        if not text[start : start + 1].isspace():
            return -1
        start += 1


@dataclass(slots=True)
class SentinelCopy:
    """A copy of a record with a unique sentinel for every leaf.

    Args:
        has_ids: Whether the template may write ids, so that its rendering depends on them.
        sentinels: The sentinels, in the order of the leaves.
        shape: What the rendering depends on apart from the leaves.
    """

    has_ids: bool = True
    sentinels: list[str] = field(default_factory=list)
    shape: list[Any] = field(default_factory=list)
    _first_of_tools: int = 0  # the number of the first sentinel in the tools

    def copy_message(self, message: Message) -> Message:
        """Return the copy of a message."""
        copy = dict(message)
        self.shape.append((message.get("role"), *sorted(map(str, message))))
        if len(message) > 2:
            self._add_others(message, _LEAF_KEYS | ({"name"} if has_speaker(message) else set()))
            self._copy_reasoning(message, copy)
        self._copy_content(message, copy)
        if has_speaker(message) and message["name"].strip():
            copy["name"] = self.replace(message["name"])
        calls = find_calls(message)
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
        fixed, slots, end = [], [], 0
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
            fixed.append(text[end : match.start()])
            slots.append(number)
            end = match.end()
        fixed.append(text[end:])
        return SentinelRendering(tuple(fixed), tuple(slots), frozenset(unwritten), recased)

    def _add_others(self, values: dict[str, Any], leaf_keys: frozenset[str] | set[str]) -> None:
        """Add the values that have no leaves to the shape."""
        skipped = leaf_keys if self.has_ids else leaf_keys | _ID_KEYS
        others = {key: value for key, value in values.items() if key not in skipped}
        if others:
            self.shape.append(json.dumps(others, default=str))

    def _copy_reasoning(self, message: Message, copy: Message) -> None:
        sentinel_of: dict[str, str] = {}  # keys with the same text are one leaf
        for key in REASONING_KEYS:
            text = message.get(key)
            if isinstance(text, str) and text.strip():
                if text.strip() not in sentinel_of:
                    sentinel_of[text.strip()] = self.replace(text)
                # Which keys have the same text is a part of the shape.
                self.shape.append((key, [*sentinel_of].index(text.strip())))
                copy[key] = sentinel_of[text.strip()]

    def _copy_content(self, message: Message, copy: Message) -> None:
        parts = split_content(message)
        self.shape.append(tuple((role, bool(part.strip())) for role, part in parts))
        if len(parts) > 1 and isinstance(message.get("content"), str):
            self.shape.append(split_tagged(message["content"]).has_opening)
        if isinstance(message.get("content"), list):
            new_parts = []
            for part in message["content"]:
                text = part.get("text") if isinstance(part, dict) else None
                shown = isinstance(text, str) and text.strip()
                if isinstance(part, dict):
                    self._add_others(part, {"text"})
                new_parts.append({**part, "text": self.replace(text)} if shown else part)
            copy["content"] = new_parts
        elif len(parts) == 1 and parts[0][1].strip():
            copy["content"] = self.replace(parts[0][1])
        elif len(parts) > 1:
            text, inside, after = (
                self.replace(part.strip()) if part.strip() else "" for _, part in parts
            )
            opening = "<think>" if split_tagged(message["content"]).has_opening else ""
            copy["content"] = f"{text}{opening}\n{inside}\n</think>\n\n{after}"

    def _copy_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = dict(function_or_call(call))
        self._add_others(call, {"function", "name", "arguments"})
        if "function" in call:
            self._add_others(function, {"name", "arguments"})
        if isinstance(function.get("name"), str):
            function["name"] = self.replace(function["name"])
        arguments = parse_arguments(function)
        written = function.get("arguments")
        separators = _find_separators(written, arguments) if isinstance(written, str) else None
        self.shape.append((separators, json.dumps(_to_skeleton(arguments), default=str)))
        new_arguments = self._copy_value(arguments)
        if separators is not None and not isinstance(new_arguments, str):
            new_arguments = json.dumps(new_arguments, separators=separators)
        if "arguments" in function:
            function["arguments"] = new_arguments
        return {**call, "function": function} if "function" in call else function

    def _copy_value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._copy_value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy_value(item) for item in value]
        if isinstance(value, str):
            return self.replace(value) if value.strip() else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self.replace(value)
        return value

    def replace(self, value: Any) -> Any:
        """Return the sentinel for the value of the next leaf."""
        number = len(self.sentinels)
        # Lowercase letters and digits only: no template changes or splits it.
        sentinel = f"zqx{number:08d}xqz" if isinstance(value, str) else _FIRST_NUMBER + number
        self.sentinels.append(str(sentinel))
        return sentinel


def _find_separators(text: str, value: Any) -> tuple[str, str]:
    """Return the separators in JSON text, which most templates write as it is."""
    compact = (",", ":")
    is_compact = text == json.dumps(value, ensure_ascii=False, separators=compact)
    return compact if is_compact else (", ", ": ")


def _to_skeleton(value: Any) -> Any:
    """Return a JSON value without its strings and numbers."""
    if isinstance(value, dict):
        return {key: _to_skeleton(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_skeleton(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    return "" if isinstance(value, str) and not value.strip() else type(value).__name__

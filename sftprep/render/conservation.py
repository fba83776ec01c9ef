"""Which content of a conversation its rendered text lacks.

A chat template may drop what a record contains: earlier reasoning, the arguments of a call, the
text alongside a call. The model is then trained on something else than what the user wrote. The
check:

1. Every string and number that carries meaning is a `Leaf`: contents, reasoning, names and
   arguments of calls, tools, names of speakers. Booleans, null, roles and ids are not searched for.
2. The leaves of a turn are searched for in the text after those of the turn before, in each
   spelling that templates use (raw, JSON with its escapes, Python repr); system messages and tools
   are searched for anywhere.
3. A leaf that is short, or that occurs more than once in the record, could be found by chance. Such
   leaves are decided by a second rendering, in which every leaf is a unique sentinel. Records of
   the same shape (roles, kinds of leaves, keys of arguments) share this rendering.

Cost: where a template is compiled, a content that is written unchanged is the same object in the
list of rendered pieces, and a record whose contents are all found this way is done after one
dictionary lookup per message. The tests compare the check with sentinels that transformers renders.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftprep.core.types import Message

MESSAGE = "message_not_shown"
REASONING = "reasoning_not_shown"
CALL = "call_not_shown"
ARGUMENT = "argument_not_shown"
TEXT_WITH_CALL = "text_with_call_not_shown"
TOOLS = "tools_not_shown"
NAME = "name_not_shown"

LOSSES = (MESSAGE, REASONING, CALL, ARGUMENT, TEXT_WITH_CALL, TOOLS, NAME)
"""The kinds of loss, in the order in which they are reported."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message with the reasoning of its turn; templates read one of them."""

_SPEAKERS = ("system", "developer", "user", "assistant")
_PLAIN_KEYS = frozenset({"role", "content"})
_SURE_LENGTH = 8
"""Shorter strings may occur in a text by chance."""
_SHAPES_KEPT = 4096
_ANYWHERE = -1
"""The turn of leaves that may occur anywhere in the text."""

Render = Callable[[list[Message], list[Any] | None, dict[str, Any] | None], str]
"""Renders messages, tools and template variables to a text, or raises."""


@dataclass(slots=True)
class Leaf:
    """A string or number of a record that carries meaning.

    Args:
        kind: The loss that it is counted as.
        turn: The number of its message, or `_ANYWHERE`.
        value: The string (stripped) or number.
        call: The number of its call within the record; -1 outside calls.
    """

    kind: str
    turn: int
    value: str | int | float
    call: int = -1


@dataclass(frozen=True, slots=True)
class Losses:
    """What the text of one record lacks.

    Args:
        kinds: The kinds, a subset of LOSSES.
        last_reasoning: Whether the reasoning of the last turn is among it.
    """

    kinds: frozenset[str] = frozenset()
    last_reasoning: bool = False

    @property
    def serious(self) -> frozenset[str]:
        """The kinds that change what the model learns to answer: under quarantine, they reject the
        record. Earlier reasoning, tools and names are only counted."""
        counted = {TOOLS, NAME} if self.last_reasoning else {TOOLS, NAME, REASONING}
        return self.kinds - counted


NO_LOSS = Losses()


class ConservationCheck:
    """The check for one chat template.

    Args:
        render: The template, as the records are rendered, without special treatment of anything.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        # By shape, the numbers of the leaves that the sentinel rendering lacks; None where the
        # template refuses the sentinels.
        self._by_shape: dict[Any, frozenset[int] | None] = {}

    def losses(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        variables: dict[str, Any] | None,
        text: str,
        pieces: Sequence[str] | None = None,
    ) -> Losses:
        """Return what the text of a conversation lacks.

        Args:
            messages: The conversation.
            tools: Its tools.
            variables: Variables of the template that the record sets.
            text: The rendered conversation.
            pieces: The strings that make up the text, if the template is compiled.
        """
        if not tools and pieces is not None and _are_written_unchanged(messages, pieces):
            return NO_LOSS
        leaves = [*_leaves_of(messages, tools)]
        found = _search(leaves, text)
        unsure = [k for k, leaf in enumerate(leaves) if found[k] and _is_short(leaf)]
        if unsure or not all(found) or _repeats(leaves):
            hidden = self._hidden(messages, tools, variables, leaves)
            if hidden is not None:
                found = self._decide(leaves, found, hidden, text)
        return _as_losses(leaves, found, messages)

    def _decide(
        self, leaves: list[Leaf], found: list[bool], hidden: frozenset[int], text: str
    ) -> list[bool]:
        """Combine both searches: a leaf is shown if it occurs in the text, and its sentinel is
        shown, unless it is so long and unique that the text alone decides."""
        values = Counter(leaf.value for leaf in leaves)
        decided = []
        for number, leaf in enumerate(leaves):
            sure = not _is_short(leaf) and values[leaf.value] == 1
            if found[number]:
                decided.append(sure or number not in hidden)
            else:
                # The search in order may have taken an occurrence that belongs to another leaf.
                decided.append(
                    number not in hidden and any(form in text for form in _spellings(leaf.value))
                )
        return decided

    def _hidden(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        variables: dict[str, Any] | None,
        leaves: list[Leaf],
    ) -> frozenset[int] | None:
        copy = _SentinelCopy()
        try:
            fake_messages = [copy.message(message) for message in messages]
            fake_tools = [copy.tool(tool) for tool in tools] if tools else tools
        except RecursionError:
            return None
        shape = (tuple(copy.shape), json.dumps(variables, sort_keys=True, default=str))
        if shape not in self._by_shape:
            if len(self._by_shape) >= _SHAPES_KEPT:
                self._by_shape.clear()
            self._by_shape[shape] = None
            if len(copy.sentinels) == len(leaves):
                try:
                    text = self._render(fake_messages, fake_tools, variables)
                except Exception:  # a template may refuse the sentinels for any reason
                    return None
                self._by_shape[shape] = frozenset(
                    k for k, sentinel in enumerate(copy.sentinels) if sentinel not in text
                )
        return self._by_shape[shape]


def _are_written_unchanged(messages: Sequence[Message], pieces: Sequence[str]) -> bool:
    """Return whether each message is a role and a content that is a piece, in order."""
    position = {id(piece): number for number, piece in enumerate(pieces)}
    last = -1
    for message in messages:
        content = message.get("content")
        if message.keys() != _PLAIN_KEYS or type(content) is not str:
            return False
        if not content or content.isspace():
            continue
        number = position.get(id(content), -1)
        if number <= last:
            # Not written, or a string that two messages share.
            return False
        last = number
    return True


# --- leaves ---------------------------------------------------------------------------------------
# `_leaves_of` and `_SentinelCopy` walk through a record in the same order: leaf k has sentinel k.


def _leaves_of(messages: Sequence[Message], tools: list[Any] | None) -> Iterator[Leaf]:
    calls = 0
    for number, message in enumerate(messages):
        turn = _ANYWHERE if message.get("role") in ("system", "developer") else number
        own_calls = _calls_of(message)
        kind = TEXT_WITH_CALL if own_calls else MESSAGE
        for key in _reasoning_keys(message):
            yield from _text_leaf(REASONING, turn, message[key])
        for role, part in _content_parts(message):
            yield from _text_leaf(REASONING if role == "think" else kind, turn, part)
        if _has_speaker(message):
            yield from _text_leaf(NAME, turn, message["name"])
        for call in own_calls:
            function = _function_of(call)
            if isinstance(function.get("name"), str):
                yield Leaf(CALL, turn, function["name"].strip(), calls)
            for value in _scalars(_arguments_of(function)):
                yield Leaf(ARGUMENT, turn, value, calls)
            calls += 1
    for tool in tools or ():
        for value in _tool_strings(tool):
            yield from _text_leaf(TOOLS, _ANYWHERE, value)


def _text_leaf(kind: str, turn: int, text: str) -> Iterator[Leaf]:
    stripped = text.strip()
    if stripped:
        yield Leaf(kind, turn, stripped)


def _has_speaker(message: Message) -> bool:
    """Return whether the name says who speaks: that of a tool result repeats the call."""
    return isinstance(message.get("name"), str) and message.get("role") in _SPEAKERS


def _reasoning_keys(message: Message) -> list[str]:
    """The key that holds the reasoning; several keys with the same text are one."""
    keys = [
        key for key in REASONING_KEYS if isinstance(message.get(key), str) and message[key].strip()
    ]
    return [
        key
        for number, key in enumerate(keys)
        if message[key] not in [message[k] for k in keys[:number]]
    ]


_THINK = re.compile(r"(?s)\A(\s*<think>)?(.*?)</think>(.*)\Z")


def _content_parts(message: Message) -> list[tuple[str, str]]:
    """The content in the parts that templates separate: reasoning in tags, and the rest."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return [("text", text) for text in texts if isinstance(text, str)]
    if not isinstance(content, str):
        return []
    if message.get("role") == "assistant" and "</think>" in content:
        match = _THINK.match(content)
        if match:
            return [("think", match[2]), ("text", match[3])]
    return [("text", content)]


def _calls_of(message: Message) -> list[Any]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def _function_of(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _arguments_of(function: dict[str, Any]) -> Any:
    """The arguments as values: templates show JSON text as it is, or its values."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return arguments


def _scalars(value: Any) -> Iterator[str | int | float]:
    """The strings and numbers of a JSON value; booleans and null are not searched for."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(reversed(item.values()))
        elif isinstance(item, list):
            stack.extend(reversed(item))
        elif isinstance(item, str):
            if item.strip():
                yield item.strip()
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield item


def _tool_strings(tool: Any) -> list[str]:
    """The name and the description of a tool."""
    if not isinstance(tool, dict):
        return []
    function = _function_of(tool)
    values = [function.get(key) for key in ("name", "description")]
    return [value for value in values if isinstance(value, str) and value.strip()]


# --- search ---------------------------------------------------------------------------------------


def _search(leaves: Sequence[Leaf], text: str) -> list[bool]:
    """Return for each leaf whether the text shows it, turn after turn."""
    found: list[bool] = []
    start = end = 0
    turn = 0
    for leaf in leaves:
        if leaf.turn == _ANYWHERE:
            found.append(any(form in text for form in _spellings(leaf.value)))
            continue
        if leaf.turn != turn:
            turn, start = leaf.turn, end
        position = -1
        for form in _spellings(leaf.value):
            position = text.find(form, start)
            if position >= 0:
                break
        found.append(position >= 0)
        if position >= 0 and not _is_short(leaf):
            end = max(end, position + len(form))
    return found


def _spellings(value: str | int | float) -> Iterator[str]:
    """Yield the forms in which templates write a value, the frequent ones first."""
    if not isinstance(value, str):
        yield json.dumps(value)
        yield str(value)
        return
    yield value
    once = _escaped(value)
    yield from once
    # The arguments as JSON text that is written as JSON.
    for form in once:
        yield from _escaped(form)
    if (shown := repr(value)[1:-1]) != value:
        yield shown


def _escaped(value: str) -> list[str]:
    """The string inside JSON, with and without characters beyond ASCII, and as `tojson` escapes
    it; without what equals the string itself."""
    forms = []
    for ascii_only in (False, True):
        form = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        html = form
        for character, code in (("<", "003c"), (">", "003e"), ("&", "0026"), ("'", "0027")):
            html = html.replace(character, f"\\u{code}")
        forms += [form, html]
    return [form for form in dict.fromkeys(forms) if form != value]


def _is_short(leaf: Leaf) -> bool:
    return not isinstance(leaf.value, str) or len(leaf.value) < _SURE_LENGTH


def _repeats(leaves: Sequence[Leaf]) -> bool:
    return len({leaf.value for leaf in leaves}) < len(leaves)


def _as_losses(
    leaves: Sequence[Leaf], found: Sequence[bool], messages: Sequence[Message]
) -> Losses:
    if all(found):
        return NO_LOSS
    lost_calls = {
        leaf.call
        for leaf, shown in zip(leaves, found, strict=True)
        if not shown and leaf.kind == CALL
    }
    last = len(messages) - 1
    kinds: set[str] = set()
    last_reasoning = False
    for leaf, shown in zip(leaves, found, strict=True):
        # A call that is missing is counted once, and not again for its arguments.
        if shown or (leaf.kind == ARGUMENT and leaf.call in lost_calls):
            continue
        kinds.add(leaf.kind)
        last_reasoning |= leaf.kind == REASONING and leaf.turn == last
    return Losses(frozenset(kinds), last_reasoning)


# --- sentinels ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _SentinelCopy:
    """A copy of a record in which every leaf is a unique sentinel.

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
        reasoning = _reasoning_keys(message)
        for key in REASONING_KEYS:
            if isinstance(message.get(key), str) and message[key].strip():
                # Keys with the same text are one leaf, and have the same sentinel.
                if key in reasoning:
                    sentinel = self._next()
                    self.shape.append(key)
                copy[key] = sentinel
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
            number = 918_000_000 + len(self.sentinels)
            self.sentinels.append(str(number))
            return number
        return value

    def _next(self) -> str:
        # Lowercase letters and digits only: no template changes or splits it.
        sentinel = f"zqx{len(self.sentinels):05d}xqz"
        self.sentinels.append(sentinel)
        return sentinel


def _skeleton(value: Any) -> Any:
    """A JSON value without its strings and numbers."""
    if isinstance(value, dict):
        return {key: _skeleton(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_skeleton(item) for item in value]
    return "" if isinstance(value, str) and not value.strip() else type(value).__name__

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

Builds and streams do not run the check yet: a record that needs the search costs too much.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sftprep.core.types import Message
from sftprep.render.content_leaves import (
    ANYWHERE,
    ARGUMENT,
    CALL,
    NAME,
    REASONING,
    TOOLS,
    Leaf,
    SentinelCopy,
    to_leaves,
)

_PLAIN_KEYS = frozenset({"role", "content"})
_SURE_LENGTH = 8
"""Shorter strings may occur in a text by chance."""
_SHAPES_KEPT = 4096

Render = Callable[[list[Message], list[Any] | None, dict[str, Any] | None], str]
"""Renders messages, tools and template variables to a text, or raises."""


@dataclass(frozen=True, slots=True)
class MissingContent:
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


NOTHING_MISSING = MissingContent()


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

    def find_missing(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        variables: dict[str, Any] | None,
        text: str,
        pieces: Sequence[str] | None = None,
    ) -> MissingContent:
        """Return what the text of a conversation lacks.

        Args:
            messages: The conversation.
            tools: Its tools.
            variables: Variables of the template that the record sets.
            text: The rendered conversation.
            pieces: The strings that make up the text, if the template is compiled.
        """
        if not tools and pieces is not None and _are_written_unchanged(messages, pieces):
            return NOTHING_MISSING
        leaves = [*to_leaves(messages, tools)]
        found = _search(leaves, text)
        unsure = [k for k, leaf in enumerate(leaves) if found[k] and _is_short(leaf)]
        if unsure or not all(found) or _repeats(leaves):
            hidden = self._hidden(messages, tools, variables, leaves)
            if hidden is not None:
                found = self._decide(leaves, found, hidden, text)
        return _to_missing_content(leaves, found, messages)

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
        copy = SentinelCopy()
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


# --- search ---------------------------------------------------------------------------------------


def _search(leaves: Sequence[Leaf], text: str) -> list[bool]:
    """Return for each leaf whether the text shows it, turn after turn."""
    found: list[bool] = []
    start = end = 0
    turn = 0
    for leaf in leaves:
        if leaf.turn == ANYWHERE:
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


def _to_missing_content(
    leaves: Sequence[Leaf], found: Sequence[bool], messages: Sequence[Message]
) -> MissingContent:
    if all(found):
        return NOTHING_MISSING
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
    return MissingContent(frozenset(kinds), last_reasoning)

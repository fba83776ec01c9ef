"""Which content of a conversation its rendered text lacks.

A chat template may omit what a record contains: earlier reasoning, the arguments of a call, the
text alongside a call. The model is then trained on something other than what the user wrote. The
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
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from sftprep.core.omissions import ARGUMENT, CALL, KEY, NAME, REASONING, TOOLS
from sftprep.core.types import Message
from sftprep.render.content_leaves import (
    ANYWHERE,
    Leaf,
    SentinelCopy,
    WrittenValues,
    to_leaves,
)

_SURE_LENGTH = 8
"""Shorter strings may occur in a text by chance."""
_UNESCAPED = re.compile(r"[A-Za-z0-9 .,]{8,64}")
"""A part of a string that JSON and Python write unchanged."""
_MOST_WORK = 1 << 28
"""The largest product of leaves and characters of the text that is searched."""
_SHAPES_KEPT = 4096
_MOST_MESSAGES_KEPT = 256
"""The sentinel rendering of a longer conversation is not kept: its shape rarely occurs again."""


class Conversation(NamedTuple):
    """What a chat template renders."""

    messages: list[Message]
    tools: list[Any] | None = None
    variables: dict[str, Any] | None = None
    """Variables of the template that the record sets."""


Render = Callable[[Conversation], str]
"""Renders a conversation to a text, or raises."""


@dataclass(frozen=True, slots=True)
class Omissions:
    """The omissions of one record: content that its text lacks.

    Attributes:
        kinds: The kinds, a subset of OMISSION_KINDS.
        last_reasoning: Whether the reasoning of the last turn is among them.
    """

    kinds: frozenset[str] = frozenset()
    last_reasoning: bool = False

    def __or__(self, other: Omissions) -> Omissions:
        return Omissions(self.kinds | other.kinds, self.last_reasoning or other.last_reasoning)

    def without(self, kind: str) -> Omissions:
        """Return the omissions without those of one kind."""
        return Omissions(self.kinds - {kind}, self.last_reasoning)

    @property
    def rejectable(self) -> frozenset[str]:
        """The kinds of omissions rejected under quarantine.

        They change what the model learns to answer. Earlier reasoning, tools and names are only
        counted.
        """
        counted = {TOOLS, NAME, KEY}
        return self.kinds - (counted if self.last_reasoning else {*counted, REASONING})


NO_OMISSIONS = Omissions()


class ConservationCheck:
    """The check for one chat template.

    Args:
        render: The template, as the records are rendered, without special treatment of anything.
        source: The source of the template.
    """

    def __init__(self, render: Render, source: str = "") -> None:
        self._render = render
        self._source = source
        # By shape, the numbers of the leaves that the sentinel rendering lacks; None where the
        # template refuses the sentinels.
        self._unwritten_by_shape: dict[Any, frozenset[int] | None] = {}

    def find_omissions(
        self,
        conversation: Conversation,
        text: str,
        pieces: Sequence[str] = (),
        written_as_json: Sequence[tuple[Any, str]] = (),
        unread_texts: Sequence[str] = (),
    ) -> Omissions:
        """Return what the text of a conversation lacks.

        Args:
            conversation: The conversation.
            text: The rendered conversation.
            pieces: The strings that make up the text, if the template is compiled.
            written_as_json: Values that the template converted to JSON, with the results.
            unread_texts: Texts of its turns that are under keys without a known meaning.
        """
        missing = self._find_leaf_omissions(conversation, text, pieces, written_as_json)
        is_shown = all_occur(unread_texts, [text])
        return missing if is_shown else missing | Omissions(frozenset({KEY}))

    def _find_leaf_omissions(
        self,
        conversation: Conversation,
        text: str,
        pieces: Sequence[str],
        written_as_json: Sequence[tuple[Any, str]],
    ) -> Omissions:
        messages = conversation.messages
        leaves = to_leaves(
            messages, conversation.tools, WrittenValues(text, pieces, written_as_json)
        )
        if leaves and pieces:
            leaves = self._without_pieces(leaves, messages, pieces)
        if not leaves:
            return NO_OMISSIONS
        if len(leaves) * len(text) <= _MOST_WORK and all(
            _cannot_be_in(leaf.value, text) for leaf in leaves
        ):
            return _to_omissions(leaves, messages)
        return self._search(conversation, text)

    def _without_pieces(
        self, leaves: list[Leaf], messages: Sequence[Message], pieces: Sequence[str]
    ) -> list[Leaf]:
        """Leave out the leaves that the template changed before it wrote them.

        Most templates strip contents, for example.

        A piece that equals a leaf is the leaf, unless the template or another value of the record
        could have written it: it must not be a string of the record itself, or occur in the source
        of the template, and there must be as many pieces as leaves.
        """
        unchanged = {id(value) for message in messages for value in message.values()}
        lengths = {len(leaf.value) for leaf in leaves if isinstance(leaf.value, str)}
        num_written = Counter(
            stripped
            for piece in pieces
            if len(stripped := piece.strip()) in lengths and id(piece) not in unchanged
        )
        num_leaves = Counter(leaf.value for leaf in leaves)
        return [
            leaf
            for leaf in leaves
            if not isinstance(leaf.value, str)
            or leaf.kind == TOOLS
            or num_written[leaf.value] < num_leaves[leaf.value]
            or leaf.value in self._source
        ]

    def _search(
        self,
        conversation: Conversation,
        text: str,
    ) -> Omissions:
        """Search for every leaf; decide uncertain cases with sentinels."""
        messages = conversation.messages
        leaves = to_leaves(messages, conversation.tools)
        if len(leaves) * len(text) > _MOST_WORK:
            # The search takes quadratic time, the sentinels do not.
            unwritten = self._find_unwritten(conversation, leaves)
            if unwritten is not None:
                return _to_omissions([leaves[number] for number in unwritten], messages)
            # Only a search without a result reads the whole text.
            found = _search_leaves(leaves, text, most_misses=1 + _MOST_WORK // len(text))
            omitted = [leaf for leaf, shown in zip(leaves, found, strict=True) if not shown]
            return _to_omissions(omitted, messages)
        found, unsure = _search_leaves(leaves, text), _find_ambiguous(leaves)
        if not all(found) or unsure:
            unwritten = self._find_unwritten(conversation, leaves)
            if unwritten is not None:
                found = [
                    number not in unwritten
                    if found[number] and number in unsure
                    # The search in order may have taken an occurrence of another leaf.
                    else found[number] or (number not in unwritten and _occurs(leaf.value, text))
                    for number, leaf in enumerate(leaves)
                ]
        omitted = [leaf for leaf, shown in zip(leaves, found, strict=True) if not shown]
        return _to_omissions(omitted, messages)

    def _find_unwritten(
        self,
        conversation: Conversation,
        leaves: list[Leaf],
    ) -> frozenset[int] | None:
        """Return the numbers of the leaves not written for a record of this shape.

        Returns:
            None if the template refuses the sentinels.
        """
        messages, tools, variables = conversation
        sentinel_copy = SentinelCopy()
        try:
            sentinel_messages = [sentinel_copy.copy_message(message) for message in messages]
            sentinel_tools = sentinel_copy.copy_tools(tools) if tools else tools
        except RecursionError:
            return None
        shape = (tuple(sentinel_copy.shape), json.dumps(variables, sort_keys=True, default=str))
        if shape in self._unwritten_by_shape:
            return self._unwritten_by_shape[shape]
        unwritten = None
        if len(sentinel_copy.sentinels) == len(leaves):
            with suppress(Exception):  # a template may refuse the sentinels for any reason
                sentinels = Conversation(sentinel_messages, sentinel_tools, variables)
                unwritten = sentinel_copy.find_unwritten(self._render(sentinels))
        if len(messages) <= _MOST_MESSAGES_KEPT:
            if len(self._unwritten_by_shape) >= _SHAPES_KEPT:
                self._unwritten_by_shape.clear()
            self._unwritten_by_shape[shape] = unwritten
        return unwritten


def are_written_unchanged(messages: Sequence[Message], pieces: Sequence[str]) -> bool:
    """Return whether each message has only a role and a content written unchanged.

    The contents must be among the pieces, in the order of the messages.

    It is called for every record, so it does as little as possible.
    """
    written = map(id, pieces)  # each search resumes after the piece that the last one found
    for message in messages:
        content = message.get("content")
        # Single characters and the empty string are the same object everywhere.
        if (
            len(message) != 2
            or type(content) is not str
            or len(content) < 2
            or id(content) not in written
        ):
            return False
    return True


# --- search ---------------------------------------------------------------------------------------


def all_occur(texts: Sequence[str], rendered: Sequence[str]) -> bool:
    """Return whether each text is in one of the rendered texts, in any spelling."""
    return all(any(_occurs(text, shown) for shown in rendered) for text in texts)


def _search_leaves(leaves: Sequence[Leaf], text: str, most_misses: int | None = None) -> list[bool]:
    """Return for each leaf whether the text shows it, turn after turn.

    Args:
        leaves: The leaves.
        text: The rendered text.
        most_misses: The number of missing leaves after which the others count as shown.
    """
    found: list[bool] = []
    start = end = misses = 0
    turn = 0
    for leaf in leaves:
        if most_misses is not None and misses >= most_misses:
            found.append(True)
            continue
        if leaf.turn == ANYWHERE:
            found.append(_occurs(leaf.value, text))
            continue
        if leaf.turn != turn:
            turn, start = leaf.turn, end
        position = -1
        if not _cannot_be_in(leaf.value, text):
            for form in _spellings(leaf.value):
                position = text.find(form, start)
                if position >= 0:
                    break
        found.append(position >= 0)
        misses += position < 0
        if position >= 0 and not _may_match_by_chance(leaf):
            end = max(end, position + len(form))
    return found


def _find_ambiguous(leaves: Sequence[Leaf]) -> set[int]:
    """Return the numbers of the leaves with possible matches by chance.

    They are the short leaves, those of tools, and those that occur in another leaf.
    """
    everything = "\0".join(str(leaf.value) for leaf in leaves)
    return {
        number
        for number, leaf in enumerate(leaves)
        if _may_match_by_chance(leaf) or everything.count(str(leaf.value)) > 1
    }


def _occurs(value: str | int | float, text: str) -> bool:
    return any(form in text for form in _spellings(value))


def _cannot_be_in(value: str | int | float, text: str) -> bool:
    """Return whether a text certainly contains no spelling of a value.

    This is certain if the text lacks a part common to all spellings.
    """
    if not isinstance(value, str):
        return False
    shared = _UNESCAPED.search(value)
    return shared is not None and shared[0] not in text


def _spellings(value: str | int | float) -> Iterator[str]:
    """Yield the forms of a value in templates, the frequent ones first."""
    if not isinstance(value, str):
        yield json.dumps(value)
        yield str(value)
        return
    yield value
    once = _json_spellings(value)
    yield from once
    # The arguments as JSON text that is written as JSON.
    for form in once:
        yield from _json_spellings(form)
    if (shown := repr(value)[1:-1]) != value:
        yield shown


def _json_spellings(value: str) -> list[str]:
    """Return the forms of a string inside JSON, if they differ from the string.

    The forms are with and without characters beyond ASCII, and as `tojson` escapes the string.
    """
    forms = []
    for ascii_only in (False, True):
        form = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        html = form
        for character, code in (("<", "003c"), (">", "003e"), ("&", "0026"), ("'", "0027")):
            html = html.replace(character, f"\\u{code}")
        forms += [form, html]
    return [form for form in dict.fromkeys(forms) if form != value]


def _may_match_by_chance(leaf: Leaf) -> bool:
    """Return whether other contents may contain the value of a leaf.

    Calls and their results repeat the names and values of tools.
    """
    return leaf.kind == TOOLS or not isinstance(leaf.value, str) or len(leaf.value) < _SURE_LENGTH


def _to_omissions(omitted: Sequence[Leaf], messages: Sequence[Message]) -> Omissions:
    """Summarize the omitted leaves."""
    omitted_calls = {leaf.call for leaf in omitted if leaf.kind == CALL}
    last = len(messages) - 1
    # A call that is omitted is counted once, and not again for its arguments.
    counted = [leaf for leaf in omitted if leaf.kind != ARGUMENT or leaf.call not in omitted_calls]
    return Omissions(
        frozenset(leaf.kind for leaf in counted),
        any(leaf.kind == REASONING and leaf.turn == last for leaf in counted),
    )

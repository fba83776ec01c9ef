"""Which content of a conversation its rendered text lacks.

A chat template may omit what a record contains: earlier reasoning, the arguments of a call, the
text alongside a call. The model is then trained on something other than what the user wrote. The
check:

1. Every string and number that carries meaning is a `Leaf`: contents, reasoning, names and
   arguments of calls, tools, names of speakers. Booleans, null, roles and ids are not searched for.
2. A second rendering, in which every leaf is a unique sentinel, shows what the template writes:
   fixed text, with a slot for each leaf that it does not drop. Records of the same shape (roles,
   keys, kinds of leaves) share this rendering. If a text is this fixed text with the leaves of its
   record in the slots, the leaves without a slot are missing (`sentinels.py`).
3. A text that does not fit depends on the values. Then the leaves of a turn are searched for after
   those of the turn before, in each spelling that templates use (raw, JSON with its escapes, Python
   repr); system messages and tools are searched for anywhere. What may be found by chance, because
   it is short, or in the fixed text or another string of the record, is decided by the sentinels.
   The text must have as many occurrences as the record has values, besides those in the fixed text
   and within other values (`spellings.count_missing`).
4. If the template refuses the sentinels, a leaf that may be found by chance is decided by a
   rendering in which it alone is changed (`leaf_probe.py`).

Cost: most records need no check, because all of their contents are among the rendered pieces
(`written_contents.py`, `written_values.py`). The tests compare the check with sentinels that
transformers renders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from sftprep.core.json_values import iter_leaves
from sftprep.core.omissions import ARGUMENT, CALL, KEY, NAME, REASONING, TOOLS
from sftprep.core.types import Message
from sftprep.render.omissions.content_leaves import (
    Leaf,
    find_other_names,
    find_structural_strings,
    to_leaves,
)
from sftprep.render.omissions.leaf_probe import LeafProbe
from sftprep.render.omissions.leaf_search import (
    find_ambiguous,
    may_match_by_chance,
    remove_missing,
    search_leaves,
)
from sftprep.render.omissions.sentinels import SentinelCopy, SentinelRendering
from sftprep.render.omissions.spellings import all_occur, cannot_be_in, occurs
from sftprep.render.omissions.unread_keys import UnreadCopy
from sftprep.render.omissions.written_values import WrittenValues

_ID = re.compile(r"(?:\.|\b|_)id\b")
"""What the source of a template contains if it reads ids."""
_MOST_WORK = 1 << 28
"""The largest product of leaves and characters of the text that is searched."""
_SHAPES_KEPT = 4096
_MOST_CHARACTERS_KEPT = 1 << 23
"""The limits on the sentinel renderings that are kept: their number, and their characters."""
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
        self._has_ids = not source or _ID.search(source) is not None
        # By shape; None where the template refuses the sentinels.
        self._sentinels_by_shape: dict[Any, SentinelRendering | None] = {}
        self._characters_kept = 0  # of the sentinel renderings

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
        last = [len(conversation.messages) - 1]
        if unread_texts and not self.shows_unread_keys(conversation, last, unread_texts, [text]):
            missing |= Omissions(frozenset({KEY}))
        if not self._shows_names_of_results(conversation, text):
            missing |= Omissions(frozenset({NAME}))
        return missing

    def shows_unread_keys(
        self,
        conversation: Conversation,
        last_turns: Sequence[int],
        unread_texts: Sequence[str],
        rendered: Sequence[str],
    ) -> bool:
        """Return whether the template writes the texts under keys without a known meaning.

        Args:
            conversation: The conversation.
            last_turns: The number of the last message in each of its renderings.
            unread_texts: The texts.
            rendered: The renderings. They may contain the texts by chance, as the template writes
                words and numbers of its own.
        """
        if not all_occur(unread_texts, rendered):
            return False
        copy = UnreadCopy(unread_texts)
        messages = [copy.copy_message(message) for message in conversation.messages]
        if copy.remaining:  # no message has it, so it is in the text by chance
            return False
        try:
            texts = [
                self._render(conversation._replace(messages=messages[: last + 1]))
                for last in last_turns
            ]
        except Exception:  # a template may refuse the sentinels for any reason
            return not any(map(may_match_by_chance, unread_texts))
        return all(any(sentinel in text for text in texts) for sentinel in copy.sentinels)

    def _shows_names_of_results(self, conversation: Conversation, text: str) -> bool:
        """Return whether the template writes the names of results that their calls do not have."""
        messages = [*conversation.messages]
        changed = []
        for number, is_answer in find_other_names(messages):
            name = messages[number]["name"]
            if is_answer or not occurs(name.strip(), text):
                changed.append(f"zqx{number:08d}xqz")
                messages[number] = {**messages[number], "name": changed[-1]}
        if not changed:
            return True
        try:
            rendered = self._render(conversation._replace(messages=messages))
        except Exception:  # a template may refuse other names for any reason
            return all(
                occurs(old["name"].strip(), text)
                for old, new in zip(conversation.messages, messages, strict=True)
                if old is not new
            )
        return all(name in rendered for name in changed)

    def _find_leaf_omissions(
        self,
        conversation: Conversation,
        text: str,
        pieces: Sequence[str],
        written_as_json: Sequence[tuple[Any, str]],
    ) -> Omissions:
        messages, tools, _ = conversation
        others = ""
        if written_as_json:
            others = "\0".join([self._source, *_iter_strings(messages)])
        unproven = to_leaves(messages, tools, WrittenValues(text, pieces, written_as_json, others))
        if not unproven:
            return NO_OMISSIONS
        if len(unproven) * len(text) <= _MOST_WORK and all(
            cannot_be_in(leaf.value, text) for leaf in unproven
        ):
            return _to_omissions(unproven, messages)
        leaves = to_leaves(messages, tools)
        rendering = self._render_sentinels(conversation, leaves)
        # The search takes quadratic time, the sentinels do not.
        is_long = len(leaves) * len(text) > _MOST_WORK
        if rendering is not None and (is_long or rendering.fits(leaves, text)):
            lacking = [leaf for k, leaf in enumerate(leaves) if rendering.lacks(k, leaf.value)]
            return _to_omissions(lacking, messages)
        if is_long:
            # Only a search without a result reads the whole text.
            found = search_leaves(leaves, text, most_misses=1 + _MOST_WORK // len(text))
        else:
            found = self._search(conversation, leaves, text, {*map(_identify, unproven)}, rendering)
        omitted = [leaf for leaf, is_found in zip(leaves, found, strict=True) if not is_found]
        return _to_omissions(omitted, messages)

    def _search(
        self,
        conversation: Conversation,
        leaves: list[Leaf],
        text: str,
        unproven: Container[_LeafId],
        rendering: SentinelRendering | None,
    ) -> list[bool]:
        """Return which leaves are in a text that depends on their values.

        The leaves that are not known to be written are searched for. Those that may be found by
        chance are decided with sentinels.
        """
        in_order = search_leaves(leaves, text)
        numbers = [number for number, leaf in enumerate(leaves) if _identify(leaf) in unproven]
        fixed = self._source if rendering is None else rendering.structure
        messages, tools, variables = conversation
        structural = find_structural_strings(messages)
        unsure = find_ambiguous(leaves, numbers, structural, fixed)
        found = [True] * len(leaves)
        probe = LeafProbe(
            lambda messages, tools: self._render(Conversation(messages, tools, variables)),
            messages,
            tools,
            text,
        )
        for number in numbers:
            value = leaves[number].value
            if rendering is None:
                is_certain = not in_order[number] or number not in unsure
                found[number] = in_order[number] if is_certain else probe.shows(number, value)
                continue
            is_written = not rendering.lacks(number, value)
            # The search in order may have taken an occurrence of another leaf.
            found[number] = (
                is_written
                if in_order[number] and number in unsure
                else in_order[number] or (is_written and occurs(value, text))
            )
        if rendering is not None:
            # A template may leave out a leaf because of its value, which sentinels do not have.
            examined = [number for number in numbers if number in unsure or not in_order[number]]
            remove_missing(leaves, found, in_order, examined, text, fixed)
        return found

    def _render_sentinels(
        self, conversation: Conversation, leaves: list[Leaf]
    ) -> SentinelRendering | None:
        """Return the sentinel rendering for a record of this shape.

        Returns:
            None if the template refuses the sentinels.
        """
        messages, tools, variables = conversation
        sentinel_copy = SentinelCopy(self._has_ids)
        try:
            sentinel_messages = [sentinel_copy.copy_message(message) for message in messages]
            sentinel_tools = sentinel_copy.copy_tools(tools) if tools else tools
        except RecursionError:
            return None
        shape = (tuple(sentinel_copy.shape), json.dumps(variables, sort_keys=True, default=str))
        if shape in self._sentinels_by_shape:
            return self._sentinels_by_shape[shape]
        rendering = None
        if len(sentinel_copy.sentinels) == len(leaves):
            with suppress(Exception):  # a template may refuse the sentinels for any reason
                sentinels = Conversation(sentinel_messages, sentinel_tools, variables)
                rendering = sentinel_copy.read(self._render(sentinels))
        if len(messages) <= _MOST_MESSAGES_KEPT:
            if (
                len(self._sentinels_by_shape) >= _SHAPES_KEPT
                or self._characters_kept >= _MOST_CHARACTERS_KEPT
            ):
                self._sentinels_by_shape.clear()
                self._characters_kept = 0
            self._sentinels_by_shape[shape] = rendering
            self._characters_kept += 0 if rendering is None else sum(map(len, rendering.fixed))
        return rendering


_LeafId = tuple[str, int, str | int | float]
"""The kind, turn and value of a leaf."""


def _identify(leaf: Leaf) -> _LeafId:
    return leaf.kind, leaf.turn, leaf.value


def _iter_strings(messages: Sequence[Message]) -> Iterator[str]:
    """Yield the strings of messages; of a message with two keys, the content is sufficient."""
    for message in messages:
        content = message.get("content")
        if type(content) is str:
            yield content
        if len(message) > 2 or type(content) is not str:
            yield from (leaf for leaf in iter_leaves(message) if isinstance(leaf, str))


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

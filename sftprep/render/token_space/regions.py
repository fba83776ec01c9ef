"""Trained regions of a rendered conversation as boundaries between anchors.

The results are those of the reference path (`chat_template/assistant_spans.py`), found in the
pieces of a compiled template, without character positions. Each function returns its result, or a
short reason why the conversation has to take the reference path. None of them raises an error about
a conversation: the reference path determines what is wrong with it.

Regions are lists of integers: for each region, the index of the anchor and the literal (see
`Boundary`) of its start and of its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from sftprep.chat_template.assistant_spans import TurnRule, contents_of
from sftprep.chat_template.compiler.compilation import RenderedPieces
from sftprep.core.types import Message
from sftprep.render.token_space.anchors import Anchors, Ending

BEFORE = -1
"""Instead of a literal: the region ends before the anchor, not after it. As on the reference path,
it ends with the first token of its last character."""
AT = -2
"""Instead of a literal: the boundary is the first token of the anchor itself."""
_MOST_LITERALS = 200
_LONGEST_LITERAL = 200
"""Characters. A longer text between an anchor and a boundary is content, not a literal."""

# The reasons are names of counters, so their wording is fixed.
_NOT_AT_ANCHOR = "a region does not start or end at a special token"


class Boundary(NamedTuple):
    """A boundary of a region, in terms of an anchor."""

    anchor_index: int  # index of the anchor in its text; the number of anchors: the end of the text
    # Index of the text (see `Literals`) that begins with the anchor and ends at the boundary, or
    # BEFORE or AT.
    literal: int


class Literals:
    """Literals with their indices: an anchor and the text up to a boundary.

    Example:
        The header "<|im_start|>assistant\\n" is the literal of the anchor "<|im_start|>" with the
        tail "assistant\\n".
    """

    def __init__(self, anchors: Anchors) -> None:
        self._anchors = anchors
        self._numbers: dict[tuple[str, str], int | None] = {}  # None: cannot be a literal
        self.texts: list[str] = []  # each literal with its anchor
        self.tails: list[str] = []  # what follows the anchor in each of them

    def number(self, anchor: str, tail: str) -> int | None:
        """Return the index of an anchor with a tail, None if it cannot be a literal."""
        known = self._numbers.get((anchor, tail), -1)
        if known != -1:
            return known
        if len(self.texts) >= _MOST_LITERALS or len(tail) > _LONGEST_LITERAL:
            return None
        number, text = None, anchor + tail
        # A normalizer may change text that is not ASCII.
        if tail.isascii() and not any(token in text for token in self._anchors.unsafe):
            number = len(self.texts)
            self.texts.append(text)
            self.tails.append(tail)
        self._numbers[anchor, tail] = number
        return number


class RegionFinder:
    """A finder of the regions of conversations rendered by one template.

    Most turns differ only in their content, so what was found for one turn is reused for others.
    """

    def __init__(self, anchors: Anchors) -> None:
        self.anchors = anchors
        self.literals = Literals(anchors)
        self._endings: dict[str, Ending | None] = {}  # by piece
        self._headers: dict[str, tuple[int, int | None]] = {}  # see _header
        self._closings: dict[str, int] = {}  # last anchor with whitespace -> its literal
        # Turns with any content, by their first `_num_header_pieces` pieces and their last one: the
        # anchor index of the start relative to the turn, and the literals of the start and the end.
        self._known_turns: dict[tuple[str, ...], tuple[int, int, int]] = {}
        self._num_header_pieces = 1

    def marked_regions(self, rendering: RenderedPieces) -> list[int] | str:
        """Return the regions marked by `{% generation %}`."""
        found: list[int] = []
        marks = iter(rendering.marks)
        for first, first_anchor, last, last_anchor in zip(marks, marks, marks, marks, strict=True):
            start: Boundary | None = Boundary(first_anchor, AT)
            if not self._is_at_anchor(rendering, first):
                start = self._after_literal(rendering, first, first_anchor)
            end = self._region_end(rendering, last, last_anchor)
            if start is None or end is None:
                return _NOT_AT_ANCHOR
            found += (*start, *end)
        return found

    def prompt_end(self, whole: RenderedPieces, prompt: RenderedPieces) -> Boundary | str:
        """Return where the completion of a conversation starts.

        The literal is what the prompt writes after its last anchor; the conversation may continue
        differently from there on.

        Args:
            whole: The whole conversation.
            prompt: Its prompt, rendered alone.
        """
        boundary = self._after_literal(prompt, len(prompt.pieces), prompt.anchors)
        if boundary is None:
            return "the prompt does not end with a literal after a special token"
        tail = len(self.literals.tails[boundary.literal])
        if not whole.text.startswith(prompt.text[: len(prompt.text) - tail]):
            return "the template writes the prompt differently when it is rendered alone"
        return boundary

    def derived_regions(
        self, rendering: RenderedPieces, rule: TurnRule, numbers: Sequence[int]
    ) -> list[int] | str:
        """Return the regions of some assistant turns, under a derived rule.

        Args:
            rendering: The conversation.
            rule: The rule of the template.
            numbers: The indices of the messages, in ascending order.
        """
        messages = rendering.messages
        if rule.tools_fault is not None and any(
            message.get("role") == "tool" or message.get("tool_calls") for message in messages
        ):
            return "turns alongside tools are not proven"
        found = _find_message_loop(rendering, messages)
        if found is None or (numbers and numbers[0] < found[1]):
            return "the template does not write each message in a turn of its own"
        turns, first_message = found
        pieces, known_turns, size = rendering.pieces, self._known_turns, self._num_header_pieces
        regions: list[int] = []
        for number in numbers:
            at = 4 * (number - first_message)
            first, anchor_index, last, next_anchor = (
                turns[at],
                turns[at + 1],
                turns[at + 4],
                turns[at + 5],
            )
            # Most turns are like an earlier one, apart from their content, which is one of the
            # pieces.
            message = messages[number]
            known = known_turns.get((*pieces[first : first + size], pieces[last - 1]))
            if known is not None:
                written = pieces[first + size : last]
                if message.get("content") in written or _is_shown(message, written):
                    regions += (anchor_index + known[0], known[1], next_anchor - 1, known[2])
                    continue
            region = self._find_turn(rendering, turns[at : at + 6], message, rule)
            if isinstance(region, str):
                return region
            regions += region
        if rule.closes_conversation and len(messages) - 1 in numbers:
            piece, anchor_index = turns[-4:-2]
            has_closing = "".join(rendering.pieces[piece:]).strip()
            if has_closing and not self._is_at_anchor(rendering, piece):
                return _NOT_AT_ANCHOR
            regions += (anchor_index, AT, rendering.anchors, BEFORE) if has_closing else ()
        return regions

    def _find_turn(
        self, rendering: RenderedPieces, marks: Sequence[Any], message: Message, rule: TurnRule
    ) -> tuple[int, int, int, int] | str:
        """Return the region of one assistant turn.

        Args:
            marks: The mark of this turn, and the position of the next one.
        """
        first, anchor_index, _, _, last, next_anchor = marks
        pieces = rendering.pieces
        text = pieces[first] if last - first == 1 else "".join(pieces[first:last])
        # 1. The start: after the header, or after the last anchor if the header is empty.
        for header in rule.headers:
            if text.startswith(header):
                break
        else:
            return "a turn does not start with the header of the template"
        start_literal: int | None
        if header:
            num_anchors, start_literal = self._header(header)
            start_anchor = anchor_index + num_anchors - 1
        else:
            start_anchor, start_literal = self._after_literal(rendering, first, anchor_index) or (
                0,
                None,
            )
        # 2. The end: after the last anchor of the turn, without whitespace.
        closing, end = "", None
        if not rule.ends_turns:
            end = self._region_end(rendering, last, next_anchor)
        elif start_literal is not None:
            closing, number = self._closing(text)
            end = None if number is None else Boundary(next_anchor - 1, number)
        if start_literal is None or end is None or end.anchor_index <= start_anchor:
            return _NOT_AT_ANCHOR
        # 3. The turn must contain its message. Searching for a long content takes ten times as long
        # as comparing it at the one position where it usually is.
        content = message.get("content")
        if (
            type(content) is str
            and content
            and text.endswith(content, len(header), len(text) - len(closing))
        ):
            if header and closing and pieces[last - 1].endswith(closing):
                region = (start_anchor - anchor_index, start_literal, end.literal)
                self._remember_turn(pieces[first:last], header, region)
            return start_anchor, start_literal, *end
        written = text[len(header) :].rstrip() if rule.ends_turns else text[len(header) :]
        if not written or not _is_written(message, written):
            return "a message is not written as it is in the record"
        return start_anchor, start_literal, *end

    def _remember_turn(self, pieces: list[str], header: str, region: tuple[int, int, int]) -> None:
        """Store the region of a turn, for turns with the same pieces around the content."""
        size = 1
        while sum(map(len, pieces[:size])) < len(header):
            size += 1
        key = *pieces[:size], pieces[-1]
        if size == len(pieces) or sum(map(len, key)) > _LONGEST_LITERAL:
            return  # the content is a part of these pieces
        if not self._known_turns:
            self._num_header_pieces = size
        if size == self._num_header_pieces and len(self._known_turns) < _MOST_LITERALS:
            self._known_turns[key] = region

    def _header(self, header: str) -> tuple[int, int | None]:
        """Return the number of anchors in a header, and the literal of its last one."""
        found = self._headers.get(header)
        if found is None:
            ending = self.anchors.ending(header)
            literal = None if ending is None else self.literals.number(*ending)
            found = self._headers[header] = self.anchors.count(header), literal
        return found

    def _closing(self, text: str) -> tuple[str, int | None]:
        """Return the last anchor of a turn with the whitespace after it, and its literal.

        The literal is None if other text follows.
        """
        for closing, number in self._closings.items():
            if text.endswith(closing):
                return closing, number
        ending = self.anchors.ending(text[-_LONGEST_LITERAL:])
        if ending is None or ending.tail.strip():
            return "", None
        literal = self.literals.number(ending.anchor, "")
        closing = ending.anchor + ending.tail
        if literal is not None and len(self._closings) < _MOST_LITERALS:
            self._closings[closing] = literal
        return closing, literal

    def _after_literal(
        self, rendering: RenderedPieces, piece: int, anchor_index: int
    ) -> Boundary | None:
        """Return a boundary after the literal of the last anchor before a piece.

        Args:
            anchor_index: The number of anchors before the piece.
        """
        tail = ""
        for index in range(piece - 1, -1, -1):
            ending = self._ending(rendering.pieces[index])
            if ending is not None:
                literal = self.literals.number(ending.anchor, ending.tail + tail)
                return None if literal is None else Boundary(anchor_index - 1, literal)
            tail = rendering.pieces[index] + tail
            if len(tail) > _LONGEST_LITERAL:
                return None
        return None

    def _region_end(
        self, rendering: RenderedPieces, piece: int, anchor_index: int
    ) -> Boundary | None:
        """Return the end of a region.

        It is before the next anchor if that follows immediately, otherwise as in `_after_literal`.
        """
        previous = rendering.pieces[piece - 1] if piece else ""
        if previous.endswith(self.anchors.texts):
            # The region ends with an anchor, which is included, whatever follows.
            return self._after_literal(rendering, piece, anchor_index)
        if self.anchors.prepends:
            return None  # the space that is added after an anchor may count as the last character
        if self._is_at_anchor(rendering, piece):
            return Boundary(anchor_index, BEFORE)
        return self._after_literal(rendering, piece, anchor_index)

    def _is_at_anchor(self, rendering: RenderedPieces, piece: int) -> bool:
        """Return whether a piece starts with an anchor, or is the end of the text."""
        pieces = rendering.pieces
        while piece < len(pieces) and not pieces[piece]:
            piece += 1
        return piece == len(pieces) or pieces[piece].startswith(self.anchors.texts)

    def _ending(self, piece: str) -> Ending | None:
        """Return the last anchor of a piece.

        The result is cached for short pieces, which are the constants.
        """
        if len(piece) > _LONGEST_LITERAL:
            return self.anchors.ending(piece[-_LONGEST_LITERAL:])
        if piece not in self._endings:
            if len(self._endings) >= _MOST_LITERALS:
                self._endings.clear()
            self._endings[piece] = self.anchors.ending(piece)
        return self._endings[piece]


def _find_message_loop(
    rendering: RenderedPieces, messages: Sequence[Message]
) -> tuple[Sequence[Any], int] | None:
    """Find the one loop over the messages.

    Returns:
        Its marks as in `RenderedPieces.turns`, from one of the messages to the last one, with the
        mark after the loop; and the index of the first message. None if there is not exactly one
        such loop.
    """
    marks = rendering.turns
    if not marks or marks[-2] or marks[-1] is not None:
        return None
    items = marks[3::4]
    # The usual case: a single loop over all messages.
    if len(items) == len(messages) + 1 and all(map(is_, items, messages)):
        return marks, 0
    turns = [*zip(marks[::4], marks[1::4], marks[2::4], items, strict=True)]
    # A loop inside a turn may iterate over tool calls or parts, but not over messages.
    if any(depth and _is_message(item) for _, _, depth, item in turns):
        return None
    turns = [turn for turn in turns if not turn[2]]
    ends = [number for number, turn in enumerate(turns[:-1]) if turn[3] is None]
    if ends:
        earlier, turns = turns[: ends[-1] + 1], turns[ends[-1] + 1 :]
        if earlier[0][0] != earlier[-1][0] and any(_is_message(turn[3]) for turn in earlier):
            return None  # an earlier loop may have written a part of a message
    # Templates may write the first messages, such as a system message, before the loop.
    first_message = len(messages) - len(turns) + 1
    if first_message < 0:
        return None
    items, in_loop = [turn[3] for turn in turns[:-1]], messages[first_message:]
    is_same = all(map(is_, items, in_loop)) or all(map(_is_copy, items, in_loop))
    return ([*chain(*turns)], first_message) if is_same else None


def _is_copy(item: Any, message: Message) -> bool:
    """Return whether a template built an item from exactly one message.

    See `turn_tracking.regions_of`.
    """
    return (
        type(item) is dict
        and item is not message
        and item.get("role") == message.get("role")
        and type(message.get("content") or "") is str
        and (item.get("content") or "") == (message.get("content") or "")
    )


def _is_message(item: Any) -> bool:
    return type(item) is dict and "role" in item


def _is_shown(message: Message, pieces: Sequence[str]) -> bool:
    """Return whether the pieces of a turn alone prove it `_is_written`."""
    content = message.get("content")
    return bool(message.get("tool_calls")) or (
        type(content) is str and content.rpartition("</think>")[2].strip() in (*pieces, "")
    )


def _is_written(message: Message, written_text: str) -> bool:
    """Return whether a turn contains its message.

    The rule is that of `chat_template/assistant_spans.py`.
    """
    content = message.get("content")
    if isinstance(content, str) and content.strip() in written_text:
        return True
    return bool(message.get("tool_calls")) or all(
        text in written_text or text.rpartition("</think>")[2].strip() in written_text
        for text in contents_of(message)
    )

"""The trained regions of a rendered conversation as positions between anchors.

Each function returns what the reference path would train (`chat_template/assistant_spans.py`), or a
short reason why the conversation has to take the reference path. Regions are lists of integers: the
ordinal and the literal (`Boundary`) of the start of a region and of its end, and so on. None of
them raises an error about a conversation: the reference path finds out what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from sftprep.chat_template.assistant_spans import TurnRule, contents_of
from sftprep.chat_template.compiler.statements import Pieces
from sftprep.core.types import Message
from sftprep.render.token_space.anchors import Anchors, Ending

BEFORE = -1
"""Instead of the number of a literal: a region ends before the anchor, not after it. As in the
reference path, it ends with the first token of its last character."""
AT = -2
"""Instead of the number of a literal: the boundary is the first token of the anchor itself."""
_MOST_LITERALS = 200
_LONGEST_LITERAL = 200
"""Characters. A longer text between an anchor and a boundary is content, not a literal."""


class Boundary(NamedTuple):
    """ordinal: number of an anchor within its text, from 0; the number of anchors stands for the
    end of the text. literal: number of the text that begins with the anchor and ends at the
    boundary, or BEFORE or AT."""

    ordinal: int
    literal: int


class Literals:
    """The texts of an anchor and what follows it up to a boundary, numbered."""

    def __init__(self, anchors: Anchors) -> None:
        self._anchors = anchors
        self._numbers: dict[tuple[str, str], int | None] = {}
        self.texts: list[str] = []
        self.tails: list[str] = []
        """What follows the anchor in each of them."""

    def number(self, anchor: str, tail: str) -> int | None:
        """The number of an anchor and the literal after it; None if it cannot be one."""
        known = self._numbers.get((anchor, tail), -1)
        if known != -1:
            return known
        if len(self.texts) >= _MOST_LITERALS or len(tail) > _LONGEST_LITERAL:
            return None
        number, text = None, anchor + tail
        if tail.isascii() and not any(token in text for token in self._anchors.unsafe):
            number = len(self.texts)
            self.texts.append(text)
            self.tails.append(tail)
        self._numbers[anchor, tail] = number
        return number


class RegionFinder:
    """Finds the regions of conversations that one template rendered."""

    def __init__(self, anchors: Anchors) -> None:
        self.anchors = anchors
        self.literals = Literals(anchors)
        self._endings: dict[str, Ending | None] = {}
        self._headers: dict[str, tuple[int, int | None]] = {}
        self._closings: dict[str, int] = {}
        self._known_turns: dict[tuple[str, ...], tuple[int, int, int]] = {}
        self._header_pieces = 1

    def marked(self, made: Pieces) -> list[int] | str:
        """The regions that `{% generation %}` marks."""
        found: list[int] = []
        marks = iter(made.marks)
        for first, before, last, after in zip(marks, marks, marks, marks, strict=True):
            start: Boundary | None = Boundary(before, AT)
            if not self._is_at_anchor(made, first):
                start = self._after(made, first, before)
            end = self._end(made, last, after)
            if start is None or end is None:
                return "a region does not start or end at a special token"
            found += (*start, *end)
        return found

    def prompt_end(self, whole: Pieces, prompt: Pieces) -> Boundary | str:
        """Where the completion of a conversation starts, whose prompt is rendered alone as well.

        The literal is what the prompt writes after its last anchor; the conversation may continue
        differently from there on.
        """
        boundary = self._after(prompt, len(prompt.pieces), prompt.anchors)
        if boundary is None:
            return "the prompt does not end with a literal after a special token"
        tail = len(self.literals.tails[boundary.literal])
        if not whole.text.startswith(prompt.text[: len(prompt.text) - tail]):
            return "the template writes the prompt differently when it stands alone"
        return boundary

    def derived(self, made: Pieces, rule: TurnRule, wanted: Sequence[int]) -> list[int] | str:
        """The regions of these messages, which are assistant turns, under a derived rule."""
        messages = made.messages
        if rule.tools is not None and any(
            message.get("role") == "tool" or message.get("tool_calls") for message in messages
        ):
            return "turns beside tools are not proven"
        found = _loop_over(made, messages)
        if found is None or (wanted and wanted[0] < found[1]):
            return "the template does not write each message in a turn of its own"
        turns, shift = found
        pieces, known_turns, size = made.pieces, self._known_turns, self._header_pieces
        regions: list[int] = []
        for number in wanted:
            at = 4 * (number - shift)
            first, ordinal, last, after = turns[at], turns[at + 1], turns[at + 4], turns[at + 5]
            # Most turns look like one before, apart from their content, which is one of the pieces.
            message = messages[number]
            known = known_turns.get((*pieces[first : first + size], pieces[last - 1]))
            if known is not None:
                written = pieces[first + size : last]
                if message.get("content") in written or _is_shown(message, written):
                    regions += (ordinal + known[0], known[1], after - 1, known[2])
                    continue
            region = self._turn(made, turns[at : at + 6], message, rule)
            if isinstance(region, str):
                return region
            regions += region
        if rule.closes and len(messages) - 1 in wanted:
            place, ordinal = turns[-4:-2]
            closes = "".join(made.pieces[place:]).strip()
            if closes and not self._is_at_anchor(made, place):
                return "a region does not start or end at a special token"
            regions += (ordinal, AT, made.anchors, BEFORE) if closes else ()
        return regions

    def _turn(
        self, made: Pieces, notes: Sequence[Any], message: Message, rule: TurnRule
    ) -> tuple[int, int, int, int] | str:
        """The region of one assistant turn. notes: that of the loop at this turn, and the place of
        the next."""
        first, ordinal, _, _, last, after = notes
        pieces = made.pieces
        text = pieces[first] if last - first == 1 else "".join(pieces[first:last])
        for header in rule.headers:
            if text.startswith(header):
                break
        else:
            return "a turn does not start with the header of the template"
        literal: int | None
        if header:
            count, literal = self._header(header)
            opened = ordinal + count - 1
        else:
            opened, literal = self._after(made, first, ordinal) or (0, None)
        closing, ended = "", None
        if not rule.ends:
            ended = self._end(made, last, after)
        elif literal is not None:
            closing, number = self._closing(text)
            ended = None if number is None else Boundary(after - 1, number)
        if literal is None or ended is None or ended.ordinal <= opened:
            return "a region does not start or end at a special token"
        content = message.get("content")
        # To look for a long text takes ten times as long as to compare it at one place.
        if (
            type(content) is str
            and content
            and text.endswith(content, len(header), len(text) - len(closing))
        ):
            if header and closing and pieces[last - 1].endswith(closing):
                self._remember(pieces[first:last], header, (opened - ordinal, literal, ended[1]))
            return opened, literal, *ended
        written = text[len(header) :].rstrip() if rule.ends else text[len(header) :]
        if not written or not _is_written(message, written):
            return "a message is not written as it is in the record"
        return opened, literal, *ended

    def _remember(self, pieces: list[str], header: str, region: tuple[int, int, int]) -> None:
        """Keep what a turn of these pieces is, with any content between its header and its last
        piece."""
        size = 1
        while sum(map(len, pieces[:size])) < len(header):
            size += 1
        known = *pieces[:size], pieces[-1]
        if size == len(pieces) or sum(map(len, known)) > _LONGEST_LITERAL:
            return  # the content is a part of them
        if not self._known_turns:
            self._header_pieces = size
        if size == self._header_pieces and len(self._known_turns) < _MOST_LITERALS:
            self._known_turns[known] = region

    def _header(self, header: str) -> tuple[int, int | None]:
        """How many anchors a header contains, and the number of its last one and what follows."""
        found = self._headers.get(header)
        if found is None:
            ending = self.anchors.ending(header)
            literal = None if ending is None else self.literals.number(*ending)
            found = self._headers[header] = self.anchors.count(header), literal
        return found

    def _closing(self, text: str) -> tuple[str, int | None]:
        """The last anchor of a turn with the whitespace after it, and the number of the anchor;
        None if other text follows."""
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

    def _after(self, made: Pieces, piece: int, ordinal: int) -> Boundary | None:
        """A boundary after the literal of the last anchor before a piece."""
        tail = ""
        for place in range(piece - 1, -1, -1):
            ending = self._ending(made.pieces[place])
            if ending is not None:
                literal = self.literals.number(ending.anchor, ending.tail + tail)
                return None if literal is None else Boundary(ordinal - 1, literal)
            tail = made.pieces[place] + tail
            if len(tail) > _LONGEST_LITERAL:
                return None
        return None

    def _end(self, made: Pieces, piece: int, ordinal: int) -> Boundary | None:
        """The end of a region: before the next anchor if it follows at once, otherwise as
        `_after`."""
        before = made.pieces[piece - 1] if piece else ""
        if before.endswith(self.anchors.texts):
            # What an anchor has written last belongs to the anchor, whatever follows.
            return self._after(made, piece, ordinal)
        if self.anchors.prepends:
            return None  # the blank that is added after an anchor may count as the last character
        if self._is_at_anchor(made, piece):
            return Boundary(ordinal, BEFORE)
        return self._after(made, piece, ordinal)

    def _is_at_anchor(self, made: Pieces, piece: int) -> bool:
        """Whether an anchor, or the end of the text, follows."""
        pieces = made.pieces
        while piece < len(pieces) and not pieces[piece]:
            piece += 1
        return piece == len(pieces) or pieces[piece].startswith(self.anchors.texts)

    def _ending(self, piece: str) -> Ending | None:
        """The last anchor of a piece, remembered for short pieces, which are the constants."""
        if len(piece) > _LONGEST_LITERAL:
            return self.anchors.ending(piece[-_LONGEST_LITERAL:])
        if piece not in self._endings:
            if len(self._endings) >= _MOST_LITERALS:
                self._endings.clear()
            self._endings[piece] = self.anchors.ending(piece)
        return self._endings[piece]


def _loop_over(made: Pieces, messages: Sequence[Message]) -> tuple[Sequence[Any], int] | None:
    """The notes of the one loop that writes the messages, as in `Pieces.turns`, from one of them to
    the last, with that after the loop; and the number of the first message. None if there is not
    exactly one."""
    notes = made.turns
    if not notes or notes[-2] or notes[-1] is not None:
        return None
    items = notes[3::4]
    if len(items) == len(messages) + 1 and all(map(is_, items, messages)):
        return notes, 0
    turns = [*zip(notes[::4], notes[1::4], notes[2::4], items, strict=True)]
    # A loop inside a turn may go through tool calls or parts, but not through messages.
    if any(depth and _is_message(item) for _, _, depth, item in turns):
        return None
    turns = [turn for turn in turns if not turn[2]]
    ends = [number for number, turn in enumerate(turns[:-1]) if turn[3] is None]
    if ends:
        earlier, turns = turns[: ends[-1] + 1], turns[ends[-1] + 1 :]
        if earlier[0][0] != earlier[-1][0] and any(_is_message(turn[3]) for turn in earlier):
            return None  # an earlier loop may have written a part of a message
    shift = len(messages) - len(turns) + 1
    if shift < 0:
        return None
    items, written = [turn[3] for turn in turns[:-1]], messages[shift:]
    same = all(map(is_, items, written)) or all(map(_is_copy, items, written))
    return ([*chain(*turns)], shift) if same else None


def _is_copy(item: Any, message: Message) -> bool:
    """Whether a template made an item of a message, and not of several (`turns.regions_of`)."""
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
    """Whether it is known from pieces of a turn alone that `_is_written`."""
    content = message.get("content")
    return bool(message.get("tool_calls")) or (
        type(content) is str and content.rpartition("</think>")[2].strip() in (*pieces, "")
    )


def _is_written(message: Message, written: str) -> bool:
    """Whether a turn contains its message. Source: the rule of
    `chat_template/assistant_spans.py`."""
    content = message.get("content")
    if isinstance(content, str) and content.strip() in written:
        return True
    return bool(message.get("tool_calls")) or all(
        text in written or text.rpartition("</think>")[2].strip() in written
        for text in contents_of(message)
    )

"""Conversations whose texts are not made: contents as they are written, in the frames of their
shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, overload

import numpy as np
import orjson
from numpy.typing import NDArray

from sftprep.chat.shapes import Shape
from sftprep.chat.written import BETWEEN, Writer, order_of
from sftprep.ragged import SLOT
from sftprep.sources.plain import Turns
from sftprep.tokenize.between import COMMA
from sftprep.tokenize.fast import FastEncoder
from sftprep.tokenize.seams import Frame, Heads, Seams, encode_framed
from sftprep.tokenize.tokens import Tokens


class Framing(NamedTuple):
    """A shape cut at the seams of its tokenizer. order: of its tails and contents
    (`Writer.order`)."""

    shape: Shape
    frame: Frame
    order: NDArray[np.int64]


class Framer:
    """Frames shapes for one tokenizer. heads: those that were encoded so far."""

    def __init__(self, seams: Seams) -> None:
        self.seams, self.heads = seams, Heads()
        self._writer = Writer(b'"', orjson.dumps(seams.between.text)[1:-1], b'"')
        self._commas = {BETWEEN: self._writer.number(COMMA)} if seams.commas else {}
        """Numbers of literals that start with a comma, by those of the same with a token
        instead."""
        self._after = cache(self._number_after)

    def framing(self, shape: Shape) -> Framing | None:
        """None where the literals of a shape, which are Unicode, cannot be cut."""
        frame = self.seams.frame(shape.literals)
        if frame is None:
            return None
        first, *others = frame.tails
        return Framing(
            shape, frame, order_of([self._writer.number(first), *map(self._after, others)])
        )

    def _number_after(self, tail: str) -> int:
        """The number of a tail that stands after a content, with a token before it; the same with a
        comma is known then too."""
        number = self._writer.number(self.seams.between.text + tail)
        if self.seams.commas:
            self._commas[number] = self._writer.number(COMMA + tail)
        return number

    def framed(
        self, turns: Turns, numbers: NDArray[np.int64], framings: Sequence[Framing]
    ) -> Framed:
        """Conversations by their numbers, in order. Raises orjson.JSONDecodeError where a content
        is no text."""
        contents = turns.written(numbers)
        order = np.concatenate([each.order for each in framings])
        commas = 0
        if self._commas:
            with_commas = np.arange(max(*self._commas, *self._commas.values()) + 1)
            with_commas[[*self._commas]] = [*self._commas.values()]
            after = np.flatnonzero(order == SLOT)[turns.ends[turns.rows(numbers)]] + 1
            order[after] = with_commas[order[after]]
            # Nothing stands after the last content.
            commas = len(after) - int(len(after) > 0 and after[-1] == len(order) - 1)
        return Framed(turns, numbers, framings, self._writer.read(order, contents), commas, self)


@dataclass(frozen=True)
class Framed(Sequence[str]):
    """Conversations of `turns`, some of them, by their numbers; as a sequence, their texts, each
    made when it is asked for.

    joined: their tails and contents, with tokens and so many commas between them.
    """

    turns: Turns
    numbers: NDArray[np.int64]
    framings: Sequence[Framing]
    joined: str
    commas: int
    framer: Framer

    @property
    def origin(self) -> list[int]:
        """Lines of the conversations."""
        lines: list[int] = self.turns.lines[self.numbers].tolist()
        return lines

    def encode(self, encoder: FastEncoder) -> Tokens | None:
        """Ids of the texts; None where they have to be made. Raises EncoderFault."""
        frames = [each.frame for each in self.framings]
        return encode_framed(encoder, frames, self.joined, self.commas, self.framer.heads)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, text: int) -> str: ...
    @overload
    def __getitem__(self, text: slice) -> list[str]: ...
    def __getitem__(self, text: int | slice) -> str | list[str]:
        if isinstance(text, slice):
            return [self[number] for number in range(*text.indices(len(self)))]
        return self.framings[text].shape.fill(self.turns.contents_of(self.numbers[text]))[0]

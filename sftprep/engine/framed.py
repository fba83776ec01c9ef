"""Conversations whose texts are not made: contents as they are written, in the frames of their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import orjson
from numpy.typing import NDArray

from sftprep.chat.shapes import Shape
from sftprep.chat.written import Writer
from sftprep.sources.plain import Turns
from sftprep.tokenize.fast import FastEncoder
from sftprep.tokenize.seams import Frame, Heads, Seams, encode_framed
from sftprep.tokenize.tokens import Tokens


class Framing(NamedTuple):
    """A shape cut at the seams of its tokenizer. order: of its tails and contents (`Writer.order`)."""

    shape: Shape
    frame: Frame
    order: NDArray[np.int64]


class Framer:
    """Frames shapes for one tokenizer. heads: those that were encoded so far."""

    def __init__(self, seams: Seams) -> None:
        self.seams, self.heads = seams, Heads()
        self._writer = Writer(b'"', orjson.dumps(seams.between.text)[1:-1], b'"')

    def framing(self, shape: Shape) -> Framing | None:
        """None where the literals of a shape cannot be cut."""
        frame = self.seams.frame(shape.literals)
        if frame is None:
            return None
        first, *others = frame.tails
        order = self._writer.order((first, *(self.seams.between.text + tail for tail in others), ""))
        return None if order is None else Framing(shape, frame, order)

    def framed(self, turns: Turns, numbers: NDArray[np.int64], framings: Sequence[Framing]) -> Framed:
        """Conversations by their numbers, in order. Raises orjson.JSONDecodeError where a content is no text."""
        joined = self._writer.read([each.order for each in framings], turns.written(numbers))
        return Framed(turns, numbers, framings, joined, self)


@dataclass(frozen=True)
class Framed(Sequence[str]):
    """Conversations of `turns`, some of them, by their numbers; as a sequence, their texts, each made when it is asked for."""

    turns: Turns
    numbers: NDArray[np.int64]
    framings: Sequence[Framing]
    joined: str
    framer: Framer

    @property
    def origin(self) -> list[int]:
        """Lines of the conversations."""
        lines: list[int] = self.turns.lines[self.numbers].tolist()
        return lines

    def encode(self, encoder: FastEncoder) -> Tokens | None:
        """Ids of the texts; None where they have to be made. Raises EncoderFault."""
        frames = [each.frame for each in self.framings]
        return encode_framed(encoder, frames, self.joined, self.framer.seams, self.framer.heads)

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

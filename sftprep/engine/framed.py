"""Conversations whose texts are not made: contents as they are written, in the frames of their shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from sftprep.chat.shapes import Shape
from sftprep.chat.written import Literals, joined_written, literals_of
from sftprep.sources.plain import Turns
from sftprep.tokenize.fast import FastEncoder
from sftprep.tokenize.seams import Frame, FramedIds, Seams, encode_framed
from sftprep.tokenize.tokens import Tokens


class Framing(NamedTuple):
    """A shape cut at the seams of its tokenizer. tails: with what stands between parts before each but the first."""

    shape: Shape
    frame: Frame
    tails: Literals


class Framer:
    """Frames shapes for one tokenizer. encoded: what the frames were encoded to so far."""

    def __init__(self, seams: Seams) -> None:
        self.seams = seams
        self.encoded: dict[Frame, FramedIds] = {}

    def framing(self, shape: Shape) -> Framing | None:
        """None where the literals of a shape cannot be cut."""
        frame = self.seams.frame(shape.literals)
        if frame is None:
            return None
        first, *others = frame.tails
        tails = literals_of((first, *(self.seams.between.text + tail for tail in others), ""))
        return None if tails is None else Framing(shape, frame, tails)

    def framed(self, turns: Turns, framings: Mapping[int, Framing]) -> Framed:
        """Conversations by their numbers, in order. Raises orjson.JSONDecodeError where a content is no text."""
        tails = (each.tails for each in framings.values())
        joined = joined_written(tails, turns.written(framings), self.seams.between.text)
        return Framed(turns, [*framings], [*framings.values()], joined, self)


@dataclass(frozen=True)
class Framed(Sequence[str]):
    """Conversations of `turns`, some of them, by their numbers; as a sequence, their texts, each made when it is asked for."""

    turns: Turns
    numbers: list[int]
    framings: list[Framing]
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
        return encode_framed(encoder, frames, self.joined, self.framer.seams, self.framer.encoded)

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

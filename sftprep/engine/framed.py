"""Conversations whose texts are not made: contents as they are written, in the frames of their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from sftprep.chat.shapes import Shape
from sftprep.chat.written import Literals
from sftprep.sources.plain import Turns
from sftprep.tokenize.seams import Frame, FramedIds, PartsEncoder, Seams, encode_framed
from sftprep.tokenize.tokens import Tokens


class Framing(NamedTuple):
    """A shape cut at the seams of its tokenizer. tails: with what stands between parts before each but the first."""

    shape: Shape
    frame: Frame
    tails: Literals


@dataclass(frozen=True)
class Framed(Sequence[str]):
    """Conversations of `turns`, some of them, by their numbers; as a sequence, their texts, each made when it is asked for."""

    turns: Turns
    numbers: list[int]
    framings: list[Framing]
    joined: str
    seams: Seams
    known: dict[Frame, FramedIds]

    @property
    def origin(self) -> list[int]:
        """Lines of the conversations."""
        lines: list[int] = self.turns.lines[self.numbers].tolist()
        return lines

    def encode(self, encoder: PartsEncoder) -> Tokens | None:
        """Ids of the texts; None where they have to be made. Raises EncoderFault."""
        return encode_framed(encoder, [each.frame for each in self.framings], self.joined, self.seams, self.known)

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

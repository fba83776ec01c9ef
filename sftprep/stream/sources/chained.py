"""Sources one after the other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sftprep.stream.sources.base import PART_BITS, Block, Cursor, LaneAssignment, Reader, Source


@dataclass(frozen=True)
class Chain:
    """Inputs in the order given. first_parts: number of the first part of each."""

    sources: tuple[Source, ...]
    first_parts: tuple[int, ...]

    @property
    def identity(self) -> Any:
        """Those of its inputs."""
        return [source.identity for source in self.sources]

    def open(self, dealt: LaneAssignment) -> Reader:
        """An input is opened when a lane comes to it."""
        return _ChainReader(self, dealt)

    def locate(self, origin: int) -> tuple[str, int]:
        """As the input says that it is of."""
        part = origin >> PART_BITS
        return self.sources[
            max(k for k, first in enumerate(self.first_parts) if first <= part)
        ].locate(origin)


class _ChainReader:
    """Cursor: number of the input, and the cursor in it."""

    def __init__(self, source: Chain, dealt: LaneAssignment) -> None:
        self.source, self.dealt = source, dealt
        self._readers: dict[int, Reader] = {}
        self._last = 0

    @property
    def reading(self) -> str:
        return self._reader(self._last).reading

    @property
    def queued(self) -> int:
        return sum(reader.queued for reader in self._readers.values())

    def has_queued(self, lane: int, cursor: Cursor) -> bool:
        number, inner = cursor or (0, None)
        return number in self._readers and self._readers[number].has_queued(lane, inner)

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        number, inner = cursor or (0, None)
        while number < len(self.source.sources):
            self._last = number
            block = self._reader(number).read(lane, inner)
            if block is not None:
                return Block(block.pieces, block.origins, [number, block.after])
            number, inner = number + 1, None
        return None

    def _reader(self, number: int) -> Reader:
        if number not in self._readers:
            starts = {lane: self.dealt.start.get(lane) or (0, None) for lane in self.dealt.lanes}
            lanes = tuple(lane for lane in self.dealt.lanes if starts[lane][0] <= number)
            begin = {lane: starts[lane][1] for lane in lanes if starts[lane][0] == number}
            self._readers[number] = self.source.sources[number].open(
                dataclasses.replace(self.dealt, lanes=lanes, start=begin)
            )
        return self._readers[number]

"""Several sources, read one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sftprep.stream.sources.base import PART_BITS, Block, Cursor, LaneAssignment, Reader, Source


@dataclass(frozen=True)
class Chain:
    """A chain of sources, in order.

    Attributes:
        sources: The sources.
        first_parts: The number of the first part of each.
    """

    sources: tuple[Source, ...]
    first_parts: tuple[int, ...]

    @property
    def identity(self) -> Any:
        """Return the identities of the sources."""
        return [source.identity for source in self.sources]

    def open(self, assignment: LaneAssignment) -> Reader:
        """Start or resume a pass; a source is opened when a lane reaches it."""
        return _ChainReader(self, assignment)

    def locate(self, origin: int) -> tuple[str, int]:
        """Return what the source of an origin returns."""
        return source_of_origin(self.sources, self.first_parts, origin).locate(origin)


def source_of_origin(sources: Sequence[Source], first_parts: Sequence[int], origin: int) -> Source:
    """Return the source of an origin: the last one with a first part not after it."""
    part = origin >> PART_BITS
    return sources[max(k for k, first in enumerate(first_parts) if first <= part)]


class _ChainReader:
    """A reader of chained sources.

    A cursor is the number of the source, and the cursor in it.
    """

    def __init__(self, source: Chain, assignment: LaneAssignment) -> None:
        self.source, self.assignment = source, assignment
        self._readers: dict[int, Reader] = {}  # by the number of the source, opened on demand
        self._last = 0  # the source that was read last

    @property
    def reading(self) -> str:
        return self._reader_of(self._last).reading

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
            block = self._reader_of(number).read(lane, inner)
            if block is not None:
                return Block(block.groups, block.origins, [number, block.next_cursor])
            number, inner = number + 1, None
        return None

    def _reader_of(self, number: int) -> Reader:
        if number not in self._readers:
            lanes, starts = self.assignment.lanes, self.assignment.start
            start_of = {lane: starts.get(lane) or (0, None) for lane in lanes}
            # Lanes that start in a later source never read this one.
            lanes = tuple(lane for lane in lanes if start_of[lane][0] <= number)
            inner = {lane: start_of[lane][1] for lane in lanes if start_of[lane][0] == number}
            self._readers[number] = self.source.sources[number].open(
                dataclasses.replace(self.assignment, lanes=lanes, start=inner)
            )
        return self._readers[number]

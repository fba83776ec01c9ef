"""Sources mixed by weights, record by record."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import edges
from sftprep.core.types import Rejected, TokenBatch
from sftprep.errors import ConfigError
from sftprep.stream.sources.base import (
    PART_BITS,
    Block,
    Cursor,
    LaneAssignment,
    Piece,
    Reader,
    Source,
)

Stop = Literal["all", "first"]

_RECORDS, _BYTES = 256, 256 * 1024
"""A block of a mixture ends at the one or the other."""

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Mixture:
    """Several sources side by side: of each lane's records, source k gives the share weights[k] /
    sum(weights).

    sources: whatever a stream takes; weights: positive. stop: "all", a source that has ended leaves
    its share to the others until all have; "first", a lane ends with the first source that ends in
    it, and at once where one has no record for it. Of two sources, each is less than one record
    away from its share in every lane after every record (of n sources less than n - 1), and the
    lanes begin at different points of the turn, so that this does not add up over them.
    """

    sources: Sequence[Any]
    weights: Sequence[float]
    stop: Stop = "all"

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.weights) or not self.sources:
            raise ConfigError(
                f"{len(self.sources)} sources have {len(self.weights)} weights",
                remedy="give one weight for each source",
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ConfigError(
                f"the weights are {list(self.weights)}", remedy="give positive numbers"
            )
        if self.stop not in ("all", "first"):
            raise ConfigError(f"stop is {self.stop!r}", remedy="choose one of: all, first")


@dataclass(frozen=True)
class Mixed:
    """A mixture whose sources are opened. first_parts: number of the first part of each."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    stop: Stop
    first_parts: tuple[int, ...] = field(default=())

    @property
    def identity(self) -> Any:
        """Sources, weights, when it stops, and the rule of the turns."""
        return [
            [source.identity for source in self.sources],
            list(self.weights),
            self.stop,
            "by records",
        ]

    def open(self, dealt: LaneAssignment) -> Reader:
        """Every source is read by the lanes of the stream."""
        return _MixedReader(self, dealt)

    def locate(self, origin: int) -> tuple[str, int]:
        """As the source says that it is of."""
        part = origin >> PART_BITS
        return self.sources[
            max(k for k, first in enumerate(self.first_parts) if first <= part)
        ].locate(origin)


def in_places(batches: Sequence[TokenBatch], places: Sequence[NDArray[np.int64]]) -> TokenBatch:
    """The sequences of the pieces of a block as one batch, in the order of their records.

    places: for each batch the number in the block of each of its lines, int64 [lines].
    """
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update(batch.counts)
    origins = np.concatenate(
        [place[batch.origin] for batch, place in zip(batches, places, strict=True)]
    )
    lengths = np.concatenate([batch.lengths for batch in batches])
    joined = TokenBatch(
        np.concatenate([batch.input_ids for batch in batches]),
        edges(lengths),
        np.concatenate([batch.completion_mask for batch in batches]),
        origins,
        loss_weights=_weights(batches),
    )
    order = np.argsort(origins, kind="stable")
    merged = joined.gathered(order, lengths[order])
    merged.counts = dict(counts)
    rejected = [
        Rejected(int(place[one.line]), one.column, one.reason, one.message, one.excerpt)
        for batch, place in zip(batches, places, strict=True)
        for one in batch.rejected
    ]
    merged.rejected = sorted(rejected, key=lambda one: one.line)
    return merged


def _weights(batches: Sequence[TokenBatch]) -> NDArray[np.float32] | None:
    """What every token weighs, None where no batch says so."""
    if all(batch.loss_weights is None for batch in batches):
        return None
    return np.concatenate(
        [
            np.ones(len(batch.input_ids), np.float32)
            if batch.loss_weights is None
            else batch.loss_weights
            for batch in batches
        ]
    )


@dataclass(frozen=True, slots=True)
class _Stock:
    """A block of one source, by lines: each with its format and whether it is blank."""

    cursor: Cursor
    after: Cursor
    lines: list[tuple[bytes, str, bool]]
    origins: NDArray[np.int64]


@dataclass(slots=True)
class _Place:
    """Where a lane stands in one source: cursor of a block, lines taken of it; records taken in
    all; 1 where it has ended."""

    cursor: Cursor = None
    line: int = 0
    taken: int = 0
    ended: int = 0


class _MixedReader:
    """Cursor: the place in each source, as a list."""

    def __init__(self, source: Mixed, dealt: LaneAssignment) -> None:
        self.source = source
        self._of = dealt.of
        self._readers = []
        for k, one in enumerate(source.sources):
            starts = {lane: at[k][0] for lane, at in dealt.start.items() if at is not None}
            self._readers.append(one.open(dataclasses.replace(dealt, start=starts)))
        self._last = 0
        # What the block being made is taken from. It stays where a source raises: going back means
        # a new start to some.
        self._stocks: dict[int, list[list[_Stock]]] = {
            lane: [[] for _ in self._readers] for lane in dealt.lanes
        }

    @property
    def reading(self) -> str:
        return self._readers[self._last].reading

    @property
    def queued(self) -> int:
        return sum(reader.queued for reader in self._readers)

    def has_queued(self, lane: int, cursor: Cursor) -> bool:
        """Whether one of the sources has queued the next block that the lane reads of it."""
        places = [_Place(*one) for one in cursor] if cursor else [_Place() for _ in self._readers]
        return any(
            reader.has_queued(lane, kept[-1].after if kept else place.cursor)
            for place, kept, reader in zip(places, self._stocks[lane], self._readers, strict=True)
            if not place.ended
        )

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        places = [_Place(*one) for one in cursor] if cursor else [_Place() for _ in self._readers]
        stocks = [self._filled(lane, k, place) for k, place in enumerate(places)]
        lines: list[tuple[bytes, str, bool]] = []
        origins: list[int] = []
        size = 0
        while len(lines) < _RECORDS and size < _BYTES:
            turn = self._turn(lane, places)
            if turn is None:
                break
            place, stock = places[turn], stocks[turn]
            assert stock is not None
            line = stock.lines[place.line]
            lines.append(line)
            origins.append(int(stock.origins[place.line]))
            size += len(line[0])
            place.line += 1
            place.taken += not line[2]  # a blank line is no record
            if place.line == len(stock.lines):
                stocks[turn] = self._filled(lane, turn, place)
        if not lines:
            return None
        self._stocks[lane] = [[one] if one is not None else [] for one in stocks]
        after = [[place.cursor, place.line, place.taken, place.ended] for place in places]
        return Block(_pieces(lines), np.array(origins, np.int64), after)

    def _turn(self, lane: int, places: list[_Place]) -> int | None:
        """The source that is furthest behind its share, None where the lane ends."""
        weights = self.source.weights
        due = [
            ((place.taken + _phase(lane, self._of, k)) / weights[k], k)
            for k, place in enumerate(places)
            if not place.ended
        ]
        if not due:
            return None
        first, turn = min(due)
        if self.source.stop == "first" and any(
            place.ended and first >= place.taken / weights[k] for k, place in enumerate(places)
        ):
            return None
        return turn

    def _filled(self, lane: int, k: int, place: _Place) -> _Stock | None:
        """The block that holds the next line of a source, to which its place is moved; None where
        the source has ended."""
        while not place.ended:
            stock = self._stock(lane, k, place.cursor)
            if stock is None:
                place.ended = 1
            elif place.line < len(stock.lines):
                return stock
            else:
                place.cursor, place.line = stock.after, 0
        return None

    def _stock(self, lane: int, k: int, cursor: Cursor) -> _Stock | None:
        kept = self._stocks[lane][k]
        for one in kept:
            if one.cursor == cursor:
                return one
        self._last = k
        block = self._readers[k].read(lane, cursor)
        if block is None:
            return None
        kept.append(_Stock(cursor, block.after, _lines(block), block.origins))
        return kept[-1]


def _phase(lane: int, of: int, k: int) -> float:
    """Where in its turn a source begins in a lane, from 0 to 1: spread evenly over the lanes, and
    differently for each source."""
    return ((lane + 0.5) / of + k * _GOLDEN) % 1.0


def _lines(block: Block) -> list[tuple[bytes, str, bool]]:
    """The lines of a block in order, each with its format and whether it is blank."""
    found: list[tuple[bytes, str, bool]] = [(b"", "", True)] * len(block.origins)
    for piece in block.pieces:
        lines = piece.data.split(b"\n")
        numbers = range(len(block.origins)) if piece.places is None else piece.places.tolist()
        for number, line in zip(
            numbers, lines, strict=False
        ):  # after the last newline nothing comes
            found[number] = (line + b"\n", piece.format, not line.strip())
    return found


def _pieces(lines: list[tuple[bytes, str, bool]]) -> tuple[Piece, ...]:
    """One of each format."""
    by_format: dict[str, list[int]] = {}
    for number, (_, name, _) in enumerate(lines):
        by_format.setdefault(name, []).append(number)
    return tuple(
        Piece(b"".join(lines[number][0] for number in numbers), name, np.array(numbers, np.int64))
        for name, numbers in by_format.items()
    )

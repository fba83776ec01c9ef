"""Sources mixed by weights, record by record.

In each lane, the source that is furthest behind its share provides the next record:

1. The progress of source k is (records taken from it + phase) / weight; the source with the least
   progress is next. The phase, from 0 to 1, differs between lanes and sources, so that rounding
   does not add up over the lanes.
2. Records are taken until a block is full. They are grouped by format and transform, since the
   tokenizing step reads one kind at a time; the positions in the block restore their order
   afterwards.
3. The cursor of a lane is its position in each source.

Of two sources, each is less than one record away from its share after every record of a lane; of n
sources, less than n - 1 records.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftprep.config.user_functions import LoadedFunction, to_function_setting
from sftprep.core.ragged import to_offsets
from sftprep.core.types import Rejected, TokenBatch
from sftprep.errors import ConfigError, setting
from sftprep.stream.sources.base import Block, Cursor, LaneAssignment, LineGroup, Reader, Source
from sftprep.stream.sources.chained import source_of_origin

Stop = Literal["all", "first"]

_BLOCK_RECORDS, _BLOCK_BYTES = 256, 256 * 1024
"""A block of a mixture ends at either of these."""

_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class Mixture:
    """Several sources in parallel, each with its share of the records of every lane.

    Args:
        sources: Any inputs that a stream can read.
        weights: Positive numbers; source k provides the share weights[k] / sum(weights).
        stop: "all": a source that has ended leaves its share to the others, until all have ended.
            "first": a lane ends with the first source that ends in it, and is empty if a source
            has no record for it.
        transforms: The `transform` of each source; None for that of the stream.

    Example:
        Mixture(["chats.jsonl", "code.jsonl"], weights=[3, 1])
    """

    sources: Sequence[Any]
    weights: Sequence[float]
    stop: Stop = "all"
    transforms: Sequence[Any] = ()

    def __post_init__(self) -> None:
        transforms = tuple(to_function_setting(f, setting("transform")) for f in self.transforms)
        object.__setattr__(self, "transforms", transforms)
        if transforms and len(transforms) != len(self.sources):
            raise ConfigError(
                f"{len(self.sources)} sources have {len(transforms)} transforms",
                remedy="specify one transform for each source, or None",
            )
        if len(self.sources) != len(self.weights) or not self.sources:
            raise ConfigError(
                f"{len(self.sources)} sources have {len(self.weights)} weights",
                remedy="specify one weight for each source",
            )
        if not all(0 < weight <= sys.float_info.max for weight in self.weights):
            raise ConfigError(
                f"the weights are {list(self.weights)!s:.200}", remedy="use positive numbers"
            )
        if self.stop not in ("all", "first"):
            raise ConfigError(f"stop is {self.stop!r}", remedy="choose one of: all, first")


@dataclass(frozen=True)
class OpenedMixture:
    """A mixture with its inputs resolved to sources.

    Attributes:
        sources, weights, stop: See `Mixture`.
        first_parts: The number of the first part of each source.
        transforms: The transform of each source, None for that of the stream.
        keys: What distinguishes the records of each source, if some have a transform of their own.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    stop: Stop
    first_parts: tuple[int, ...] = field(default=())
    transforms: tuple[LoadedFunction | None, ...] = field(default=())
    keys: tuple[str, ...] = field(default=())

    @property
    def identity(self) -> Any:
        """Return the sources, their weights, the end, and the name of the mixing rule."""
        return [
            [source.identity for source in self.sources],
            list(self.weights),
            self.stop,
            "by records",
            *self.keys,
        ]

    def open(self, assignment: LaneAssignment) -> Reader:
        """Start or resume a pass, with the same lanes in each source."""
        return _MixtureReader(self, assignment)

    def locate(self, origin: int) -> tuple[str, int]:
        """Return what the source of an origin returns."""
        return source_of_origin(self.sources, self.first_parts, origin).locate(origin)


def merge_batches(
    batches: Sequence[TokenBatch], positions: Sequence[NDArray[np.int64]]
) -> TokenBatch:
    """Merge the groups of a block to one batch, in the order of their records.

    Args:
        batches: The sequences of each group.
        positions: int64 [lines] for each group, the index of each of its lines in the block.

    Example:
        Groups with the lines 0, 1, 3 and with line 2 give a batch with the lines 0, 1, 2, 3.
    """
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update(batch.counts)
    # Concatenate the batches, then sort the sequences by their line in the block.
    line_of = np.concatenate(
        [lines[batch.line_of] for batch, lines in zip(batches, positions, strict=True)]
    )
    lengths = np.concatenate([batch.lengths for batch in batches])
    joined = TokenBatch(
        np.concatenate([batch.input_ids for batch in batches]),
        to_offsets(lengths),
        np.concatenate([batch.completion_mask for batch in batches]),
        line_of,
        loss_weights=_concatenate_weights(batches),
    )
    order = np.argsort(line_of, kind="stable")
    merged = joined.gather(order, lengths[order])
    merged.counts = dict(counts)
    rejected = [
        Rejected(int(lines[r.line]), r.column, r.reason, r.message, r.excerpt)
        for batch, lines in zip(batches, positions, strict=True)
        for r in batch.rejected
    ]
    merged.rejected = sorted(rejected, key=lambda r: r.line)
    for batch, lines in zip(batches, positions, strict=True):
        for name, line in batch.first_lines.items():
            first = int(lines[line])
            merged.first_lines[name] = min(first, merged.first_lines.get(name, first))
    return merged


def _concatenate_weights(batches: Sequence[TokenBatch]) -> NDArray[np.float32] | None:
    """Return the weight of every token, or None if no batch has weights."""
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


class _Line(NamedTuple):
    """A line of a block, with its newline."""

    data: bytes
    kind: tuple[str, LoadedFunction | None]  # its format and its transform
    is_whitespace: bool


@dataclass(frozen=True, slots=True)
class _SourceBlock:
    """A block of one source, split into lines."""

    cursor: Cursor  # of this block
    next_cursor: Cursor  # of the next block
    lines: list[_Line]
    origins: NDArray[np.int64]  # int64 [lines]


@dataclass(slots=True)
class _Position:
    """The position of a lane in one source; a list of the four values in a cursor."""

    cursor: Cursor = None  # of the current block
    line: int = 0  # number of lines that were taken from that block
    num_taken: int = 0  # number of records that were taken in all
    ended: int = 0  # 1 if the source has ended


class _MixtureReader:
    """A reader of a mixture.

    A cursor is the position in each source, as a list of lists.
    """

    def __init__(self, source: OpenedMixture, assignment: LaneAssignment) -> None:
        self.source = source
        self._num_lanes = assignment.num_lanes
        self._readers = []
        for k, inner in enumerate(source.sources):
            starts = {lane: at[k][0] for lane, at in assignment.start.items() if at is not None}
            self._readers.append(inner.open(dataclasses.replace(assignment, start=starts)))
        self._last = 0  # the source that was read last
        # By lane and source: the blocks that the current block is taken from. They are kept if a
        # source raises, since going back would restart sources that are read from their start.
        self._blocks: dict[int, list[list[_SourceBlock]]] = {
            lane: [[] for _ in self._readers] for lane in assignment.lanes
        }

    @property
    def reading(self) -> str:
        return self._readers[self._last].reading

    @property
    def queued(self) -> int:
        return sum(reader.queued for reader in self._readers)

    def has_queued(self, lane: int, cursor: Cursor) -> bool:
        """Return whether any source has queued the next block of the lane."""
        positions = self._parse(cursor)
        return any(
            reader.has_queued(lane, blocks[-1].next_cursor if blocks else position.cursor)
            for position, blocks, reader in zip(
                positions, self._blocks[lane], self._readers, strict=True
            )
            if not position.ended
        )

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        positions = self._parse(cursor)
        blocks = [self._current_block(lane, k, position) for k, position in enumerate(positions)]
        lines: list[_Line] = []
        origins: list[int] = []
        size = 0
        while len(lines) < _BLOCK_RECORDS and size < _BLOCK_BYTES:
            k = self._next_source(lane, positions)
            if k is None:
                break
            position, block = positions[k], blocks[k]
            assert block is not None
            line = block.lines[position.line]
            lines.append(line)
            origins.append(int(block.origins[position.line]))
            size += len(line.data)
            position.line += 1
            position.num_taken += not line.is_whitespace  # which is not a record
            if position.line == len(block.lines):
                blocks[k] = self._current_block(lane, k, position)
        if not lines:
            return None
        self._blocks[lane] = [[block] if block is not None else [] for block in blocks]
        after = [[at.cursor, at.line, at.num_taken, at.ended] for at in positions]
        return Block(_group_by_kind(lines), np.array(origins, np.int64), after)

    def _parse(self, cursor: Cursor) -> list[_Position]:
        if not cursor:
            return [_Position() for _ in self._readers]
        return [_Position(*values) for values in cursor]

    def _next_source(self, lane: int, positions: list[_Position]) -> int | None:
        """Return the source furthest behind its share, or None if the lane ends."""
        weights = self.source.weights
        progress = [
            ((position.num_taken + _phase(lane, self._num_lanes, k)) / weights[k], k)
            for k, position in enumerate(positions)
            if not position.ended
        ]
        if not progress:
            return None
        least, k = min(progress)
        # With stop="first", the lane ends when an ended source would be next.
        if self.source.stop == "first" and any(
            position.ended and least >= position.num_taken / weights[i]
            for i, position in enumerate(positions)
        ):
            return None
        return k

    def _current_block(self, lane: int, k: int, position: _Position) -> _SourceBlock | None:
        """Advance a position to the next line, and return its block, or None at the end."""
        while not position.ended:
            block = self._block_at(lane, k, position.cursor)
            if block is None:
                position.ended = 1
            elif position.line < len(block.lines):
                return block
            else:
                position.cursor, position.line = block.next_cursor, 0
        return None

    def _block_at(self, lane: int, k: int, cursor: Cursor) -> _SourceBlock | None:
        kept = self._blocks[lane][k]
        for block in kept:
            if block.cursor == cursor:
                return block
        self._last = k
        read = self._readers[k].read(lane, cursor)
        if read is None:
            return None
        lines = _split_lines(read, self.source.transforms[k] if self.source.transforms else None)
        kept.append(_SourceBlock(cursor, read.next_cursor, lines, read.origins))
        return kept[-1]


def _phase(lane: int, num_lanes: int, k: int) -> float:
    """Return the phase of a source in a lane, from 0 to 1.

    The phases are evenly spread over the lanes.
    """
    # Multiples of the golden ratio give each source another order of the lanes.
    return ((lane + 0.5) / num_lanes + k * _GOLDEN_RATIO) % 1.0


def _split_lines(block: Block, transform: LoadedFunction | None) -> list[_Line]:
    """Return the lines of a block in order, with their transforms.

    A transform is that of an inner mixture, if there is one.
    """
    lines = [_Line(b"", ("", None), True)] * len(block.origins)
    for group in block.groups:
        split = group.data.split(b"\n")
        indices = range(len(block.origins)) if group.positions is None else group.positions.tolist()
        # Not strict: the part after the last newline is empty.
        for index, line in zip(indices, split, strict=False):
            kind = group.format, group.transform or transform
            lines[index] = _Line(line + b"\n", kind, not line.strip())
    return lines


def _group_by_kind(lines: list[_Line]) -> tuple[LineGroup, ...]:
    indices_of: dict[tuple[str, LoadedFunction | None], list[int]] = {}
    for index, line in enumerate(lines):
        indices_of.setdefault(line.kind, []).append(index)
    return tuple(
        LineGroup(
            b"".join(lines[index].data for index in indices),
            name,
            np.array(indices, np.int64),
            transform,
        )
        for (name, transform), indices in indices_of.items()
    )

"""Sources mixed by weights, record by record.

In each lane, the source that is furthest behind its share provides the next record:

1. The progress of source k is (amount taken from it + phase * amount of its next record) / weight;
   the source with the least progress is next. The phase, from 0 to 1, differs between lanes and
   sources, so that rounding does not add up over the lanes.
2. Records are taken until a block is full. They are grouped by format and transform, since the
   tokenizing step reads one kind at a time; the positions in the block restore their order
   afterwards.
3. The cursor of a lane is its position in each source, and the amount taken from it.

By records, every record has the amount 1: of two sources, each is less than one record away from
its share after every record of a lane; of n sources, less than n - 1 records.

By tokens, the amount of a record is known only when its block has been tokenized. Within a block,
it is estimated by the bytes of the record and the tokens per byte of the source so far in the lane.
The cursor after the block has the amounts that were counted, so the next block corrects what the
estimates have missed: the difference from the share never exceeds what one block has missed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftprep.config.user_functions import LoadedFunction, to_function_setting
from sftprep.config.validation import MixBy, check_choice
from sftprep.core.mask_arrays import find_targets
from sftprep.core.types import TokenBatch
from sftprep.errors import ConfigError, setting
from sftprep.stream.sources.base import Block, Cursor, LaneAssignment, LineGroup, Reader, Source
from sftprep.stream.sources.chained import source_of_origin

Stop = Literal["all", "first"]

_BLOCK_RECORDS, _BLOCK_BYTES = 256, 256 * 1024
"""A block of a mixture ends at either of these."""

_GOLDEN_RATIO = 0.6180339887498949

_TOKENS_PER_BYTE = 0.25
"""The estimate for a lane before its first block has been tokenized."""


@dataclass(frozen=True)
class Mixture:
    """Several sources in parallel, each with its share of every lane.

    Args:
        sources: Any inputs that a stream can read.
        weights: Positive numbers; source k provides the share weights[k] / sum(weights).
        stop: "all": a source that has ended leaves its share to the others, until all have ended.
            "first": a lane ends with the first source that ends in it, and is empty if a source
            has no record for it.
        transforms: The `transform` of each source; None for that of the stream.
        mix_by: What the shares are of: "records", "tokens" or "trained_tokens".

    Example:
        Mixture(["chats.jsonl", "code.jsonl"], weights=[3, 1])
    """

    sources: Sequence[Any]
    weights: Sequence[float]
    stop: Stop = "all"
    transforms: Sequence[Any] = ()
    mix_by: MixBy = "records"

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
        check_choice(setting("mix_by"), self.mix_by, MixBy)
        inner = [source for source in self.sources if isinstance(source, Mixture)]
        if any(source.mix_by != "records" for source in inner):
            raise ConfigError(
                "a mixture by tokens cannot be a source of another mixture, which takes its records"
                " before they are tokenized",
                remedy=[
                    "make one mixture of all sources",
                    f"use {setting('mix_by', 'records')} for the inner one",
                ],
            )


@dataclass(frozen=True)
class OpenedMixture:
    """A mixture with its inputs resolved to sources.

    Attributes:
        sources, weights, stop, mix_by: See `Mixture`.
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
    mix_by: MixBy = "records"

    @property
    def identity(self) -> Any:
        """Return the sources, their weights, the end, and the name of the mixing rule."""
        return [
            [source.identity for source in self.sources],
            list(self.weights),
            self.stop,
            f"by {self.mix_by}",
            *self.keys,
        ]

    def open(self, assignment: LaneAssignment) -> Reader:
        """Start or resume a pass, with the same lanes in each source."""
        return _MixtureReader(self, assignment)

    def locate(self, origin: int) -> tuple[str, int]:
        """Return what the source of an origin returns."""
        return source_of_origin(self.sources, self.first_parts, origin).locate(origin)


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
    """The position of a lane in one source; a list of the values in a cursor."""

    cursor: Cursor = None  # of the current block
    line: int = 0  # number of lines that were taken from that block
    num_taken: int = 0  # number of records that were taken in all
    ended: int = 0  # 1 if the source has ended
    amount: int = 0  # number of tokens of the blocks before this one, if they are counted
    size: int = 0  # the bytes of the lines with these tokens


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
        rates = self._estimate_rates(positions)
        amounts = [float(at.num_taken if rates is None else at.amount) for at in positions]
        lines: list[_Line] = []
        origins: list[int] = []
        taken_from: list[int] = []  # the source of each line
        sizes = [0] * len(blocks)  # the bytes of the lines from each source
        while len(lines) < _BLOCK_RECORDS and sum(sizes) < _BLOCK_BYTES:
            following = [
                None if block is None else _estimate_amount(block.lines[position.line], rates, k)
                for k, (block, position) in enumerate(zip(blocks, positions, strict=True))
            ]
            k = self._next_source(lane, amounts, following)
            if k is None:
                break
            position, block = positions[k], blocks[k]
            assert block is not None
            line = block.lines[position.line]
            lines.append(line)
            origins.append(int(block.origins[position.line]))
            taken_from.append(k)
            sizes[k] += len(line.data)
            position.line += 1
            if not line.is_whitespace:  # which is not a record
                position.num_taken += 1
                amounts[k] += following[k] or 0.0
            if position.line == len(block.lines):
                blocks[k] = self._current_block(lane, k, position)
        if not lines:
            return None
        self._blocks[lane] = [[block] if block is not None else [] for block in blocks]
        after = [[at.cursor, at.line, at.num_taken, at.ended] for at in positions]
        mixed = Block(_group_by_kind(lines), np.array(origins, np.int64), after)
        if rates is None:
            return mixed

        def count(batch: TokenBatch) -> Cursor:
            counted = self._count_amounts(batch, taken_from)
            return [
                [*values, at.amount + amount, at.size + size]
                for values, at, amount, size in zip(after, positions, counted, sizes, strict=True)
            ]

        return dataclasses.replace(mixed, count=count)

    def _count_amounts(self, batch: TokenBatch, taken_from: list[int]) -> list[int]:
        """Return the tokens, or the trained tokens, from each source.

        Args:
            batch: The sequences of a block.
            taken_from: The source of each line of the block.
        """
        amounts = batch.lengths
        if self.source.mix_by == "trained_tokens":
            targets = find_targets(batch.completion_mask, batch.offsets)
            amounts = targets.count_in(batch.offsets[:-1], batch.offsets[1:])
        source_of = np.array(taken_from, np.int64)[batch.line_of]
        sums = np.bincount(source_of, amounts, len(self._readers))
        return [int(amount) for amount in sums]

    def _parse(self, cursor: Cursor) -> list[_Position]:
        if not cursor:
            return [_Position() for _ in self._readers]
        return [_Position(*values) for values in cursor]

    def _next_source(
        self, lane: int, amounts: list[float], following: list[float | None]
    ) -> int | None:
        """Return the source furthest behind its share, or None if the lane ends.

        Args:
            lane: The lane.
            amounts: What was taken from each source.
            following: The amount of the next record of each source; None if it has ended.
        """
        weights = self.source.weights
        progress = [
            ((amounts[k] + _phase(lane, self._num_lanes, k) * amount) / weights[k], k)
            for k, amount in enumerate(following)
            if amount is not None
        ]
        if not progress:
            return None
        least, k = min(progress)
        # With stop="first", the lane ends when an ended source would be next.
        if self.source.stop == "first" and any(
            amount is None and least >= amounts[i] / weights[i]
            for i, amount in enumerate(following)
        ):
            return None
        return k

    def _estimate_rates(self, positions: list[_Position]) -> list[float] | None:
        """Return the tokens per byte of each source in a lane so far; None by records.

        A source of which nothing was counted yet has the rate of the others.
        """
        if self.source.mix_by == "records":
            return None
        amount, size = sum(at.amount for at in positions), sum(at.size for at in positions)
        common = amount / size if size else _TOKENS_PER_BYTE
        return [at.amount / at.size if at.size else common for at in positions]

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


def _estimate_amount(line: _Line, rates: list[float] | None, k: int) -> float:
    """Return the amount of a record of source k: 1, or its bytes times the tokens per byte."""
    return 1.0 if rates is None else rates[k] * len(line.data)


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

"""Pass 1 as a task for workers: one partition of the input becomes one spill.

A task is a pure function of its fields and of the files that they name, so it may be run twice, or
in another process.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sftprep.core.hashing import digest
from sftprep.core.mask_arrays import find_targets
from sftprep.core.types import Flag, Rejected, TokenBatch
from sftprep.packing.cut import SequenceRanges
from sftprep.pipeline.passes.overlong import LengthLimit, fit_lengths
from sftprep.pipeline.passes.preprocess import Preprocessor, begin_preprocess
from sftprep.pipeline.passes.sequence_stats import (
    SequenceStats,
    StatsRequest,
    collect_stats,
    count_exact_lengths,
    count_lengths,
    count_trained_positions,
)
from sftprep.pipeline.passes.spill import (
    Spill,
    SpillOrigin,
    map_spill,
    read_spill,
    spill_path,
    write_spill,
)
from sftprep.recipe import RecipeFile
from sftprep.records.record_hashes import HASHES_VERSION
from sftprep.sources.lanes import LanePositions, find_lane_positions
from sftprep.sources.partition import Partition, read_partition

_SAMPLES_AT_START = 16
"""Texts at the start of a build that the reference encoder encodes as well, in addition to one in a
thousand of all texts."""
_FACTS_VERSION = 2
"""Incremented when spills have other facts than before, so that older ones are not reused."""
_IN_FLIGHT_BYTES = 20 << 20
_IN_FLIGHT_SECONDS = 1.0
"""The limits on partitions that are encoded but not yet verified. The reference encoder loads in
less than this time."""


@dataclass(frozen=True, slots=True)
class TokenizeTask:
    """Pass 1 for one partition.

    Attributes:
        partition: The partition.
        format: The format of its records.
        recipe: The recipe, in a file that workers read.
        recipe_key: The key of everything that depends on the recipe.
        limit: The limit of the lengths of sequences. The spill does not depend on it.
        spill_folder: The folder of the spills.
        threads: Whether the encoder may use every core.
        lane_block: The size in bytes of the blocks that are assigned to lanes; None if the build
            does not pack in windows.
        stats: The statistics to collect for the selection; None if all sequences are used.
    """

    partition: Partition
    format: str
    recipe: RecipeFile
    recipe_key: str
    limit: LengthLimit
    spill_folder: Path
    threads: bool
    lane_block: int | None = None
    stats: StatsRequest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionResult:
    """The result of pass 1 for the driver; the tokens stay in the spill.

    A spill contains whole sequences. The sequences of the build are ranges of them.

    Attributes:
        partition: The partition, without its content.
        key: The key of its spill.
        content: The digest of its bytes.
        bytes: The number of its bytes.
        lengths: int32 [sequences]; the number of tokens in each sequence.
        rows: int32 [sequences]; the row of each sequence in the spill; None for 0, 1, 2 ...
        starts: int32 [sequences]; its first token in that row; None if all are 0.
        whole_lengths: The histogram of the lengths before the cut: see `count_lengths`.
        exact_lengths: The counts of the lengths before the cut: see `count_exact_lengths`.
        trained_positions: The counts of targets before the cut: see `count_trained_positions`.
        counts: The counts, by name.
        rejected: The rejected records, in the order of their lines.
        reused: Whether the spill existed already.
        lane_positions: The positions that decide the lanes of the sequences, if the build packs in
            windows.
        stats: The statistics that the task requested.
        has_weights: Whether some trained token has a weight other than 1.
        flags: uint8 [sequences], the flags of each sequence; None if all are 0.
        first_lines: By the name of a count, the line of the first record that it counts.
        unread_columns: The columns with content that the format does not read.
        selection: The digest of the choice of the sequences; "" if it has all of the partition.
    """

    partition: Partition
    key: str
    content: str
    bytes: int
    lengths: NDArray[np.int32]
    rows: NDArray[np.int32] | None
    starts: NDArray[np.int32] | None
    whole_lengths: NDArray[np.int64]
    exact_lengths: NDArray[np.int64]
    trained_positions: NDArray[np.int64]
    counts: dict[str, int]
    rejected: list[Rejected]
    reused: bool
    lane_positions: LanePositions | None = None
    stats: SequenceStats | None = None
    has_weights: bool = False
    flags: NDArray[np.uint8] | None = None
    first_lines: dict[str, int] = dataclasses.field(default_factory=dict)
    unread_columns: list[str] = dataclasses.field(default_factory=list)
    selection: str = ""

    def take_sequences(self, is_taken: NDArray[np.bool_]) -> PartitionResult:
        """Return the result with some of its sequences, and without its rejected records.

        Args:
            is_taken: bool [sequences].
        """
        rows = np.arange(len(self.lengths), dtype=np.int32) if self.rows is None else self.rows
        positions = self.lane_positions
        return dataclasses.replace(
            self,
            lengths=self.lengths[is_taken],
            rows=rows[is_taken],
            starts=None if self.starts is None else self.starts[is_taken],
            flags=None if self.flags is None else self.flags[is_taken],
            lane_positions=(
                None
                if positions is None
                else dataclasses.replace(positions, numbers=positions.numbers[is_taken])
            ),
            rejected=[],
            stats=None,
            selection=xxhash.xxh3_128_hexdigest(np.packbits(is_taken).tobytes()),
        )


def tokenize_partition(task: TokenizeTask) -> PartitionResult:
    """Make the spill of a partition, unless it exists already.

    Raises:
        SftprepError: An error of the readers, the template, the tokenizer or the storage.
    """
    return _start_partition(task).finish()


def tokenize_pipelined(tasks: Iterable[TokenizeTask]) -> Iterator[PartitionResult]:
    """Run `tokenize_partition` for one task after the other in this process.

    The reference encoder takes longer to load, in a process of its own, than a small build takes to
    encode. So a partition stays unverified for a moment while the next ones are encoded.
    """
    in_flight: deque[_InFlightPartition] = deque()
    for task in tasks:
        in_flight.append(_start_partition(task))
        while in_flight and (
            time.monotonic() - in_flight[0].started_at > _IN_FLIGHT_SECONDS
            or sum(partition.bytes for partition in in_flight) > _IN_FLIGHT_BYTES
        ):
            yield in_flight.popleft().finish()
    for partition in in_flight:
        yield partition.finish()


class _InFlightPartition(NamedTuple):
    """An encoded partition, neither verified nor stored yet."""

    started_at: float  # the time when it was started, by the monotonic clock
    bytes: int  # the number of bytes of its lines
    finish: Callable[[], PartitionResult]  # waits for the verification, and writes the spill


def _start_partition(task: TokenizeTask) -> _InFlightPartition:
    """Run `tokenize_partition` up to the point where it needs the reference encoder."""
    started_at = time.monotonic()
    lines = _read_lines(task)
    path = spill_path(task.spill_folder, lines.key)
    existing = read_spill(path)
    complete: Callable[[], TokenBatch] | None = None
    if existing is None:
        samples = _SAMPLES_AT_START if task.partition.index == 0 else 0
        stages = _load_preprocessor(task.recipe, task.threads)
        stages.encoder.use_server(task.recipe.reference)
        # The key selects the samples, so that a repetition compares the same texts.
        seed = int(lines.key[:16], 16)
        hash_by = None if task.stats is None else task.stats.hash_by
        complete = begin_preprocess(
            stages, lines.data, task.format, seed=seed, num_first=samples, hash_by=hash_by
        )

    def finish() -> PartitionResult:
        if complete is not None:
            origin = SpillOrigin(task.recipe_key, len(lines.data))
            write_spill(path, complete(), origin)
        spill = existing or map_spill(path)
        return _cut_sequences(spill, lines, task, reused=existing is not None)

    return _InFlightPartition(started_at, len(lines.data), finish)


class _Lines(NamedTuple):
    """The lines of a partition."""

    data: bytes
    digest: str
    key: str  # of the spill


def _read_lines(task: TokenizeTask) -> _Lines:
    data = read_partition(task.partition)
    content = xxhash.xxh3_128_hexdigest(data)
    hash_by = None if task.stats is None else task.stats.hash_by
    # The key of a spill without hashes does not depend on those that other builds need.
    hashes = () if hash_by is None else ("hashes", HASHES_VERSION, hash_by)
    key = digest(task.recipe_key, task.format, content, _FACTS_VERSION, *hashes)[:40]
    return _Lines(data, content, key)


def _cut_sequences(
    spill: Spill, lines: _Lines, task: TokenizeTask, *, reused: bool
) -> PartitionResult:
    """Return the result for a partition: ranges of its sequences within the limit."""
    targets = find_targets(spill.completion_mask, spill.offsets)
    fitted = fit_lengths(spill, targets, lines.data, task.limit)
    rows, starts, lengths = fitted.ranges
    line_of = spill.line_of[rows]
    is_every_row = np.array_equal(rows, np.arange(len(spill.line_of)))
    lane_positions = None
    if task.lane_block:
        lane_positions = find_lane_positions(task.partition, lines.data, line_of, task.lane_block)
    stats = None
    if task.stats is not None:
        stats = collect_stats(spill, rows, fitted.targets, task.stats)
    return PartitionResult(
        partition=dataclasses.replace(task.partition, payload=None),
        key=lines.key,
        content=lines.digest,
        bytes=len(lines.data),
        lengths=lengths.astype(np.int32),
        rows=None if is_every_row else rows.astype(np.int32),
        starts=starts.astype(np.int32) if starts.any() else None,
        whole_lengths=count_lengths(spill, targets, task.limit),
        exact_lengths=count_exact_lengths(spill, task.limit),
        trained_positions=count_trained_positions(spill, targets),
        counts=fitted.counts,
        rejected=fitted.rejected,
        reused=reused,
        lane_positions=lane_positions,
        stats=stats,
        has_weights=spill.loss_weights is not None,
        flags=_find_flags(spill, fitted.ranges, task.limit),
        first_lines=fitted.first_lines,
        unread_columns=spill.unread_columns,
    )


def _find_flags(
    spill: Spill, ranges: SequenceRanges, limit: LengthLimit
) -> NDArray[np.uint8] | None:
    """Return the flags of ranges of sequences: uint8 [ranges], or None if all are 0."""
    is_cut = ranges.lengths < spill.lengths[ranges.rows]
    if spill.flags is None and not is_cut.any():
        return None
    cut = Flag.SPLIT if limit.overlong == "split" else Flag.TRUNCATED
    flags = np.where(is_cut, cut, 0).astype(np.uint8)
    return flags if spill.flags is None else flags | spill.flags[ranges.rows]


def load_preprocessors(recipes: Sequence[RecipeFile]) -> None:
    """Load the preprocessors for `tokenize_partition`.

    They are those of a process that does not use every core.
    """
    for recipe in recipes:
        _load_preprocessor(recipe, False).load()


@lru_cache(maxsize=8)
def _load_preprocessor(recipe: RecipeFile, threads: bool) -> Preprocessor:
    # Loading a tokenizer takes up to half a second, so each process does it once.
    return Preprocessor(recipe.recipe(), threads=threads)

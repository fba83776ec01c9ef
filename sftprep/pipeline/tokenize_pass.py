"""The two passes that workers run: a partition to its spill, and the rows of a plan to a shard.

Each is a pure function of its task and of the files that the task names, so it may be run twice, or
elsewhere.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sftprep.core.hashing import digest
from sftprep.core.ragged import Ragged, to_offsets
from sftprep.core.types import Rejected, TokenBatch
from sftprep.pipeline.preprocess import Preprocessor, begin_preprocess
from sftprep.pipeline.sequence_stats import SequenceStats, StatsRequest, facts_of
from sftprep.pipeline.spill import map_spill, read_spill, spill_path, write_spill
from sftprep.recipe import RecipeFile
from sftprep.shards.manifest import ShardInfo
from sftprep.shards.writer import ShardRows, write_shard
from sftprep.sources.lanes import RecordPositions, record_positions
from sftprep.sources.partition import Partition, read_partition

_SAMPLE = 16
"""Texts at the start of a build that the reference encodes too, beside one in a thousand of all."""
_OPEN_BYTES = 20 << 20
_OPEN_SECONDS = 1.0
"""Partitions of so many bytes may be encoded and not checked yet, each for so long: the reference
has loaded by then."""


@dataclass(frozen=True, slots=True)
class TokenizeTask:
    """Pass 1 for one partition. threads: the encoder may use every core.

    lane_block: bytes of a block that is dealt to a lane, where the build packs in windows; facts:
    what is wanted of each sequence, where some are to be chosen.
    """

    partition: Partition
    format: str
    recipe: RecipeFile
    recipe_digest: str
    spill_folder: Path
    threads: bool
    lane_block: int | None = None
    facts: StatsRequest | None = None


@dataclass(frozen=True, slots=True)
class PartitionResult:
    """What travels back from pass 1: no tokens, but where they are. lengths: int32 [sequences];
    content: digest of the bytes.

    places: what decides the lanes of the sequences, where the build packs in windows; weighted:
    some tokens weigh other than 1.
    """

    partition: Partition
    key: str
    content: str
    bytes: int
    lengths: NDArray[np.int32]
    counts: dict[str, int]
    rejected: list[Rejected]
    reused: bool
    places: RecordPositions | None = None
    facts: SequenceStats | None = None
    weighted: bool = False


def tokenize_partition(task: TokenizeTask) -> PartitionResult:
    """Make the spill of a partition, or find it made already. Raises what reading, templates and
    storage raise."""
    return _begun(task).finish()


def tokenize_in_turn(tasks: Iterable[TokenizeTask]) -> Iterator[PartitionResult]:
    """`tokenize_partition` for one after the other, each kept open for a moment, in which the next
    ones are encoded.

    The reference encoder, in a process of its own, takes longer to load than a small build to
    encode: nobody waits for it.
    """
    begun: deque[_Begun] = deque()
    for task in tasks:
        begun.append(_begun(task))
        while begun and (
            time.monotonic() - begun[0].since > _OPEN_SECONDS
            or sum(each.bytes for each in begun) > _OPEN_BYTES
        ):
            yield begun.popleft().finish()
    for each in begun:
        yield each.finish()


class _Begun(NamedTuple):
    """A partition that is encoded, or was before. since: when it was begun, by the monotonic clock;
    bytes: of its lines; finish: waits for its check and keeps it."""

    since: float
    bytes: int
    finish: Callable[[], PartitionResult]


def _begun(task: TokenizeTask) -> _Begun:
    """`tokenize_partition` as far as it goes without the reference encoder."""
    since = time.monotonic()
    data = read_partition(task.partition)
    content = xxhash.xxh3_128_hexdigest(data)
    key = digest(task.recipe_digest, task.format, content)[:40]
    path = spill_path(task.spill_folder, key)
    spill = read_spill(path)
    prepare: Callable[[], TokenBatch] | None = None
    if spill is None:
        sample = _SAMPLE if task.partition.index == 0 else 0
        stages = _preprocessor(task.recipe, task.threads)
        stages.encoder.use_server(task.recipe.reference)
        prepare = begin_preprocess(stages, data, task.format, seed=int(key[:16], 16), first=sample)

    def finish() -> PartitionResult:
        if prepare is not None:
            write_spill(path, prepare())
        made = spill or map_spill(path)
        where = dataclasses.replace(task.partition, payload=None)
        places = (
            record_positions(task.partition, data, made.origin, task.lane_block)
            if task.lane_block
            else None
        )
        facts = facts_of(made, data, task.facts) if task.facts is not None else None
        weighted = made.loss_weights is not None
        reused = spill is not None
        counts, rejected = made.counts, made.rejected
        return PartitionResult(
            where,
            key,
            content,
            len(data),
            made.lengths,
            counts,
            rejected,
            reused,
            places,
            facts,
            weighted,
        )

    return _Begun(since, len(data), finish)


def load_preprocessors(recipes: Sequence[RecipeFile]) -> None:
    """Load what `tokenize_partition` will need, in a process that does not use every core."""
    for recipe in recipes:
        _preprocessor(recipe, False).load()


@dataclass(frozen=True, slots=True)
class AssembleTask:
    """Pass 3 for one shard: which sequences it holds, in order.

    spills: files; spill int32 [sequences] and row int32 [sequences]: sequence k is row[k] of
    spills[spill[k]]; seq_lengths int32 [sequences]: tokens of each; starts int64 [sequences]: the
    first of them in the row of the spill, None where sequences are whole rows; first_ordinal int64
    [spills]: ordinal of the first line of each spill's partition; pack_offsets int64 [packs + 1];
    loss_weights: the build has that column.
    """

    index: int
    shard_folder: Path
    spills: tuple[Path, ...]
    spill: NDArray[np.int32]
    row: NDArray[np.int32]
    seq_lengths: NDArray[np.int32]
    first_ordinal: NDArray[np.int64]
    pack_offsets: NDArray[np.int64]
    max_length: int
    position_ids: bool
    starts: NDArray[np.int64] | None = None
    loss_weights: bool = False


@dataclass(frozen=True, slots=True)
class Assembled:
    """A finished shard. index: its number; max_id: the highest token id in it."""

    index: int
    info: ShardInfo
    max_id: int


def assemble_shard(task: AssembleTask) -> Assembled:
    """Gather the sequences of a shard from the spills and write it. Raises StorageError.

    Spill after spill, so that no more than one of them is mapped at a time: of a large corpus, a
    shard needs some pages of each. So they are gathered twice, first in the order of the spills.
    """
    by_spill = np.argsort(task.spill, kind="stable")
    bounds = np.searchsorted(task.spill[by_spill], np.arange(len(task.spills) + 1))
    ends = to_offsets(task.seq_lengths[by_spill].astype(np.int64))
    ids = np.empty(int(ends[-1]), dtype=np.int32)
    mask = np.ones(len(ids), dtype=np.uint8)
    weights = np.ones(len(ids), dtype=np.float32) if task.loss_weights else None
    origin = np.empty(len(by_spill), dtype=np.int64)
    for number, path in enumerate(task.spills):
        own = by_spill[bounds[number] : bounds[number + 1]]
        spill = map_spill(path)
        rows = task.row[own]
        origin[own] = spill.origin[rows] + task.first_ordinal[number]
        here = slice(ends[bounds[number]], ends[bounds[number + 1]])
        starts = None if task.starts is None else task.starts[own]
        columns = (
            (spill.input_ids, ids),
            (spill.completion_mask, mask),
            (spill.loss_weights, weights),
        )
        for values, column in columns:
            if values is not None and column is not None:
                column[here] = _pieces(values, spill.offsets, rows, starts, task.seq_lengths[own])
    if weights is not None:
        weights *= mask  # what came from a spill without weights weighs 1 where it is trained
    place_of = np.argsort(by_spill)
    shard = ShardRows(
        Ragged(ids, ends).take(place_of).values,
        (mask if mask.all() else Ragged(mask, ends).take(place_of).values).view(np.bool_),
        task.seq_lengths,
        origin,
        task.pack_offsets,
        None if weights is None else Ragged(weights, ends).take(place_of).values,
    )
    info = write_shard(
        task.shard_folder,
        task.index,
        shard,
        max_length=task.max_length,
        position_ids=task.position_ids,
    )
    return Assembled(task.index, info, int(ids.max()))


def _pieces(
    values: NDArray[Any],
    offsets: NDArray[np.int32],
    rows: NDArray[np.int32],
    starts: NDArray[np.int64] | None,
    lengths: NDArray[np.int32],
) -> NDArray[Any]:
    """Rows of a column one after the other, or of each so many values from its start on."""
    if starts is None:
        return Ragged(values, offsets.astype(np.int64)).take(rows.astype(np.int64)).values
    begins = offsets[rows] + starts
    return np.concatenate(
        [
            values[:0],
            *map(values.__getitem__, map(slice, begins.tolist(), (begins + lengths).tolist())),
        ]
    )


@lru_cache(maxsize=8)
def _preprocessor(recipe: RecipeFile, threads: bool) -> Preprocessor:
    # Loading a tokenizer takes up to half a second, so a process does it once and keeps it.
    return Preprocessor(recipe.recipe(), threads=threads)

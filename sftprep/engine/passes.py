"""The two passes that workers run: a partition to its spill, and the rows of a plan to a shard.

Each is a pure function of its task and of the files that the task names, so it may be run twice, or elsewhere.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from sftprep.batch import Rejected
from sftprep.config import digest
from sftprep.engine.prepare import Preparer
from sftprep.engine.recipe import read_recipe
from sftprep.engine.spill import map_spill, read_spill, spill_path, write_spill
from sftprep.shards.manifest import ShardInfo
from sftprep.shards.writer import ShardRows, write_shard
from sftprep.sources.partition import Partition, read_partition


@dataclass(frozen=True, slots=True)
class TokenizeTask:
    """Pass 1 for one partition. recipe: file of the recipe; threads: the encoder may use every core."""

    partition: Partition
    format: str
    recipe: Path
    recipe_digest: str
    spill_folder: Path
    threads: bool


@dataclass(frozen=True, slots=True)
class Tokenized:
    """What travels back from pass 1: no tokens, but where they are. lengths: int32 [sequences]; content: digest of the bytes."""

    partition: Partition
    key: str
    content: str
    bytes: int
    lengths: NDArray[np.int32]
    counts: dict[str, int]
    rejected: list[Rejected]
    reused: bool


def tokenize_partition(task: TokenizeTask) -> Tokenized:
    """Make the spill of a partition, or find it made already. Raises what reading, templates and storage raise."""
    data = read_partition(task.partition)
    content = xxhash.xxh3_128_hexdigest(data)
    key = digest(task.recipe_digest, task.format, content)[:40]
    path = spill_path(task.spill_folder, key)
    spill = read_spill(path)
    reused = spill is not None
    if spill is None:
        with _without_collection():
            write_spill(path, _preparer(task.recipe, task.threads).prepare(data, task.format, seed=int(key[:16], 16)))
        spill = map_spill(path)
    where = Partition(task.partition.index, task.partition.input, task.partition.file, task.partition.start, task.partition.end)
    return Tokenized(where, key, content, len(data), spill.lengths, spill.counts, spill.rejected, reused)


@dataclass(frozen=True, slots=True)
class AssembleTask:
    """Pass 3 for one shard: which sequences it holds, in order.

    spills: files; spill int32 [sequences] and row int32 [sequences]: sequence k is row[k] of spills[spill[k]];
    seq_lengths int32 [sequences]: tokens of each; first_ordinal int64 [spills]: ordinal of the first line of each spill's
    partition; pack_offsets int64 [packs + 1].
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


@dataclass(frozen=True, slots=True)
class Assembled:
    """A finished shard. index: its number; max_id: the highest token id in it."""

    index: int
    info: ShardInfo
    max_id: int


def assemble_shard(task: AssembleTask) -> Assembled:
    """Gather the sequences of a shard from the spills and write it. Raises StorageError.

    Spill after spill, so that no more than one of them is mapped at a time: of a large corpus, a shard needs some pages of each.
    """
    lengths = task.seq_lengths
    ends = np.cumsum(lengths, dtype=np.int64)
    ids = np.empty(int(ends[-1]), dtype=np.int32)
    mask = np.empty(len(ids), dtype=np.uint8)
    origin = np.empty(len(lengths), dtype=np.int64)
    by_spill = np.argsort(task.spill, kind="stable")
    edges = np.searchsorted(task.spill[by_spill], np.arange(len(task.spills) + 1))
    for number, path in enumerate(task.spills):
        own = by_spill[edges[number] : edges[number + 1]]
        spill = map_spill(path)
        rows = task.row[own]
        origin[own] = spill.origin[rows] + task.first_ordinal[number]
        places = zip((ends - lengths)[own].tolist(), spill.offsets[rows].tolist(), lengths[own].tolist(), strict=True)
        from_ids, from_mask = spill.input_ids, spill.completion_mask
        for to, begin, length in places:
            ids[to : to + length] = from_ids[begin : begin + length]
            mask[to : to + length] = from_mask[begin : begin + length]
    rows_of_shard = ShardRows(ids, mask.view(np.bool_), lengths, origin, task.pack_offsets)
    info = write_shard(task.shard_folder, task.index, rows_of_shard, max_length=task.max_length, position_ids=task.position_ids)
    return Assembled(task.index, info, int(ids.max()))


@lru_cache(maxsize=2)
def _preparer(recipe_path: Path, threads: bool) -> Preparer:
    # Loading a tokenizer takes up to half a second, so a process does it once and keeps it.
    return Preparer(read_recipe(recipe_path), threads=threads)


@contextmanager
def _without_collection() -> Iterator[None]:
    # A partition makes a million objects and no cycle among them: looking for some takes a tenth of the time.
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()

"""The writing of one shard, in the workers: its sequences are gathered from the spills."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import Ragged, to_offsets
from sftprep.pipeline.passes.spill import map_spill
from sftprep.shards.group import ShardInfo
from sftprep.shards.pack_index import PackIndex
from sftprep.shards.schema import ORIGIN_BITS
from sftprep.shards.sequences.index import SequenceIndex
from sftprep.shards.sequences.sequence_file import write_sequences
from sftprep.shards.writer import ShardRows, write_shard


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard: its sequences, in order.

    Attributes:
        index: The number of the shard.
        shard_folder: The folder of the shards.
        spills: The spills that the shard needs.
        spill: int32 [sequences]; the index of the spill of each sequence in `spills`.
        row: int32 [sequences]; the row of each sequence in its spill.
        seq_lengths: int32 [sequences]; the number of tokens of each sequence.
        slices: [spills]; the number of each spill's partition among those of the build.
        pack_offsets: int64 [packs + 1]; the first sequence of each pack.
        max_length: The capacity of a pack, in tokens.
        position_ids: Whether to store position ids.
        flags: uint8 [sequences]; the flags of each sequence.
        starts: int64 [sequences]; the first token of each sequence in its row; None if all are 0.
        loss_weights: Whether the build has the column of loss weights.
        copies: int32 [sequences]; how often the build contains each sequence, in layout
            `sequences`; None in layout `packs`.
    """

    index: int
    shard_folder: Path
    spills: tuple[Path, ...]
    spill: NDArray[np.int32]
    row: NDArray[np.int32]
    seq_lengths: NDArray[np.int32]
    slices: NDArray[np.int32]
    pack_offsets: NDArray[np.int64]
    max_length: int
    position_ids: bool
    flags: NDArray[np.uint8]
    starts: NDArray[np.int64] | None = None
    loss_weights: bool = False
    copies: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A finished shard."""

    index: int
    info: ShardInfo
    max_id: int  # the highest token id in it
    sizes: PackIndex | SequenceIndex  # its part of the index of the group


def write_one_shard(task: ShardTask) -> WrittenShard:
    """Gather the sequences of a shard from the spills, and write it.

    Raises:
        StorageError: The shard cannot be written.
    """
    rows = _gather_rows(task)
    sizes: PackIndex | SequenceIndex
    if task.copies is None:
        info = write_shard(
            task.shard_folder,
            task.index,
            rows,
            max_length=task.max_length,
            position_ids=task.position_ids,
        )
        sizes = PackIndex.of(rows.completion_mask, rows.seq_lengths, rows.pack_offsets)
    else:
        info = write_sequences(task.shard_folder, task.index, rows)
        sizes = SequenceIndex.of(rows, task.copies)
    return WrittenShard(task.index, info, int(rows.input_ids.max()), sizes)


def _gather_rows(task: ShardTask) -> ShardRows:
    """Return the sequences of a shard in its order.

    Only one spill is mapped at a time, so that the resident memory of a worker does not follow the
    size of the corpus. So sequences are gathered twice: by spill, and in the order of the shard.
    """
    # 1. Sort the sequences by spill. Those of spill k are by_spill[bounds[k]:bounds[k + 1]].
    by_spill = np.argsort(task.spill, kind="stable")
    bounds = np.searchsorted(task.spill[by_spill], np.arange(len(task.spills) + 1))
    offsets = to_offsets(task.seq_lengths[by_spill].astype(np.int64))
    ids = np.empty(int(offsets[-1]), dtype=np.int32)
    # A spill without these columns has their default.
    mask = np.ones(len(ids), dtype=np.uint8)
    weights = np.ones(len(ids), dtype=np.float32) if task.loss_weights else None
    origin = np.empty(len(by_spill), dtype=np.int64)
    # 2. Gather the sequences, spill after spill.
    for number, path in enumerate(task.spills):
        sequences = by_spill[bounds[number] : bounds[number + 1]]
        spill = map_spill(path)
        rows = task.row[sequences]
        origin[sequences] = spill.line_of[rows] + (int(task.slices[number]) << ORIGIN_BITS)
        tokens = slice(offsets[bounds[number]], offsets[bounds[number + 1]])
        starts = 0 if task.starts is None else task.starts[sequences]
        begins = spill.offsets[rows].astype(np.int64) + starts
        ranges = _ColumnRanges.from_begins(begins, task.seq_lengths[sequences])
        columns = (
            (spill.input_ids, ids),
            (spill.completion_mask, mask),
            (spill.loss_weights, weights),
        )
        for values, column in columns:
            if values is not None and column is not None:
                column[tokens] = ranges.gather(values)
    if weights is not None:
        weights *= mask  # a spill without weights has the weight 1 where a token is trained
    # 3. Bring them into the order of the shard.
    position_of = np.argsort(by_spill)
    return ShardRows(
        Ragged(ids, offsets).take(position_of).values,
        (mask if mask.all() else Ragged(mask, offsets).take(position_of).values).view(np.bool_),
        task.seq_lengths,
        origin,
        task.pack_offsets,
        task.flags,
        None if weights is None else Ragged(weights, offsets).take(position_of).values,
    )


class _ColumnRanges(NamedTuple):
    """Ranges of values of a column, in gathering order.

    Attributes:
        bounds: int64 [2 m]; the distinct ranges in the order of the column: first, last + 1 ...
        bound_of: int64 [n]; the index of the first bound of each range.
    """

    bounds: NDArray[np.int64]
    bound_of: NDArray[np.int64]

    @classmethod
    def from_begins(cls, begins: NDArray[np.int64], lengths: NDArray[np.int32]) -> _ColumnRanges:
        """Return ranges without overlaps; one range may occur several times."""
        distinct, index, range_of = np.unique(begins, return_index=True, return_inverse=True)
        bounds = np.stack((distinct, distinct + lengths[index]), axis=1)
        return cls(bounds.reshape(-1), 2 * range_of)

    def gather(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the values of the ranges, concatenated."""
        # Every second segment is a gap between two ranges.
        return Ragged(values, self.bounds).take(self.bound_of).values

"""Pass 3: gather the sequences of packs from the spills into shards.

The driver (`write_packs`) plans the packs, shuffles them and cuts them into shards; a worker
(`write_one_shard`) gathers the sequences of one shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftprep.config.build import BuildConfig
from sftprep.core.atomic_write import create_folder
from sftprep.core.hashing import seeded_permutation
from sftprep.core.ragged import Ragged, to_offsets
from sftprep.core.types import Flag
from sftprep.errors import ConfigError, setting
from sftprep.packing.strategies import PackPlan
from sftprep.pipeline.executors.base import Executor, map_checked
from sftprep.pipeline.passes.plan_pass import plan_packs
from sftprep.pipeline.passes.spill import map_spill, spill_path
from sftprep.shards.group import ShardInfo
from sftprep.shards.pack_index import PackIndex
from sftprep.shards.schema import ORIGIN_BITS
from sftprep.shards.writer import ShardRows, write_shard

if TYPE_CHECKING:  # workers do not need the modules that it imports
    from sftprep.pipeline.groups.selection import BuildSplit

Progress = Callable[[str, int, int], None]
"""A callback with the name of a pass, the work done, and the work in total: bytes or shards."""

_SHARD_TOKENS = 4 << 20
_MOST_TOKENS = 2**31 - 1
"""The offsets in a shard are int32."""


@dataclass(frozen=True, slots=True)
class WrittenPacks:
    """The packs of a split, and their shards.

    Attributes:
        plan: The plan.
        order: int64 [packs]; the numbers of the packs in the order in which they are stored.
        shards: The shards.
        max_id: The highest token id; None without a token.
        index: The sizes of the packs, in the order in which they are stored.
    """

    plan: PackPlan
    order: NDArray[np.int64]
    shards: tuple[ShardInfo, ...]
    max_id: int | None
    index: PackIndex


def write_packs(
    split: BuildSplit,
    config: BuildConfig,
    max_length: int,
    folder: Path,
    spills: Path,
    executor: Executor,
    progress: Progress,
    check_size: Callable[[int, int], None],
    *,
    seed: int,
) -> WrittenPacks:
    """Plan the packs of a group and write its shards.

    Args:
        split: The split.
        config: The settings of the build.
        max_length: The capacity of a pack, in tokens.
        folder: The folder of the shards.
        spills: The folder of the spills.
        executor: The executor for the shards.
        progress: The progress callback.
        check_size: Called with the number of shards and of packs before the first one is written.
        seed: The seed of the order of the packs.

    Raises:
        StorageError: A shard cannot be written.
        ConfigError: A shard would have more tokens than its offsets can count.
    """
    plan = plan_packs(split.parts, config, max_length, split.take)
    if not plan.num_bins:
        return WrittenPacks(plan, np.arange(0), (), None, PackIndex.concatenate([]))
    if config.pack.order == "keep":
        order = np.arange(plan.num_bins)
    else:
        # Best-fit decreasing opens packs in the order of length, so packs are shuffled.
        order = seeded_permutation(plan.num_bins, seed)
    create_folder(folder)
    tasks = _ShardTasks(split, plan, order, config, max_length, folder, spills)
    check_size(len(tasks), plan.num_bins)
    shards: dict[int, _WrittenShard] = {}
    for shard in map_checked(executor, write_one_shard, tasks):
        shards[shard.index] = shard
        progress("write", len(shards), len(tasks))
    written = [shards[number] for number in range(len(shards))]
    return WrittenPacks(
        plan,
        order,
        shards=tuple(shard.info for shard in written),
        max_id=max(shard.max_id for shard in written),
        index=PackIndex.concatenate(shard.packs for shard in written),
    )


class _ShardTasks:
    """The tasks for the shards, in order, created on demand."""

    def __init__(
        self,
        split: BuildSplit,
        plan: PackPlan,
        order: NDArray[np.int64],
        config: BuildConfig,
        max_length: int,
        folder: Path,
        spills: Path,
    ) -> None:
        self._parts, self._folder, self._spills = split.parts, folder, spills
        self._max_length, self._position_ids = max_length, config.output.position_ids
        # 1. The members of the plan in the order in which packs are stored.
        pack_sizes = np.diff(plan.offsets)[order]
        begins = plan.offsets[:-1][order]
        shift = begins - (np.cumsum(pack_sizes) - pack_sizes)
        members_in_order = np.arange(int(pack_sizes.sum())) + np.repeat(shift, pack_sizes)
        members = plan.members[members_in_order]
        # 2. The sequence of each member, as an index into all sequences of the partitions.
        self._members = members if split.take is None else split.take[members]
        # 3. Its tokens; if the plan cuts sequences, a member is a part of one.
        lengths = np.concatenate([part.lengths for part in split.parts])
        self._starts = _first_tokens(split, self._members)
        if plan.sizes is None or plan.starts is None:
            self._sizes = lengths[self._members]
        else:
            self._sizes = plan.sizes[members_in_order].astype(np.int32)
            self._starts = plan.starts[members_in_order] + (
                0 if self._starts is None else self._starts
            )
        # 4. The partition of each sequence, and its row in the spill.
        counts = [len(part.lengths) for part in split.parts]
        self._part_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._row = np.concatenate(
            [
                np.arange(len(part.lengths), dtype=np.int32) if part.rows is None else part.rows
                for part in split.parts
            ]
        )
        self._has_weights = any(part.has_weights for part in split.parts)
        self._flags = self._member_flags(split, members, lengths)
        # 5. The packs of each shard.
        self._pack_ends = np.cumsum(pack_sizes)
        token_ends = np.cumsum(self._sizes, dtype=np.int64)[self._pack_ends - 1]
        self._offsets = _shard_offsets(token_ends, config.output.shard_tokens)

    def _member_flags(
        self, split: BuildSplit, members: NDArray[np.int64], lengths: NDArray[np.int32]
    ) -> NDArray[np.uint8]:
        """Return the flags of the members of the plan: uint8 [members].

        Args:
            split: The split.
            members: int64 [members]; the indices of the members, as in the plan.
            lengths: int32 [sequences]; the number of tokens of each sequence.
        """
        flags = np.zeros(len(members), np.uint8)
        if any(part.flags is not None for part in split.parts):
            of_parts = [
                np.zeros(len(part.lengths), np.uint8) if part.flags is None else part.flags
                for part in split.parts
            ]
            flags |= np.concatenate(of_parts)[self._members]
        flags[self._sizes != lengths[self._members]] |= np.uint8(Flag.SPLIT)
        if split.take is not None:
            is_repeated = np.ones(len(split.take), np.bool_)
            is_repeated[np.unique(split.take, return_index=True)[1]] = False
            flags[is_repeated[members]] |= np.uint8(Flag.REPEATED)
        return flags

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __iter__(self) -> Iterator[ShardTask]:
        for index, (first, last) in enumerate(pairwise(self._offsets)):
            begin = int(self._pack_ends[first - 1]) if first else 0
            end = int(self._pack_ends[last - 1])
            members = self._members[begin:end]
            used_parts, spill = np.unique(self._part_of[members], return_inverse=True)
            yield ShardTask(
                index=index,
                shard_folder=self._folder,
                spills=tuple(
                    spill_path(self._spills, self._parts[part].key) for part in used_parts.tolist()
                ),
                spill=spill.astype(np.int32),
                row=self._row[members],
                seq_lengths=self._sizes[begin:end],
                slices=used_parts,
                pack_offsets=np.concatenate(([0], self._pack_ends[first:last] - begin)),
                max_length=self._max_length,
                position_ids=self._position_ids,
                starts=None if self._starts is None else self._starts[begin:end],
                # In all shards or in none, so that they can be read as one table.
                loss_weights=self._has_weights,
                flags=self._flags[begin:end],
            )


def _first_tokens(split: BuildSplit, sequences: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return the first token of sequences in their rows: int64 [n], or None.

    None means that all are 0.
    """
    if all(part.starts is None for part in split.parts):
        return None
    starts = [
        np.zeros(len(part.lengths), np.int32) if part.starts is None else part.starts
        for part in split.parts
    ]
    return np.concatenate(starts)[sequences].astype(np.int64)


def _shard_offsets(token_ends: NDArray[np.int64], shard_tokens: int | None) -> list[int]:
    """Return the first pack of each shard, and the number of packs at the end.

    A shard ends with the pack that fills it. All shards have about the same size, so that the
    worker with the last shard does not finish long after the others.

    Args:
        token_ends: int64 [packs]; the number of tokens up to the end of each pack.
        shard_tokens: The largest number of tokens in a shard, approximately; None for 4 M, and 16 M
            in a group of 64 M or more.

    Example:
        token_ends = [4, 8, 12, 16], shard_tokens = 10  ->  [0, 2, 4]
    """
    total = int(token_ends[-1]) if len(token_ends) else 0
    if shard_tokens is None:
        shard_tokens = _SHARD_TOKENS if total < 16 * _SHARD_TOKENS else 4 * _SHARD_TOKENS
    shard_tokens = -(-total // max(1, -(-total // shard_tokens)))
    offsets, done = [0], 0
    while offsets[-1] < len(token_ends):
        last = int(np.searchsorted(token_ends, done + shard_tokens)) + 1
        offsets.append(min(last, len(token_ends)))
        tokens, done = int(token_ends[offsets[-1] - 1]) - done, int(token_ends[offsets[-1] - 1])
        if tokens > _MOST_TOKENS:
            raise ConfigError(
                f"a shard would have {tokens:,} tokens; the maximum is {_MOST_TOKENS:,}",
                remedy=f"lower {setting('shard_tokens')}",
            )
    return offsets


# --- in the workers -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Pass 3 for one shard: its sequences, in order.

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


@dataclass(frozen=True, slots=True)
class _WrittenShard:
    """A finished shard."""

    index: int
    info: ShardInfo
    max_id: int  # the highest token id in it
    packs: PackIndex


def write_one_shard(task: ShardTask) -> _WrittenShard:
    """Gather the sequences of a shard from the spills, and write it.

    Only one spill is mapped at a time, so that the resident memory of a worker does not follow the
    size of the corpus. So sequences are gathered twice: by spill, and in the order of the shard.

    Raises:
        StorageError: The shard cannot be written.
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
    shard = ShardRows(
        Ragged(ids, offsets).take(position_of).values,
        (mask if mask.all() else Ragged(mask, offsets).take(position_of).values).view(np.bool_),
        task.seq_lengths,
        origin,
        task.pack_offsets,
        task.flags,
        None if weights is None else Ragged(weights, offsets).take(position_of).values,
    )
    info = write_shard(
        task.shard_folder,
        task.index,
        shard,
        max_length=task.max_length,
        position_ids=task.position_ids,
    )
    index = PackIndex.of(shard.completion_mask, shard.seq_lengths, shard.pack_offsets)
    return _WrittenShard(task.index, info, int(ids.max()), index)


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

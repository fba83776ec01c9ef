"""Pass 3: gather the sequences of packs from the spills into shards.

The driver plans the packs, shuffles them and cuts them into shards (`write_packs`); a worker
gathers the sequences of one shard (`shard_task.py`). For layout `sequences`, nothing is planned or
shuffled, and the rows of the shards are the sequences in the order of the input
(`write_whole_sequences`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sftprep.config.build import BuildConfig
from sftprep.core.atomic_write import create_folder
from sftprep.core.hashing import seeded_permutation
from sftprep.core.types import Flag
from sftprep.errors import ConfigError, setting
from sftprep.packing.strategies import PackPlan, pack_lengths
from sftprep.pipeline.executors.base import Executor, map_checked
from sftprep.pipeline.passes.plan_pass import plan_packs
from sftprep.pipeline.passes.shard_task import ShardTask, WrittenShard, write_one_shard
from sftprep.pipeline.passes.spill import spill_path
from sftprep.shards.group import ShardInfo
from sftprep.shards.pack_index import PackIndex
from sftprep.shards.schema import BLOCK_PACKS, shard_columns
from sftprep.shards.sequences.index import index_bytes
from sftprep.shards.sequences.schema import BLOCK_TOKENS, sequence_columns

if TYPE_CHECKING:  # workers do not need the modules that it imports
    from sftprep.pipeline.groups.selection import BuildSplit

Progress = Callable[[str, int, int], None]
"""A callback with the name of a pass, the work done, and the work in total: bytes or shards."""

_SHARD_TOKENS = 4 << 20
_MOST_TOKENS = 2**31 - 1
"""The offsets in a shard are int32."""


@dataclass(frozen=True, slots=True)
class WrittenShards:
    """The shards of a split.

    Attributes:
        shards: The shards.
        max_id: The highest token id; None without a token.
        index: The content of the index of the group.
        plan: The plan of the packs, in layout `packs`.
        order: int64 [packs]; the numbers of the packs in the order in which they are stored.
    """

    shards: tuple[ShardInfo, ...]
    max_id: int | None
    index: bytes
    plan: PackPlan | None = None
    order: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlace:
    """Where the shards of a group are written, and from what.

    Attributes:
        folder: The folder of the shards.
        spills: The folder of the spills.
        check_size: Called with the number of shards and of blocks before the first one is written.
    """

    folder: Path
    spills: Path
    check_size: Callable[[int, int], None]


def write_packs(
    split: BuildSplit,
    config: BuildConfig,
    max_length: int,
    place: ShardPlace,
    executor: Executor,
    progress: Progress,
    *,
    seed: int,
) -> WrittenShards:
    """Plan the packs of a group and write its shards.

    Args:
        split: The split.
        config: The settings of the build.
        max_length: The capacity of a pack, in tokens.
        place: Where the shards are written.
        executor: The executor for the shards.
        progress: The progress callback.
        seed: The seed of the order of the packs.

    Raises:
        StorageError: A shard cannot be written.
        ConfigError: A shard would have more tokens than its offsets can count.
    """
    plan = plan_packs(split.parts, config, max_length, split.take)
    if not plan.num_bins:
        return WrittenShards((), None, PackIndex.concatenate([]).to_bytes(), plan, np.arange(0))
    if config.pack.order == "keep":
        order = np.arange(plan.num_bins)
    else:
        # Best-fit decreasing opens packs in the order of length, so packs are shuffled.
        order = seeded_permutation(plan.num_bins, seed)
    tasks = _ShardTasks(split, plan, order, config, max_length, place)
    place.check_size(len(tasks), plan.num_bins // BLOCK_PACKS)
    shards = _write_shards(tasks, place, executor, progress)
    index = PackIndex.concatenate(shard.sizes for shard in shards)  # type: ignore[misc]
    return _written(shards, index.to_bytes(), plan, order)


def stored_columns(split: BuildSplit, config: BuildConfig, max_length: int) -> dict[str, str]:
    """Return the columns of the shards of a split, and their types."""
    has_weights = any(part.has_weights for part in split.parts)
    if config.output.layout == "sequences":
        return sequence_columns(loss_weights=has_weights)
    position_ids = config.output.position_ids
    return shard_columns(max_length, position_ids=position_ids, loss_weights=has_weights)


def write_whole_sequences(
    split: BuildSplit,
    config: BuildConfig,
    place: ShardPlace,
    executor: Executor,
    progress: Progress,
) -> WrittenShards:
    """Write the shards of a group in layout `sequences`: each sequence once, uncut, in order.

    The arguments and errors are those of `write_packs`.
    """
    lengths = np.concatenate([np.zeros(0, np.int32), *(part.lengths for part in split.parts)])
    copies = np.ones(len(lengths), np.int32)
    if split.take is not None:
        copies = np.bincount(split.take, minlength=len(lengths)).astype(np.int32)
        split = replace(split, take=np.flatnonzero(copies))
        lengths, copies = lengths[split.take], copies[split.take]
    if not len(lengths):
        return WrittenShards((), None, index_bytes([]))
    rows = pack_lengths(lengths, int(lengths.max()), "none")
    tasks = _ShardTasks(split, rows, np.arange(len(lengths)), config, 0, place, copies)
    place.check_size(len(tasks), int(lengths.sum(dtype=np.int64)) // BLOCK_TOKENS)
    shards = _write_shards(tasks, place, executor, progress)
    return _written(shards, index_bytes(shard.sizes for shard in shards))  # type: ignore[misc]


def _write_shards(
    tasks: _ShardTasks, place: ShardPlace, executor: Executor, progress: Progress
) -> list[WrittenShard]:
    create_folder(place.folder)
    shards: dict[int, WrittenShard] = {}
    for shard in map_checked(executor, write_one_shard, tasks):
        shards[shard.index] = shard
        progress("write", len(shards), len(tasks))
    return [shards[number] for number in range(len(shards))]


def _written(
    shards: list[WrittenShard],
    index: bytes,
    plan: PackPlan | None = None,
    order: NDArray[np.int64] | None = None,
) -> WrittenShards:
    infos = tuple(shard.info for shard in shards)
    return WrittenShards(infos, max(shard.max_id for shard in shards), index, plan, order)


class _ShardTasks:
    """The tasks for the shards, in order, created on demand."""

    def __init__(
        self,
        split: BuildSplit,
        plan: PackPlan,
        order: NDArray[np.int64],
        config: BuildConfig,
        max_length: int,
        place: ShardPlace,
        copies: NDArray[np.int32] | None = None,
    ) -> None:
        self._parts, self._place, self._copies = split.parts, place, copies
        self._max_length, self._position_ids = max_length, config.output.position_ids
        # 1. The members of the plan in the order in which packs are stored.
        members_in_order, pack_offsets = plan.members_in(order)
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
        self._pack_ends = pack_offsets[1:]
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
                shard_folder=self._place.folder,
                spills=tuple(
                    spill_path(self._place.spills, self._parts[part].key)
                    for part in used_parts.tolist()
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
                copies=None if self._copies is None else self._copies[begin:end],
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

"""Passes 2 and 3 for one build: its sequences planned into packs, and the packs written to
shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sftprep.config.build import BuildConfig
from sftprep.core.hashing import seeded_permutation
from sftprep.errors import ConfigError
from sftprep.packing.strategies import PackPlan
from sftprep.pipeline.executors import Executor
from sftprep.pipeline.plan_pass import plan_packs
from sftprep.pipeline.selection import BuildSplit
from sftprep.pipeline.spill import spill_path
from sftprep.pipeline.tokenize_pass import AssembleTask, assemble_shard
from sftprep.shards.manifest import ShardInfo

Progress = Callable[[str, int, int], None]
"""Called with the name of a pass, what is done and what there is to do, in bytes or shards."""

_MOST_TOKENS = 2**31 - 1
"""Offsets in a shard are int32."""


@dataclass(frozen=True, slots=True)
class Assembled:
    """The packs of a build, and the shards that hold them in this order. max_id: the highest token
    id."""

    plan: PackPlan
    order: NDArray[np.int64]
    shards: tuple[ShardInfo, ...]
    max_id: int


def assemble(
    side: BuildSplit,
    config: BuildConfig,
    max_length: int,
    folder: Path,
    spills: Path,
    executor: Executor,
    progress: Progress,
    check_shards: Callable[[int], None],
) -> Assembled:
    """Plan and write the shards of a side into `folder`; spills: the folder of the spills.

    check_shards: called with the number of shards before the first is written.

    Raises:
        StorageError: a shard cannot be written.
        ConfigError: a shard would have more tokens than its offsets can count.
    """
    plan = plan_packs(side.parts, config, max_length, side.take)
    keep = config.pack.order == "keep"
    # Best-fit order follows length, so packs are shuffled.
    order = (
        np.arange(plan.num_bins) if keep else seeded_permutation(plan.num_bins, config.pack.seed)
    )
    tasks, shards = _Tasks(side, plan, order, config, max_length, folder, spills), {}
    check_shards(len(tasks))
    for shard in executor.map_unordered(assemble_shard, tasks):
        shards[shard.index] = shard
        progress("write", len(shards), len(tasks))
    infos = tuple(shards[index].info for index in range(len(shards)))
    return Assembled(plan, order, infos, max(shard.max_id for shard in shards.values()))


class _Tasks:
    """The shards to write, in order, made as they are asked for."""

    def __init__(
        self,
        side: BuildSplit,
        plan: PackPlan,
        order: NDArray[np.int64],
        config: BuildConfig,
        max_length: int,
        folder: Path,
        spills: Path,
    ) -> None:
        self._parts, self._folder, self._spills = side.parts, folder, spills
        self._max_length, self._position_ids = max_length, config.output.position_ids
        sizes = np.diff(plan.offsets)[order]
        begins = plan.offsets[:-1][order]
        places = np.arange(int(sizes.sum())) + np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)
        members = plan.members[places]
        self._members = members if side.take is None else side.take[members]
        lengths = np.concatenate([part.lengths for part in side.parts])
        # Where the plan cuts sequences, members are parts of rows.
        self._sizes = (
            lengths[self._members] if plan.sizes is None else plan.sizes[places].astype(np.int32)
        )
        self._starts = None if plan.starts is None else plan.starts[places]
        counts = [len(part.lengths) for part in side.parts]
        self._part_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._row = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        self._weighted = any(part.weighted for part in side.parts)
        self._first_ordinal = _first_ordinals(side)
        self._pack_ends = np.cumsum(sizes)
        token_ends = np.cumsum(self._sizes, dtype=np.int64)[self._pack_ends - 1]
        self._edges = _shard_edges(token_ends, config.output.shard_tokens)

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __iter__(self) -> Iterator[AssembleTask]:
        for index, (first, last) in enumerate(pairwise(self._edges)):
            begin, end = (
                int(self._pack_ends[first - 1]) if first else 0,
                int(self._pack_ends[last - 1]),
            )
            own = self._members[begin:end]
            used, spill = np.unique(self._part_of[own], return_inverse=True)
            yield AssembleTask(
                index=index,
                shard_folder=self._folder,
                spills=tuple(spill_path(self._spills, self._parts[p].key) for p in used.tolist()),
                spill=spill.astype(np.int32),
                row=self._row[own],
                seq_lengths=self._sizes[begin:end],
                first_ordinal=self._first_ordinal[used],
                pack_offsets=np.concatenate(([0], self._pack_ends[first:last] - begin)),
                max_length=self._max_length,
                position_ids=self._position_ids,
                starts=None if self._starts is None else self._starts[begin:end],
                # In all shards or in none, so that they can be read as one table.
                loss_weights=self._weighted,
            )


def _first_ordinals(side: BuildSplit) -> NDArray[np.int64]:
    """Ordinal of the first line of each partition: int64 [partitions]."""
    lines = np.array([part.counts["lines"] for part in side.parts], dtype=np.int64)
    assert int(lines.sum()) == sum(accounts.lines for accounts in side.accounts)
    return np.cumsum(lines) - lines


def _shard_edges(token_ends: NDArray[np.int64], shard_tokens: int) -> list[int]:
    """First pack of each shard, and the number of packs at the end: a shard ends with the pack that
    fills it.

    As many shards as are needed, all about alike, so that the last worker is not done long after
    the others.
    """
    total = int(token_ends[-1]) if len(token_ends) else 0
    shard_tokens = -(-total // max(1, -(-total // shard_tokens)))
    edges, done = [0], 0
    while edges[-1] < len(token_ends):
        last = int(np.searchsorted(token_ends, done + shard_tokens)) + 1
        edges.append(min(last, len(token_ends)))
        tokens, done = int(token_ends[edges[-1] - 1]) - done, int(token_ends[edges[-1] - 1])
        if tokens > _MOST_TOKENS:
            raise ConfigError(
                f"a shard would have {tokens:,} tokens, and {_MOST_TOKENS:,} is the most",
                remedy="lower --shard-tokens",
            )
    return edges

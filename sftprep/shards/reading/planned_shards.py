"""Builds of layout `sequences` as packs, which are planned while they are read."""

from __future__ import annotations

import dataclasses
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftprep.shards.group import Group, GroupEntry
from sftprep.shards.layout import index_path
from sftprep.shards.manifest import Manifest
from sftprep.shards.pack_index import PackIndex
from sftprep.shards.reading.group_plan import GroupPlan, PackTotals, count_packs, plan_group
from sftprep.shards.reading.mapped_shard import file_of
from sftprep.shards.reading.pack import Pack
from sftprep.shards.reading.pack_settings import PackSettings
from sftprep.shards.reading.shards import ShardNumber, Shards
from sftprep.shards.reading.stored_sequences import StoredSequences
from sftprep.shards.schema import position_dtype
from sftprep.shards.sequences.index import SequenceIndex, read_sequence_index
from sftprep.stores.fetch_ahead import NeededFile
from sftprep.stores.folder import BuildFolder, folder_of

MOST_OPEN_GROUPS = 20
"""The most groups whose plans are kept: more than the 16 that a training run reads at a time. A
plan has about 50 bytes per sequence."""


class PlannedShards(Shards):
    """A build of layout `sequences` as a sequence of packs.

    Its manifest has the numbers of the packs that are read: `rows`, `tokens`, `max_length` and the
    packs of each group. The packs of a group are planned when one of them is first read.

    Args:
        root: The folder of the build.
        manifest: The result of `with_totals`, for these settings.
        verify: Whether to check the digest of each block when it is first accessed.
        settings: What determines the packs.
    """

    def __init__(
        self, root: BuildFolder, manifest: Manifest, *, verify: bool, settings: PackSettings
    ) -> None:
        super().__init__(root, manifest, verify=verify)
        self.settings = settings
        self._first_packs = self._group_starts[:-1].tolist()
        self._open_groups: OrderedDict[int, _OpenGroup] = OrderedDict()  # the last used last
        self._checked_blocks: dict[int, dict[int, set[int]]] = {}
        self._positions = memoryview(b"")  # 0, 1, 2 ... for position ids

    @property
    def plan_settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.settings)

    def read(self, index: int) -> Pack:
        group, pack = self._find_pack(index)
        plan = group.plan
        first, end = int(plan.offsets[pack]), int(plan.offsets[pack + 1])
        lengths = plan.lengths[first:end]
        ids, weights = group.stored.gather(group.addresses[:, first:end])
        return Pack(
            ids,
            self._position_ids(lengths.tolist()),
            plan.mask(pack),
            lengths,
            plan.origin[first:end],
            weights,
            plan.flags[first:end],
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (str(self.root), self.manifest, self.verify, self.settings))

    def seq_lengths(self, index: int) -> NDArray[np.int32]:
        group, pack = self._find_pack(index)
        return group.plan.lengths[group.plan.offsets[pack] : group.plan.offsets[pack + 1]]

    def locate(self, index: int, sequence: int) -> tuple[str, int]:
        group, pack = self._find_pack(index)
        origin = group.plan.origin[group.plan.offsets[pack] : group.plan.offsets[pack + 1]]
        number = self._find_shard(index)[0].group
        return self.manifest.locate_in_group(int(origin[sequence]), number)

    def _sizes_in_group(self, number: int, packs: NDArray[np.int64]) -> PackIndex:
        return self._group(number).plan.sizes().take(packs - self._group_starts[number])

    def _is_open(self, shard: ShardNumber) -> bool:
        group = self._open_groups.get(shard.group)
        return group is not None and group.stored.is_mapped

    def _needed_files(self, shard: ShardNumber) -> Iterator[NeededFile]:
        group = self.manifest.read_group(shard.group)
        yield NeededFile(index_path(group.key, group.index_digest), group.index_digest, None)
        yield from map(file_of, group.shards)

    def _find_pack(self, index: int) -> tuple[_OpenGroup, int]:
        """Return the group of a pack, and the number of the pack in it."""
        pack = index + len(self) if index < 0 else index
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        number = bisect_right(self._first_packs, pack) - 1
        return self._group(number), pack - self._first_packs[number]

    def _group(self, number: int) -> _OpenGroup:
        found = self._open_groups.get(number)
        if found is not None:
            self._open_groups.move_to_end(number)
            return found
        group = self.manifest.read_group(number)
        index = read_sequence_index(self.root, group)
        stored = StoredSequences(
            self.root,
            group,
            index,
            verify=self.verify,
            checked=self._checked_blocks.setdefault(number, {}),
        )
        plan = plan_group(index, self.settings, group)
        addresses = stored.find(plan.rows, plan.starts, plan.lengths, index.offsets)
        found = _OpenGroup(plan, stored, addresses)
        self._open_groups[number] = found
        if len(self._open_groups) > MOST_OPEN_GROUPS:
            self._open_groups.popitem(last=False)
        return found

    def _position_ids(self, lengths: list[int]) -> NDArray[Any]:
        """Return position ids, restarting at 0 with each sequence, from a kept range."""
        longest, dtype = max(lengths), position_dtype(self.manifest.max_length)
        if longest > len(self._positions):
            self._positions = memoryview(np.arange(longest, dtype=dtype).data).toreadonly()
        return np.frombuffer(b"".join([self._positions[:length] for length in lengths]), dtype)


class _OpenGroup(NamedTuple):
    """A group whose packs are read."""

    plan: GroupPlan
    stored: StoredSequences
    addresses: NDArray[np.int32]  # of the members of the plan, see `StoredSequences.find`


def with_totals(
    manifest: Manifest,
    settings: PackSettings,
    read_index: Callable[[Group], SequenceIndex],
) -> Manifest:
    """Return the manifest of a build with the numbers of the packs of these settings.

    Args:
        manifest: The manifest.
        settings: The settings of the packs.
        read_index: Returns the index of a group.

    Raises:
        ManifestError: The file of a group is missing or damaged.
        ShardError: An index is missing or damaged.
    """
    entries, totals = [], []
    for entry, group in zip(manifest.groups, manifest.read_groups(), strict=True):
        found = count_packs(read_index(group), settings, group)
        totals.append(found)
        entries.append(entry_with(entry, found))
    total = _sum_totals(totals)
    fill = total.tokens / (total.packs * settings.max_length) if total.packs else 1.0
    return dataclasses.replace(
        manifest,
        groups=tuple(entries),
        rows=total.packs,
        tokens=total.tokens,
        trained_tokens=total.trained_tokens,
        max_length=settings.max_length,
        plan={
            "strategy": settings.packing,
            "packs": total.packs,
            "fill": round(fill, 6),
            "seed": settings.seed,
            "cuts": total.cuts,
        },
    )


def entry_with(entry: GroupEntry, totals: PackTotals) -> GroupEntry:
    """Return the entry of a group with the numbers of its packs."""
    return dataclasses.replace(
        entry,
        packs=array("q", [totals.packs]),
        tokens=totals.tokens,
        trained_tokens=totals.trained_tokens,
    )


def _sum_totals(totals: list[PackTotals]) -> PackTotals:
    columns: Iterator[tuple[int, ...]] = zip(*map(dataclasses.astuple, totals), strict=True)
    return PackTotals(*map(sum, columns)) if totals else PackTotals(0, 0, 0, 0)


def _reopen(root: str, manifest: Manifest, verify: bool, settings: PackSettings) -> PlannedShards:
    return PlannedShards(folder_of(root), manifest, verify=verify, settings=settings)

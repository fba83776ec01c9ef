"""The packs of one group of stored sequences, planned from its index alone.

1. Cut the sequences that are longer than a pack, and leave out what trains nothing: the rules are
   those of a build of layout `packs` (`pipeline/passes/overlong.py`).
2. Repeat each range as often as the build contains its sequence. All ranges come once, then those
   with a second copy, and so on.
3. Plan the packs, and shuffle them.

So the packs are those of a build of layout `packs` with the same settings, in the same order; the
tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftprep.core.hashing import hash64, seeded_permutation
from sftprep.core.ragged import to_offsets
from sftprep.core.types import Flag
from sftprep.packing.counts import RUN_PLANNERS, plan_counts
from sftprep.packing.cut import CUTS, SequenceRanges
from sftprep.packing.strategies import pack_lengths
from sftprep.shards.group import Group
from sftprep.shards.pack_index import PackIndex
from sftprep.shards.reading.pack_settings import PackSettings
from sftprep.shards.sequences.index import SequenceIndex

_MOST_RUNS = 1 << 12
_ALTERNATING = np.arange(_MOST_RUNS) % 2 == 1
"""The values of a mask by runs, for up to this number of them."""


@dataclass(frozen=True, slots=True)
class PackTotals:
    """The numbers of packs and tokens of a group, or of several."""

    packs: int
    tokens: int
    trained_tokens: int  # targets of the loss
    cuts: int  # that the packing makes, in addition to those of long sequences


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlan:
    """The packs of a group, in the order in which they are read.

    A member is a sequence of a pack: a range of a stored one.

    Attributes:
        offsets: int64 [packs + 1]; the first member of each pack.
        rows: int32 [members]; the index of its sequence in the group.
        starts: int32 [members]; its first token in that sequence.
        lengths: int32 [members]; its number of tokens.
        trained: int32 [members]; its number of targets.
        origin: int64 [members]; slice and line of its record.
        flags: uint8 [members]; see `core.types.Flag`.
        run_offsets: int64 [packs + 1]; the first value of each pack in `run_lengths`.
        run_lengths: int32 [runs]; the completion mask of each pack: a number of tokens that are not
            trained, a number of trained ones, and so on; of others at the end.
    """

    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    starts: NDArray[np.int32]
    lengths: NDArray[np.int32]
    trained: NDArray[np.int32]
    origin: NDArray[np.int64]
    flags: NDArray[np.uint8]
    run_offsets: NDArray[np.int64]
    run_lengths: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sizes(self) -> PackIndex:
        """Return the sizes of all packs."""
        return PackIndex.of_sequences(self.lengths, self.trained, self.offsets)

    def mask(self, pack: int) -> NDArray[np.bool_]:
        """Return the completion mask of a pack: bool [T]."""
        lengths = self.run_lengths[self.run_offsets[pack] : self.run_offsets[pack + 1]]
        values = _ALTERNATING[: len(lengths)]
        if len(values) < len(lengths):
            values = np.arange(len(lengths)) % 2 == 1
        return np.repeat(values, lengths)


def plan_group(index: SequenceIndex, settings: PackSettings, group: Group) -> GroupPlan:
    """Plan the packs of a group.

    Args:
        index: Its sequences.
        settings: The settings.
        group: The group, whose records seed the order of its packs.
    """
    ranges, trained = _fit(index, settings)
    # 1. Repeat the ranges of sequences with several copies.
    copies = index.copies[ranges.rows]
    rounds = [np.flatnonzero(copies > done) for done in range(int(copies.max(initial=1)))]
    take = np.concatenate(rounds)
    # 2. Plan the packs, and bring them into their order.
    plan = pack_lengths(ranges.lengths[take], settings.max_length, settings.packing)
    order = np.arange(plan.num_bins)
    if settings.order == "shuffle":
        order = seeded_permutation(plan.num_bins, order_seed(settings.seed, group.records))
    positions, offsets = plan.members_in(order)
    planned = plan.members[positions]
    members = take[planned]
    rows, starts, lengths = ranges.select(members)
    # 3. If the packing cuts, a member is a part of its range.
    flags = np.where(lengths < index.tokens[rows], _cut_flag(settings), 0)
    trained = trained[members]
    if plan.sizes is not None and plan.starts is not None:
        starts, sizes = starts + plan.starts[positions], plan.sizes[positions]
        is_cut = sizes != lengths
        flags |= np.where(is_cut, Flag.SPLIT, 0)
        begins = index.offsets[rows[is_cut]] + starts[is_cut]
        trained[is_cut] = index.targets().count_in(begins, begins + sizes[is_cut])
        lengths = sizes
    flags |= np.where(planned >= len(rounds[0]), Flag.REPEATED, 0)
    run_offsets, run_lengths = _find_runs(index, rows, starts, lengths, offsets)
    return GroupPlan(
        offsets,
        rows.astype(np.int32),
        starts.astype(np.int32),
        lengths.astype(np.int32),
        trained.astype(np.int32),
        index.origin[rows],
        index.flags[rows] | flags.astype(np.uint8),
        run_offsets,
        run_lengths,
    )


def _find_runs(
    index: SequenceIndex,
    rows: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return `run_offsets` and `run_lengths` of a plan with these members."""
    # 1. The runs of the sequence of each member.
    num_runs = index.num_bounds // 2
    first_run = np.cumsum(num_runs, dtype=np.int64) - num_runs
    number = num_runs[rows]
    member = np.repeat(np.arange(len(rows)), number)
    run_ends = np.cumsum(number, dtype=np.int64)
    run = np.arange(len(member)) + np.repeat(first_run[rows] - (run_ends - number), number)
    # 2. The part of each within the member, as positions among the tokens of all packs.
    runs = index.bounds.reshape(-1, 2)[run] - starts[member][:, None]
    runs = np.clip(runs, 0, lengths[member][:, None])
    token_offsets = to_offsets(lengths)
    runs += token_offsets[member][:, None]
    # 3. Those that are not empty, followed by the end of the pack; lengths are their differences.
    is_filled = runs[:, 0] < runs[:, 1]
    last_run = to_offsets(is_filled.astype(np.int64))[np.append(0, run_ends)[offsets]]
    bounds = runs[is_filled].reshape(-1)
    positions = np.insert(bounds, 2 * last_run[1:], token_offsets[offsets[1:]])
    run_lengths = np.diff(positions, prepend=0).astype(np.int32)
    return 2 * last_run + np.arange(len(offsets)), run_lengths


def count_packs(index: SequenceIndex, settings: PackSettings, group: Group) -> PackTotals:
    """Return the numbers of a plan without making it where the packing allows that.

    Args:
        index: The sequences of the group.
        settings: The settings.
        group: The group.
    """
    if settings.packing == "wrapped":  # it cuts, so the targets depend on the packs
        plan = plan_group(index, settings, group)
        return PackTotals(
            packs=len(plan),
            tokens=int(plan.lengths.sum(dtype=np.int64)),
            trained_tokens=int(plan.trained.sum(dtype=np.int64)),
            cuts=len(plan.rows) - int(index.copies.sum(dtype=np.int64)),
        )
    ranges, trained = _fit(index, settings)
    copies = index.copies[ranges.rows].astype(np.int64)
    packs = int(copies.sum())
    if settings.packing in RUN_PLANNERS:
        lengths, length_of = np.unique(ranges.lengths, return_inverse=True)
        counts = np.zeros(len(lengths), np.int64)
        np.add.at(counts, length_of, copies)
        packs = plan_counts((lengths, counts), settings.max_length, settings.packing).num_bins
    return PackTotals(packs, int(ranges.lengths @ copies), int(trained @ copies), 0)


def order_seed(seed: int, records: str) -> int:
    """Return the seed of the order of the packs of a group.

    Args:
        seed: The seed of the build.
        records: The digest of the records of the group, in hex: groups have different orders.
    """
    return hash64(seed, int(records[:16], 16))


def _fit(index: SequenceIndex, settings: PackSettings) -> tuple[SequenceRanges, NDArray[np.int64]]:
    """Return the ranges of sequences that a pack can have, and the targets of each: int64 [m]."""
    lengths, trained = index.tokens.astype(np.int64), index.trained_tokens
    if settings.packing == "wrapped" or not (lengths > settings.max_length).any():
        return SequenceRanges.whole(lengths), trained
    ranges = CUTS[settings.overlong](lengths, settings.max_length, settings.truncate_side)
    trained = trained[ranges.rows]
    is_cut = ranges.lengths < lengths[ranges.rows]
    begins = index.offsets[ranges.rows[is_cut]] + ranges.starts[is_cut]
    trained[is_cut] = index.targets().count_in(begins, begins + ranges.lengths[is_cut])
    is_trained = trained > 0
    return ranges.select(is_trained), trained[is_trained]


def _cut_flag(settings: PackSettings) -> Flag:
    return Flag.SPLIT if settings.overlong == "split" else Flag.TRUNCATED

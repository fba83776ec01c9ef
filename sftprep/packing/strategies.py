"""The packing strategies: one function per strategy, in a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sftprep.core.ragged import to_offsets
from sftprep.errors import ConfigError, setting
from sftprep.packing.exact import exact_runs
from sftprep.packing.runs import expand_moves
from sftprep.packing.small import (
    SMALL,
    best_fit_decreasing_small,
    is_small,
    name_bins,
    sort_small,
)
from sftprep.packing.validation import to_checked_capacity, to_checked_lengths

__all__ = ["SMALL", "STRATEGIES", "PackPlan", "pack_lengths"]


@dataclass(frozen=True, slots=True, eq=False)
class PackPlan:
    """The bin of each sequence, and the sequences of each bin.

    Attributes:
        bin_of: int64 [n], the bin of each sequence, -1 if its length is 0. If a sequence is cut,
            the bin of its first part.
        members: int64 [m], indices of sequences, grouped by bin, in their order in the pack.
        offsets: int64 [num_bins + 1]; bin b contains `members[offsets[b] : offsets[b + 1]]`.
        capacity: The number of tokens that fit into a bin.
        tokens: The number of tokens in all bins together.
        starts, sizes: int64 [m], if the strategy cuts sequences: member k is `sizes[k]` tokens of
            its sequence, from its token `starts[k]`, and a sequence can be a member several times.
            None if members are whole sequences.

    Example:
        lengths [5, 3, 2, 7] in bins of 8: bin_of = [1, 1, 2, 0], members = [3, 0, 1, 2],
        offsets = [0, 1, 3, 4], tokens = 17
    """

    bin_of: NDArray[np.int64]
    members: NDArray[np.int64]
    offsets: NDArray[np.int64]
    capacity: int
    tokens: int
    starts: NDArray[np.int64] | None = None
    sizes: NDArray[np.int64] | None = None

    @property
    def num_bins(self) -> int:
        """Return the number of bins; none is empty."""
        return self.offsets.size - 1

    @property
    def fill(self) -> float:
        """Return the used share of the capacity of all bins; 1.0 if there are none."""
        return self.tokens / (self.num_bins * self.capacity) if self.num_bins else 1.0

    def members_in(self, order: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the members of the bins in another order of the bins.

        Args:
            order: int64 [num_bins]; the bins.

        Returns:
            Indices into `members`, int64 [m]; and the first one of each bin of `order`, int64
            [num_bins + 1].

        Example:
            offsets = [0, 1, 3], order = [1, 0]  ->  [1, 2, 0], [0, 2, 3]
        """
        sizes = np.diff(self.offsets)[order]
        offsets = to_offsets(sizes)
        shift = self.offsets[:-1][order] - offsets[:-1]
        return np.arange(int(offsets[-1])) + np.repeat(shift, sizes), offsets


def pack_lengths(lengths: ArrayLike, capacity: int, strategy: str = "bfd") -> PackPlan:
    """Plan the packs of sequences from their lengths alone.

    The plan depends only on the arguments.

    Args:
        lengths: Integers [n] of any integer dtype, n < 2**31; a sequence of length 0 is in no bin.
        capacity: Tokens in a pack, 1 .. 2**31 - 1.
        strategy: "bfd", best-fit decreasing over all sequences (the packs of TRL 1.16
            `pack_dataset(strategy="bfd")` on one window, in its order); "bfd_split", the same after
            sequences above the capacity are cut into parts; "exact", bins that are filled to the
            last token where possible, and best-fit decreasing for the rest; "wrapped", all
            sequences concatenated and cut every `capacity` tokens; "none", each non-empty sequence
            in its own bin, in the order of the input.

    Raises:
        ConfigError: The strategy is unknown, the capacity or a length is out of range, or a
            sequence is longer than the capacity and the strategy does not cut.

    Example:
        pack_lengths([5, 3, 2, 7], 8).bin_of  ->  [1, 1, 2, 0]
    """
    plan = STRATEGIES.get(strategy)
    if plan is None:
        raise ConfigError(
            f"packing strategy is {strategy!r}", remedy=f"choose one of: {', '.join(STRATEGIES)}"
        )
    return plan(to_checked_lengths(lengths), to_checked_capacity(capacity))


def pack_best_fit(lengths: NDArray[np.int32], capacity: int) -> PackPlan:
    """Pack all sequences by best-fit decreasing.

    Args:
        lengths: int32 [n], not negative.

    Raises:
        ConfigError: A length is above the capacity.
    """
    _check_overlong(lengths, capacity)
    # Which planner runs depends only on speed: both return the same plan.
    if is_small(lengths.size):
        bin_of, members, offsets = best_fit_decreasing_small(lengths, capacity)
    else:
        from sftprep.packing.bestfit import best_fit_decreasing  # loads numba

        bin_of, members, offsets = best_fit_decreasing(lengths, capacity)
    return PackPlan(bin_of, members, offsets, capacity, tokens=int(lengths.sum(dtype=np.int64)))


def pack_exact(lengths: NDArray[np.int32], capacity: int) -> PackPlan:
    """Fill bins completely by patterns of lengths where possible, the rest by best-fit decreasing.

    There are at most as many bins as with `pack_best_fit`; see `exact.py`.

    Args:
        lengths: int32 [n], not negative.

    Raises:
        ConfigError: A length is above the capacity.
    """
    _check_overlong(lengths, capacity)
    if is_small(lengths.size):
        order = sort_small(lengths)
        run_length, run_count = np.unique(lengths[order], return_counts=True)
        moves, _ = exact_runs(
            run_length[::-1].astype(np.int64), run_count[::-1].astype(np.int64), capacity
        )
        bin_of, members, offsets = name_bins(order, expand_moves(moves), lengths.size)
    else:
        from sftprep.packing.bestfit import pack_by_counts  # loads numba

        bin_of, members, offsets = pack_by_counts(lengths, capacity, exact_runs)
    return PackPlan(bin_of, members, offsets, capacity, tokens=int(lengths.sum(dtype=np.int64)))


def pack_apart(lengths: NDArray[np.int32], capacity: int) -> PackPlan:
    """Put each non-empty sequence into its own bin, in the order of the input.

    Args:
        lengths: int32 [n], not negative.

    Raises:
        ConfigError: A length is above the capacity.
    """
    _check_overlong(lengths, capacity)
    members = np.flatnonzero(lengths).astype(np.int64, copy=False)
    bin_of = np.full(lengths.size, -1, np.int64)
    bin_of[members] = np.arange(members.size)
    offsets = np.arange(members.size + 1)
    return PackPlan(bin_of, members, offsets, capacity, tokens=int(lengths.sum(dtype=np.int64)))


def pack_split_best_fit(lengths: NDArray[np.int32], capacity: int) -> PackPlan:
    """Cut sequences above the capacity, and pack all parts by best-fit decreasing.

    The parts of a sequence have `capacity` tokens, except for the last one. The packs are those of
    TRL 1.16 `pack_dataset(strategy="bfd_split")`.

    Args:
        lengths: int32 [n], not negative.
    """
    # Each part: its sequence, its first token there, and its number of tokens.
    num_parts = np.maximum(1, -(-lengths.astype(np.int64) // capacity))
    first_part = (np.cumsum(num_parts) - num_parts).astype(np.int64)
    sequence_of = np.repeat(np.arange(len(lengths)), num_parts)
    starts = (np.arange(len(sequence_of)) - np.repeat(first_part, num_parts)) * capacity
    sizes = np.minimum(lengths[sequence_of] - starts, capacity)
    plan = pack_best_fit(sizes.astype(np.int32), capacity)
    # From parts back to sequences.
    bin_of = plan.bin_of[first_part] if len(first_part) else plan.bin_of
    members = plan.members
    return PackPlan(
        bin_of,
        sequence_of[members],
        plan.offsets,
        capacity,
        plan.tokens,
        starts[members],
        sizes[members],
    )


def pack_wrapped(lengths: NDArray[np.int32], capacity: int) -> PackPlan:
    """Concatenate all sequences in input order, and cut every `capacity` tokens.

    Only the last bin may be shorter. The packs are those of TRL 1.16
    `pack_dataset(strategy="wrapped")` on one window.

    Args:
        lengths: int32 [n], not negative.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    # A part begins where a sequence or a bin does.
    begins = np.unique(
        np.concatenate((ends - lengths, np.arange(0, total, capacity, dtype=np.int64)))
    )
    begins = begins[begins < total]
    members = np.searchsorted(ends, begins, side="right")
    bins = begins // capacity
    offsets = np.searchsorted(bins, np.arange(-(-total // capacity) + 1))
    bin_of = np.where(lengths > 0, (ends - lengths) // capacity, -1)
    sizes = np.diff(np.append(begins, total))
    starts = begins - (ends - lengths)[members]
    return PackPlan(bin_of, members, offsets, capacity, total, starts, sizes)


STRATEGIES: dict[str, Callable[[NDArray[np.int32], int], PackPlan]] = {
    "bfd": pack_best_fit,
    "bfd_split": pack_split_best_fit,
    "exact": pack_exact,
    "wrapped": pack_wrapped,
    "none": pack_apart,
}
"""Strategies by name. Each takes checked lengths (int32 [n], C-contiguous, not negative) and a
checked capacity. A new strategy is a function and a line here."""


def _check_overlong(lengths: NDArray[np.int32], capacity: int) -> None:
    if lengths.max(initial=0) > capacity:
        index = int(np.argmax(lengths > capacity))
        raise ConfigError(
            f"sequence {index} has {lengths[index]} tokens, more than the capacity of a pack,"
            f" {capacity}",
            remedy=[
                "truncate or split longer sequences before packing",
                f"raise the capacity ({setting('max_length')})",
            ],
        )

"""The packing strategies: one function per strategy, in a table."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sftprep.errors import ConfigError, setting
from sftprep.packing.small import best_fit_decreasing_small

SMALL = 200_000
"""Maximum number of sequences of a plan that is made in plain Python, which takes 0.1 s; loading
the compiled kernels takes 0.6 s."""
SMALL_WHEN_LOADED = 1_000
"""The same, if this process has already loaded the kernels."""

_LIMIT = 2**31


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


def pack_lengths(lengths: ArrayLike, capacity: int, strategy: str = "bfd") -> PackPlan:
    """Plan the packs of sequences from their lengths alone.

    The plan depends only on the arguments.

    Args:
        lengths: Integers [n] of any integer dtype, n < 2**31; a sequence of length 0 is in no bin.
        capacity: Tokens in a pack, 1 .. 2**31 - 1.
        strategy: "bfd", best-fit decreasing over all sequences (the packs of TRL 1.16
            `pack_dataset(strategy="bfd")` on one window, in its order); "bfd_split", the same after
            sequences above the capacity are cut into parts; "wrapped", all sequences concatenated
            and cut every `capacity` tokens; "none", each non-empty sequence in its own bin, in the
            order of the input.

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
    return plan(_to_checked_lengths(lengths), _to_checked_capacity(capacity))


def pack_best_fit(lengths: NDArray[np.int32], capacity: int) -> PackPlan:
    """Pack all sequences by best-fit decreasing.

    Args:
        lengths: int32 [n], not negative.

    Raises:
        ConfigError: A length is above the capacity.
    """
    _check_overlong(lengths, capacity)
    # Which planner runs depends only on speed: both return the same plan.
    if lengths.size <= (SMALL_WHEN_LOADED if "sftprep.packing.bestfit" in sys.modules else SMALL):
        bin_of, members, offsets = best_fit_decreasing_small(lengths, capacity)
    else:
        from sftprep.packing.bestfit import best_fit_decreasing  # loads numba

        bin_of, members, offsets = best_fit_decreasing(lengths, capacity)
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
    "wrapped": pack_wrapped,
    "none": pack_apart,
}
"""Strategies by name. Each takes checked lengths (int32 [n], C-contiguous, not negative) and a
checked capacity. A new strategy is a function and a line here."""


def _to_checked_lengths(lengths: ArrayLike) -> NDArray[np.int32]:
    try:
        array = np.asarray(lengths)
    except ValueError as error:
        raise ConfigError(
            f"lengths are not a one-dimensional array: {error}",
            remedy="pass one integer per sequence",
        ) from error
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ConfigError(
            f"lengths are an array of {array.ndim} dimensions and dtype {array.dtype}",
            remedy="pass one integer per sequence",
        )
    if array.size >= _LIMIT:
        raise ConfigError(
            f"{array.size} sequences are too many for one plan",
            remedy=f"plan fewer than {_LIMIT} at a time",
        )
    if array.size and array.min() < 0:
        index = int(np.argmax(array < 0))
        raise ConfigError(
            f"the length of sequence {index} is {array[index]}", remedy="pass lengths of 0 or more"
        )
    if array.size and array.max() >= _LIMIT:
        index = int(np.argmax(array >= _LIMIT))
        raise ConfigError(
            f"sequence {index} has {array[index]} tokens: no pack can hold it, lengths are 32-bit",
            remedy="truncate or split it before packing",
        )
    return np.ascontiguousarray(array, dtype=np.int32)


def _to_checked_capacity(capacity: int) -> int:
    try:
        checked = operator.index(capacity)
    except TypeError as error:
        raise ConfigError(
            f"capacity is {capacity!r}", remedy="pass a whole number of tokens"
        ) from error
    if not 1 <= checked < _LIMIT:
        raise ConfigError(
            f"capacity is {checked}: a pack holds 1 to {_LIMIT - 1} tokens",
            remedy="pass a capacity in that range",
        )
    return checked


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

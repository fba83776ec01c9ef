"""Which sequences share a pack: one function a strategy, in a table."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sftprep.errors import ConfigError
from sftprep.packing.small import best_fit_decreasing_small

SMALL = 200_000
"""Plans of up to so many sequences are made in plain Python: 0.1 s, where loading the compiled
kernels takes 0.6 s."""
SMALL_WHEN_LOADED = 1_000
"""The same, once this process has loaded the kernels."""

_LIMIT = 2**31


@dataclass(frozen=True, slots=True, eq=False)
class PackPlan:
    """Which bin each sequence is in, and which sequences each bin holds.

    bin_of: int64 [n], the bin of each sequence; -1 for one that is in no bin, because its length is
    0. members: int64 [sequences in bins], sequence indices grouped by bin, in the order in which
    they stand in the pack. offsets: int64 [num_bins + 1]; bin b holds members[offsets[b]:offsets[b
    + 1]]. capacity: tokens that a bin can hold; tokens: tokens in all bins together. starts, sizes:
    int64 [members], where a strategy cuts sequences: member k is `sizes[k]` tokens of its sequence,
    from its token `starts[k]` on, and a sequence may be a member several times (bin_of is then the
    bin of its first part); None where members are whole sequences.
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
        """Number of bins; none is empty."""
        return self.offsets.size - 1

    @property
    def fill(self) -> float:
        """Share of the bins' capacity that holds tokens; 1.0 where there is no bin, since nothing
        is wasted."""
        return self.tokens / (self.num_bins * self.capacity) if self.num_bins else 1.0


def pack_lengths(lengths: ArrayLike, capacity: int, strategy: str = "bfd") -> PackPlan:
    """Plan which sequences share a pack of `capacity` tokens, from their lengths alone.

    lengths: integers [n] of any integer dtype, n < 2**31; a sequence of length 0 is in no bin.
    capacity: 1 .. 2**31 - 1. strategy: "bfd", best-fit decreasing over all sequences (the packs of
    TRL 1.16 `pack_dataset(strategy="bfd")` on one window, in its order); "bfd_split", the same
    after sequences over the capacity are cut into parts of it; "wrapped", all sequences one after
    the other, cut every `capacity` tokens; "none", each non-empty sequence in its own bin, in input
    order. The plan depends on the arguments only. Raises ConfigError for lengths that are not
    integers [n], a negative length, one over capacity, a capacity out of range, an unknown
    strategy.
    """
    plan = STRATEGIES.get(strategy)
    if plan is None:
        raise ConfigError(
            f"packing strategy is {strategy!r}", remedy=f"choose one of: {', '.join(STRATEGIES)}"
        )
    return plan(_checked_lengths(lengths), _checked_capacity(capacity))


def pack_best_fit(lengths: NDArray[np.int32], capacity: int) -> PackPlan:
    """Best-fit decreasing over all sequences. lengths: int32 [n], not negative; ConfigError for one
    over capacity."""
    _refuse_overlong(lengths, capacity)
    if lengths.size <= (SMALL_WHEN_LOADED if "sftprep.packing.bestfit" in sys.modules else SMALL):
        bin_of, members, offsets = best_fit_decreasing_small(lengths, capacity)
    else:
        from sftprep.packing.bestfit import (
            best_fit_decreasing,
        )  # numba and its kernels, where they are first needed

        bin_of, members, offsets = best_fit_decreasing(lengths, capacity)
    return PackPlan(bin_of, members, offsets, capacity, tokens=int(lengths.sum(dtype=np.int64)))


def pack_apart(lengths: NDArray[np.int32], capacity: int) -> PackPlan:
    """A bin for each non-empty sequence, in input order. lengths: int32 [n], not negative;
    ConfigError for one over capacity."""
    _refuse_overlong(lengths, capacity)
    members = np.flatnonzero(lengths).astype(np.int64, copy=False)
    bin_of = np.full(lengths.size, -1, np.int64)
    bin_of[members] = np.arange(members.size)
    return PackPlan(
        bin_of,
        members,
        np.arange(members.size + 1),
        capacity,
        tokens=int(lengths.sum(dtype=np.int64)),
    )


def pack_split_best_fit(lengths: NDArray[np.int32], capacity: int) -> PackPlan:
    """Best-fit decreasing over sequences and the parts of those above `capacity`: all of it, and
    then the rest.

    lengths: int32 [n], not negative. Source: `pack_dataset(strategy="bfd_split")` of TRL 1.16.
    """
    parts = np.maximum(1, -(-lengths.astype(np.int64) // capacity))
    of = np.repeat(np.arange(len(lengths)), parts)
    starts = (np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)) * capacity
    sizes = np.minimum(lengths[of] - starts, capacity)
    plan = pack_best_fit(sizes.astype(np.int32), capacity)
    first = (np.cumsum(parts) - parts).astype(np.int64)
    bin_of = plan.bin_of[first] if len(first) else plan.bin_of
    members = plan.members
    return PackPlan(
        bin_of, of[members], plan.offsets, capacity, plan.tokens, starts[members], sizes[members]
    )


def pack_wrapped(lengths: NDArray[np.int32], capacity: int) -> PackPlan:
    """All sequences one after the other, in input order, cut every `capacity` tokens; only the last
    bin may be short.

    lengths: int32 [n], not negative. Source: `pack_dataset(strategy="wrapped")` of TRL 1.16, of one
    window.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    begins = np.unique(
        np.concatenate((ends - lengths, np.arange(0, total, capacity, dtype=np.int64)))
    )
    begins = begins[begins < total]
    members = np.searchsorted(ends, begins, side="right")
    bins = begins // capacity
    offsets = np.searchsorted(bins, np.arange(-(-total // capacity) + 1))
    bin_of = np.where(lengths > 0, (ends - lengths) // capacity, -1)
    sizes = np.diff(np.append(begins, total))
    return PackPlan(
        bin_of, members, offsets, capacity, total, begins - (ends - lengths)[members], sizes
    )


STRATEGIES: dict[str, Callable[[NDArray[np.int32], int], PackPlan]] = {
    "bfd": pack_best_fit,
    "bfd_split": pack_split_best_fit,
    "wrapped": pack_wrapped,
    "none": pack_apart,  # add yours here
}
"""Strategies by name. Each takes checked lengths (int32 [n], C-contiguous, not negative) and a
checked capacity."""


def _checked_lengths(lengths: ArrayLike) -> NDArray[np.int32]:
    try:
        given = np.asarray(lengths)
    except ValueError as error:
        raise ConfigError(
            f"lengths are not one row of integers: {error}", remedy="give one integer a sequence"
        ) from error
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
        raise ConfigError(
            f"lengths are an array of {given.ndim} dimensions and dtype {given.dtype}",
            remedy="give one integer a sequence",
        )
    if given.size >= _LIMIT:
        raise ConfigError(
            f"{given.size} sequences are too many for one plan",
            remedy=f"plan fewer than {_LIMIT} at a time",
        )
    if given.size and given.min() < 0:
        index = int(np.argmax(given < 0))
        raise ConfigError(
            f"the length of sequence {index} is {given[index]}", remedy="give lengths of 0 or more"
        )
    if given.size and given.max() >= _LIMIT:
        index = int(np.argmax(given >= _LIMIT))
        raise ConfigError(
            f"sequence {index} has {given[index]} tokens: no pack can hold it, lengths are 32-bit",
            remedy="truncate or split it before packing",
        )
    return np.ascontiguousarray(given, dtype=np.int32)


def _checked_capacity(capacity: int) -> int:
    try:
        checked = operator.index(capacity)
    except TypeError as error:
        raise ConfigError(
            f"capacity is {capacity!r}", remedy="give a whole number of tokens"
        ) from error
    if not 1 <= checked < _LIMIT:
        raise ConfigError(
            f"capacity is {checked}: a pack holds 1 to {_LIMIT - 1} tokens",
            remedy="give a capacity in that range",
        )
    return checked


def _refuse_overlong(lengths: NDArray[np.int32], capacity: int) -> None:
    if lengths.max(initial=0) > capacity:
        index = int(np.argmax(lengths > capacity))
        raise ConfigError(
            f"sequence {index} has {lengths[index]} tokens, more than the capacity of a pack,"
            f" {capacity}",
            remedy=(
                "truncate or split longer sequences before packing, or raise the capacity"
                " (max_length)"
            ),
        )

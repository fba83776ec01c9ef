"""Best-fit decreasing in plain Python, for small plans.

Such plans are too small to load a compiler for. The rule and the result are those of `bestfit.py`,
against which this module is tested. A sequence costs two microseconds instead of 0.1, but importing
numba costs half a second.

1. Visit the sequences longest first.
2. Find the smallest space that is sufficient by bisection of the sorted spaces of open bins.
3. Take the bin that has had this space longest from its queue, or open a bin.
4. Put the bin into the queue of its remaining space.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections import deque

import numpy as np
from numpy.typing import NDArray

SMALL = 200_000
"""Maximum number of sequences of a plan that is made in plain Python, which takes 0.1 s; loading
the compiled kernels takes 0.6 s."""
SMALL_WHEN_LOADED = 1_000
"""The same, if this process has already loaded the kernels."""


def is_small(sequences: int) -> bool:
    """Return whether a plan is made in plain Python, which depends only on speed."""
    return sequences <= (
        SMALL_WHEN_LOADED if "sftprep.packing.run_planner" in sys.modules else SMALL
    )


def best_fit_decreasing_small(
    lengths: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return bin_of, members and offsets as `bestfit.best_fit_decreasing` does."""
    order = sort_small(lengths)
    return name_bins(order, assign_bins(lengths[order].tolist(), capacity), len(lengths))


def sort_small(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the indices of the non-empty sequences, longest first: int64 [sequences]."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    return order[: int(np.count_nonzero(lengths))]


def assign_bins(lengths: list[int], capacity: int) -> NDArray[np.int64]:
    """Return the bin of each sequence by best-fit decreasing: int64 [sequences].

    Args:
        lengths: The lengths, descending, 1 .. capacity.
        capacity: Tokens in a bin.
    """
    bins_with: dict[int, deque[int]] = {}  # open bins by their space, in the order they got it
    spaces: list[int] = []  # the keys of bins_with, sorted
    bin_of_ordered: list[int] = []
    num_bins = 0
    for length in lengths:
        at = bisect_left(spaces, length)
        if at == len(spaces):
            chosen, space = num_bins, capacity
            num_bins += 1
        else:
            space = spaces[at]
            queue = bins_with[space]
            chosen = queue.popleft()
            if not queue:
                del bins_with[space], spaces[at]
        bin_of_ordered.append(chosen)
        remaining = space - length
        if remaining:
            if remaining not in bins_with:
                bins_with[remaining] = deque()
                insort(spaces, remaining)
            bins_with[remaining].append(chosen)
    return np.array(bin_of_ordered, dtype=np.int64)


def name_bins(
    order: NDArray[np.int64], bins: NDArray[np.int64], sequences: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return bin_of, members and offsets from the bins of sorted sequences.

    Args:
        order: int64 [m]; the indices of the non-empty sequences, longest first.
        bins: int64 [m]; their bins, each of 0 .. the largest at least once.
        sequences: The number of sequences, with the empty ones.
    """
    bin_of = np.full(sequences, -1, dtype=np.int64)
    bin_of[order] = bins
    members = order[np.argsort(bins, kind="stable")].astype(np.int64, copy=False)
    sizes = np.bincount(bins)
    return bin_of, members, np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)

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

from bisect import bisect_left, insort
from collections import deque

import numpy as np
from numpy.typing import NDArray


def best_fit_decreasing_small(
    lengths: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return bin_of, members and offsets as `bestfit.best_fit_decreasing` does."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    order = order[: int(np.count_nonzero(lengths))]
    bins_with: dict[int, deque[int]] = {}  # open bins by their space, in the order they got it
    spaces: list[int] = []  # the keys of bins_with, sorted
    bin_of_ordered: list[int] = []
    num_bins = 0
    for length in lengths[order].tolist():
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
    # From sorted order to the order of the input, and to the members of each bin.
    ordered = np.array(bin_of_ordered, dtype=np.int64)
    bin_of = np.full(len(lengths), -1, dtype=np.int64)
    bin_of[order] = ordered
    members = order[np.argsort(ordered, kind="stable")].astype(np.int64, copy=False)
    sizes = np.bincount(ordered, minlength=num_bins)
    return bin_of, members, np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)

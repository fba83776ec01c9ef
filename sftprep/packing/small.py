"""Best-fit decreasing in plain Python, for plans too small to be worth loading a compiler for.

The rule and the result are those of `bestfit.py`, against which it is tested. An item costs two
microseconds instead of a tenth; importing numba costs half a second.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

import numpy as np
from numpy.typing import NDArray


def best_fit_decreasing_small(
    lengths: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """As `bestfit.best_fit_decreasing`: bin_of int64 [n], members int64, offsets int64 [bins +
    1]."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    order = order[: int(np.count_nonzero(lengths))]
    bins_with: dict[int, deque[int]] = {}
    spaces: list[int] = []  # the keys of bins_with, sorted
    bin_of_ordered: list[int] = []
    count = 0
    for length in lengths[order].tolist():
        at = bisect_left(spaces, length)
        if at == len(spaces):
            chosen, space = count, capacity
            count += 1
        else:
            space = spaces[at]
            waiting = bins_with[space]
            chosen = waiting.popleft()
            if not waiting:
                del bins_with[space], spaces[at]
        bin_of_ordered.append(chosen)
        left = space - length
        if left:
            if left not in bins_with:
                bins_with[left] = deque()
                insort(spaces, left)
            bins_with[left].append(chosen)
    ordered = np.array(bin_of_ordered, dtype=np.int64)
    bin_of = np.full(len(lengths), -1, dtype=np.int64)
    bin_of[order] = ordered
    members = order[np.argsort(ordered, kind="stable")].astype(np.int64, copy=False)
    offsets = np.concatenate(([0], np.cumsum(np.bincount(ordered, minlength=count)))).astype(
        np.int64
    )
    return bin_of, members, offsets

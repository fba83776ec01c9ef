"""Plans of runs: the planners that need only the number of sequences of each length.

A *run* is a length and the number of sequences that have it; runs are sorted, the longest first. A
plan of runs is a table of *moves* (first, size, k): a move puts the next size * k sequences, in the
order of the runs, into the bins first .. first + size - 1, k into each in turn. No move spans two
runs. The moves need a few kilobytes for any number of sequences.

Importing this module does not import numba.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sftprep.packing.small import assign_bins, is_small

RunPlan = tuple[NDArray[np.int64], int]
"""The moves, int64 [moves, 3], and the number of bins."""

RunPlanner = Callable[[NDArray[np.int64], NDArray[np.int64], int], RunPlan]
"""A function of the lengths of the runs, int64 [runs], descending; the counts, int64 [runs], at
least 1; and the capacity."""


def best_fit_runs(
    run_length: NDArray[np.int64], run_count: NDArray[np.int64], capacity: int
) -> RunPlan:
    """Plan runs by best-fit decreasing; see `RunPlanner`.

    Which planner runs depends only on speed: the bins of the sequences are the same.
    """
    if not is_small(int(run_count.sum())):
        from sftprep.packing.run_planner import plan_runs  # loads numba

        return plan_runs(run_length, run_count, capacity)
    lengths = np.repeat(run_length, run_count)
    bins = assign_bins(lengths.tolist(), capacity)
    return _to_moves(lengths, bins), int(bins.max(initial=-1)) + 1


def expand_moves(moves: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bin of each sequence in the order of the runs: int64 [sequences].

    Example:
        moves = [[0, 2, 1], [1, 1, 3]]  ->  [0, 1, 1, 1, 1]
    """
    first, size, taken = moves.T
    ends = np.cumsum(size)
    bins = np.arange(int(size.sum())) + np.repeat(first - (ends - size), size)
    return np.repeat(bins, np.repeat(taken, size))


def _to_moves(lengths: NDArray[np.int64], bins: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the moves of sequences in the order of the runs; the inverse of `expand_moves`.

    Args:
        lengths: int64 [sequences]; the length of each sequence.
        bins: int64 [sequences]; its bin.
    """
    # Sequences of one length that follow each other into one bin.
    starts = np.flatnonzero((np.diff(lengths, prepend=-1) != 0) | (np.diff(bins, prepend=-1) != 0))
    taken = np.diff(starts, append=len(bins))
    length, first = lengths[starts], bins[starts]
    # Bins that follow each other and take equally many.
    is_start = np.diff(length, prepend=-1) != 0
    is_start |= (np.diff(first, prepend=-2) != 1) | (np.diff(taken, prepend=0) != 0)
    firsts = np.flatnonzero(is_start)
    size = np.diff(firsts, append=len(first))
    return np.column_stack((first[firsts], size, taken[firsts])).astype(np.int64)

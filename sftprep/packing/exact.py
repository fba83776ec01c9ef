"""Exact packing: patterns of lengths that fill a bin completely.

Idea. Of many sequences, most bins can be filled to the last token. A *pattern* is a list of lengths
with the sum of the capacity, and it is applied to as many bins as the counts of its lengths allow:
the cost depends on the number of runs (distinct lengths), not on the number of sequences.

Steps.
1. The longest remaining length is in the next pattern.
2. Add lengths to a set of reachable sums, the longest first, each as often as its count allows,
   until the set has the remaining space. So the shortest length of the pattern is as long as
   possible, and short sequences, which close gaps best, are kept for the end. The set is an
   integer whose bit s is set if the sum s is reachable: adding m sequences of length l is a shift
   by m * l.
3. Go back through the sets, taking as few of each length as possible, and so find the pattern.
4. Apply it as often as the counts allow, and go to 1. If no pattern has the longest length, its
   sequences are left for the end.
5. Pack what is left by best-fit decreasing.

If best-fit decreasing alone needs no more bins, or there are more than `MOST_RUNS` runs, the plan
is that of best-fit decreasing.

Cost. There are one or two patterns per run. A pattern shifts an integer of at most `capacity` bits
a few times for each run that it tries, at worst all of them: 0.01 to 1.5 seconds for chats and
capacities up to 32,768. `MOST_STEPS` bounds it to a few seconds.

Reference: `has_pattern` in tests/packing/test_exact.py, by recursion over all subsets.
"""

from __future__ import annotations

from bisect import bisect_left
from operator import neg

import numpy as np
from numpy.typing import NDArray

from sftprep.packing.runs import RunPlan, best_fit_runs

MOST_RUNS = 8_192
"""Maximum number of distinct lengths for which patterns are searched."""

MOST_STEPS = 3_000_000
"""Maximum number of runs that the search for patterns tries, each counted once for every 4,096
tokens of space. What remains then is packed by best-fit decreasing. A number and not a time, so
that the plan is the same on every machine."""

Pattern = list[tuple[int, int]]
"""Pairs of a run and the number of its sequences in a bin; each run once, the longest first."""


def exact_runs(
    run_length: NDArray[np.int64], run_count: NDArray[np.int64], capacity: int
) -> RunPlan:
    """Plan runs by patterns that fill a bin, and the rest by best-fit decreasing.

    See `RunPlanner` for the arguments.

    Returns:
        The moves and the number of bins, which is at most that of best-fit decreasing. The bins
        are in the order of the patterns.
    """
    best_fit = best_fit_runs(run_length, run_count, capacity)
    lower_bound = -(-int(run_length @ run_count) // capacity)
    if run_length.size > MOST_RUNS or best_fit[1] == lower_bound:
        return best_fit
    patterns, left = find_patterns(run_length.tolist(), run_count.tolist(), capacity)
    left_count = np.array(left, np.int64)
    is_left = left_count > 0
    rest_moves, rest_bins = best_fit_runs(run_length[is_left], left_count[is_left], capacity)
    num_full = sum(times for _, times in patterns)
    if num_full + rest_bins >= best_fit[1]:
        return best_fit
    # One move for each run of a pattern.
    rows: list[tuple[int, int, int, int]] = []  # run, first, size, k
    first = 0
    for pattern, times in patterns:
        rows += [(run, first, times, k) for run, k in pattern]
        first += times
    pattern_rows = np.array(rows, np.int64).reshape(-1, 4)
    # The run of each of the other moves: they take the sequences that are left, in their order.
    taken = rest_moves[:, 1] * rest_moves[:, 2]
    position = np.searchsorted(np.cumsum(left_count), np.cumsum(taken) - taken, side="right")
    # In each run, patterns take the first sequences, in their order.
    runs = np.concatenate((pattern_rows[:, 0], position))
    moves = np.concatenate((pattern_rows[:, 1:], rest_moves + np.array([num_full, 0, 0])))
    return moves[np.argsort(runs, kind="stable")], num_full + rest_bins


def find_patterns(
    run_length: list[int], run_count: list[int], capacity: int
) -> tuple[list[tuple[Pattern, int]], list[int]]:
    """Return the patterns, each with its number of bins, and the counts that are left.

    Args:
        run_length: The distinct lengths, descending, 1 .. capacity.
        run_count: The number of sequences of each length.
        capacity: Tokens in a bin.

    Example:
        run_length = [5, 3, 2], run_count = [3, 2, 1], capacity = 8  ->  [([(0, 1), (1, 1)], 2)],
        [1, 0, 1]
    """
    remaining = list(run_count)
    left = [0] * len(run_length)
    patterns: list[tuple[Pattern, int]] = []
    steps = 0
    for top in range(len(run_length)):
        while remaining[top]:
            pattern: Pattern = []
            if steps < MOST_STEPS:
                pattern, new_steps = _find_pattern(top, run_length, remaining, capacity)
                steps += new_steps
            if not pattern:  # nor is there one later, when fewer sequences remain
                left[top], remaining[top] = remaining[top], 0
                break
            times = min(remaining[run] // k for run, k in pattern)
            for run, k in pattern:
                remaining[run] -= k * times
            patterns.append((pattern, times))
    return patterns, left


def _find_pattern(
    top: int, run_length: list[int], remaining: list[int], capacity: int
) -> tuple[Pattern, int]:
    """Return a pattern whose longest run is `top`, and the steps of the search.

    The pattern is empty if there is none.
    """
    # Add runs to the reachable sums until the space left by the longest sequence is one of them.
    space = capacity - run_length[top]
    mask, goal = (1 << (space + 1)) - 1, 1 << space
    sums = 1  # only the sum of no sequence
    added: list[tuple[int, int]] = []  # runs that reached new sums, and the sums before
    start = run = max(top, bisect_left(run_length, -space, key=neg))  # longer ones do not fit
    cost = space // 4_096 + 1
    while not sums & goal:
        if run == len(run_length):
            return [], (run - start) * cost
        length, count = run_length[run], remaining[run] - (run == top)
        count = min(count, space // length)
        reached, k = sums, 1
        while count > 0:  # by 1, 2, 4, ... and the rest: any number up to the count
            step = min(k, count)
            reached |= reached << (step * length)
            count, k = count - step, 2 * k
        reached &= mask
        if reached != sums:
            added.append((run, sums))
            sums = reached
        run += 1
    steps = (run - start) * cost
    # Go back: each run is taken until the rest was reachable before the run was added.
    taken: dict[int, int] = {}
    for run, sums_before in reversed(added):
        while not (sums_before >> space) & 1:
            space -= run_length[run]
            taken[run] = taken.get(run, 0) + 1
    taken[top] = taken.get(top, 0) + 1
    return sorted(taken.items()), steps

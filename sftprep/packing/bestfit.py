"""Best-fit decreasing for millions of lengths: the plan by counts, with its sequences named.

Rule. The longest sequence first, each into the fullest open bin in which it fits, otherwise into a
new bin. Of bins with equal space, the one that has had this space longest is used.

Steps.
1. Sort the sequences by counting; a run is a length and the number of sequences that have it.
2. Plan over runs (`run_planner.py`): a few moves, whatever the number of sequences.
3. Assign the sequences by replaying the moves.

Cost. Sorting and replaying: one sequential and one or two scattered memory accesses per sequence.
There are 12 thousand moves for 10 million chats and a capacity of 4,096.

Reference: tests/packing/textbook.py, one sequence at a time over a list of bins. The packs are
equal, not only as few.

Importing this module compiles the kernels or loads them from numba's cache: import it where needed.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from sftprep.packing.compilation import compiled
from sftprep.packing.run_planner import plan_runs
from sftprep.packing.runs import RunPlanner


def best_fit_decreasing(
    lengths: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pack sequences into bins by best-fit decreasing.

    Of equal lengths, the first in the input is packed first. The packs are those of TRL 1.16
    `pack_dataset(strategy="bfd")` on one window.

    Memory: the result (16 bytes per sequence, 8 per bin) and, while planning, 4 bytes per sequence,
    16 per token of the longest (or 30 more per sequence, see `_sort_keys`), 200 per distinct
    length, and at most 2 MB for the capacity.

    Args:
        lengths: int32 [n], C-contiguous, 0 <= length <= capacity (not checked), n < 2**31.
        capacity: 1 .. 2**31 - 1.

    Returns:
        `bin_of` int64 [n], the bin of each sequence, -1 if its length is 0;
        `members` int64 [sequences in bins], and `offsets` int64 [bins + 1]: bin b contains
        `members[offsets[b] : offsets[b + 1]]`, in the order in which they were added. Bins are in
        the order in which they were opened.

    Example:
        lengths = [5, 3, 2, 7], capacity = 8  ->  bin_of = [1, 1, 2, 0], members = [3, 0, 1, 2],
        offsets = [0, 1, 3, 4]
    """
    return pack_by_counts(lengths, capacity, plan_runs)


def pack_by_counts(
    lengths: NDArray[np.int32], capacity: int, planner: RunPlanner
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pack sequences by a plan of the counts of their lengths; see `best_fit_decreasing`."""
    # Step 1: sort by counting. `first_of` is the position of the first sequence with each key.
    key, length_of_key = _sort_keys(lengths)
    count_of = _count_keys(key, int(key.max(initial=0)))
    run_key = np.flatnonzero(count_of[1:])[::-1] + 1
    run_count = count_of[run_key]
    first_of = count_of  # the counts are not needed any more
    first_of[run_key] = np.cumsum(run_count) - run_count
    order = np.empty(int(run_count.sum()), np.int32)
    _sort_by_key(key, first_of.copy(), order)
    # Step 2: plan over runs.
    run_length = run_key if length_of_key is None else length_of_key[run_key]
    moves, num_bins = planner(run_length, run_count, capacity)
    # Step 3: replay the moves. Large arrays are allocated by NumPy, which asks for huge pages: the
    # rest is limited by the memory bandwidth.
    members = np.empty(order.size, np.int64)
    bounds = np.zeros(num_bins + 2, np.int64)
    _write_members(moves, order, bounds, members)
    bin_of = np.empty(lengths.size, np.int64)
    _write_bin_of(key, first_of, order, bin_of)
    return bin_of, members, bounds[:-1]


def _sort_keys(lengths: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int64] | None]:
    """Return sort keys of the sequences, small enough for a table indexed by key.

    The keys are the lengths, unless there are few sequences and very long ones.

    Returns:
        The keys int32 [n], 0 for empty sequences and larger for longer ones; and the length for
        each key int64 [keys], or None if the keys are the lengths.
    """
    if int(lengths.max(initial=0)) <= 4 * lengths.size + 65_536:
        return lengths, None
    distinct, key = np.unique(lengths, return_inverse=True)
    if distinct[0] > 0:  # key 0 is reserved for empty sequences
        distinct, key = np.concatenate(([0], distinct)), key + 1
    return key.astype(np.int32), distinct.astype(np.int64)


# Kernels, each after the functions that it calls, since it is compiled at its definition. They stay
# in this file, because numba's cache only checks the file of the kernel for changes.

_I64 = numba.int64
_I64_ARRAY = numba.int64[::1]
_I32_ARRAY = numba.int32[::1]
_KEYS = numba.types.Array(numba.int32, 1, "C", readonly=True)  # accepts writable arrays as well


@compiled(_KEYS, _I64)
def _count_keys(keys: NDArray[np.int32], largest: int) -> NDArray[np.int64]:
    """Return the number of sequences with each key: int64 [largest + 1]."""
    count_of = np.zeros(largest + 1, np.int64)
    for index in range(keys.size):
        count_of[keys[index]] += 1
    return count_of


@compiled(_KEYS, _I64_ARRAY, _I32_ARRAY)
def _sort_by_key(
    keys: NDArray[np.int32], next_of: NDArray[np.int64], order: NDArray[np.int32]
) -> None:
    """Write the indices of the non-empty sequences to `order`, sorted by key.

    `next_of` has the position in `order` of the next sequence with each key, and is modified.
    """
    for index in range(keys.size):
        key = keys[index]
        if key > 0:
            position = next_of[key]
            order[position] = index
            next_of[key] = position + 1


@compiled(numba.int64[:, ::1], _I32_ARRAY, _I64_ARRAY, _I64_ARRAY)
def _write_members(
    moves: NDArray[np.int64],
    order: NDArray[np.int32],
    bounds: NDArray[np.int64],
    members: NDArray[np.int64],
) -> None:
    """Replay the moves: write the members of each bin.

    Each entry of `order` is replaced by its bin.

    Args:
        bounds: Zeros, int64 [bins + 2]; its first bins + 1 entries become the offsets. While bins
            are filled, bounds[b + 1] is the next free position of bin b; it ends as the first
            position of bin b + 1.
    """
    for move in range(moves.shape[0]):
        first = moves[move, 0]
        for b in range(first, first + moves[move, 1]):
            bounds[b + 2] += moves[move, 2]
    for b in range(2, bounds.size):
        bounds[b] += bounds[b - 1]
    done = 0
    for move in range(moves.shape[0]):
        first = moves[move, 0]
        taken = moves[move, 2]
        for b in range(first, first + moves[move, 1]):
            position = bounds[b + 1]
            for j in range(taken):
                members[position + j] = order[done + j]
                order[done + j] = b
            bounds[b + 1] = position + taken
            done += taken


@compiled(_KEYS, _I64_ARRAY, _I32_ARRAY, _I64_ARRAY)
def _write_bin_of(
    keys: NDArray[np.int32],
    next_of: NDArray[np.int64],
    bin_of_sorted: NDArray[np.int32],
    bin_of: NDArray[np.int64],
) -> None:
    """Reorder the bins from sorted order to input order; modify `next_of`.

    Writing bin_of while the moves are replayed would access it at random: this loop reads a few
    arrays sequentially and writes one.
    """
    for index in range(keys.size):
        key = keys[index]
        if key > 0:
            position = next_of[key]
            bin_of[index] = bin_of_sorted[position]
            next_of[key] = position + 1
        else:
            bin_of[index] = -1

"""Best-fit decreasing for millions of lengths: a compiled planner of runs.

Rule. The longest sequence first, each into the fullest open bin in which it fits, otherwise into a
new bin. Of bins with equal space, the one that has had this space longest is used.

Idea. Sequences arrive longest first, so equal lengths arrive together, in *runs*. Bins that were
opened in a row for one run have the same content for as long as they are treated alike. The unit of
work is therefore a *segment*: the bins first .. first + size - 1, all with the same free space.

Steps.
1. Sort the sequences by counting; a run is a length and the number of sequences that have it.
2. Give a run of length l to the segment with the smallest space >= l. Its first bin takes
   k = space // l sequences in succession, because after each one its space is the smallest that
   still fits; then the second bin does, and so on. The segment moves from `space` to `space - k*l`
   in one step, whatever its size. Only where the run ends within the segment is the segment split:
   into the bins that took k, one that took fewer, and the untouched rest.
3. Record each step as a *move* (first, size, k), and assign sequences by replaying the moves.

Data structure. The segments with one space are a FIFO list, found through a bitmap with one bit per
space, and a summary with one bit per word of it. Above 2**18 spaces, 2**shift neighbouring spaces
share a list, which is searched for the smallest space that fits; with shift 0 the search ends at
the head of the list.

Invariants.
- Bit b is set if and only if list b is not empty.
- Segments of equal space are in the order in which their bins got that space, and so are the bins
  of a segment: the first bin of the first segment is the one that the rule chooses.
- No list has a segment with less space than the shortest sequence, since nothing could use it.
- A run adds at most two segments, since a segment is only split where the run ends.

Cost. A few word operations per move, and there are few moves: 12 thousand for 10 million chats and
a capacity of 4,096, and never more than sequences. The rest is sorting and replaying: one
sequential and one or two scattered memory accesses per sequence.

Reference: tests/packing/textbook.py, one sequence at a time over a list of bins. The packs are
equal, not only as few.

Importing this module compiles the kernels or loads them from numba's cache: import it where needed.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from sftprep.packing.compilation import compiled, inlined


def best_fit_decreasing(
    lengths: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pack sequences into bins by best-fit decreasing.

    Of equal lengths, the first in the input is packed first. The packs are those of TRL 1.16
    `pack_dataset(strategy="bfd")` on one window.

    Memory: the result (16 bytes per sequence, 8 per bin) and, while planning, 4 bytes per sequence,
    16 per token of the longest (or 30 more per sequence, see `_sort_keys`), 100 per distinct
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
    # Step 1: sort by counting. `first_of` is the position of the first sequence with each key.
    key, length_of_key = _sort_keys(lengths)
    count_of = _count_keys(key, int(key.max(initial=0)))
    run_key = np.flatnonzero(count_of[1:])[::-1] + 1
    run_count = count_of[run_key]
    first_of = count_of  # the counts are not needed any more
    first_of[run_key] = np.cumsum(run_count) - run_count
    order = np.empty(int(run_count.sum()), np.int32)
    _sort_by_key(key, first_of.copy(), order)
    # Steps 2 and 3: plan over runs.
    run_length = run_key if length_of_key is None else length_of_key[run_key]
    shift = max(0, int(capacity - 1).bit_length() - _LIST_BITS)
    moves, num_moves, num_bins = _plan_moves(run_length, run_count, capacity, shift)
    # Replay the moves. Large arrays are allocated by NumPy, which asks for huge pages: the rest is
    # limited by the memory bandwidth.
    members = np.empty(order.size, np.int64)
    bounds = np.zeros(num_bins + 2, np.int64)
    _write_members(moves[:num_moves], order, bounds, members)
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


_LIST_BITS = 18  # there are at most 2**18 lists
_WORDS, _SUMMARY = 0, 1  # rows of `bits`: uint64 [2, words]
_HEAD, _TAIL = 0, 1  # columns of `lists`: int32 [lists, 2], segments; -1: empty
_FIRST, _SIZE, _SPACE, _NEXT = 0, 1, 2, 3  # columns of `segments`: int32 [2 x runs, 4]

_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_OF_PRODUCT = np.zeros(64, np.uint8)
for _bit in range(64):
    _BIT_OF_PRODUCT[((int(_DE_BRUIJN) << _bit) & (2**64 - 1)) >> 58] = _bit


@inlined
def _lowest_bit(word: np.uint64) -> int:
    """Return the position of the lowest set bit of a nonzero word."""
    # The top 6 bits of its product with a de Bruijn sequence differ for each position.
    return np.int64(
        _BIT_OF_PRODUCT[((word & (~word + np.uint64(1))) * _DE_BRUIJN) >> np.uint64(58)]
    )  # type: ignore[return-value]


@inlined
def _next_list(start: int, bits: NDArray[np.uint64]) -> int:
    """Return the first nonempty list at or after `start`, or -1."""
    # The rest of the word of `start`.
    at = start >> 6
    if at >= bits.shape[1]:
        return -1
    word = bits[_WORDS, at] >> np.uint64(start & 63)
    if word != 0:
        return start + _lowest_bit(word)
    # The first later word that is not zero, by the summary.
    group = (at + 1) >> 6
    word = bits[_SUMMARY, group] >> np.uint64((at + 1) & 63) << np.uint64((at + 1) & 63)
    while word == 0:
        group += 1
        if group << 6 >= bits.shape[1]:
            return -1
        word = bits[_SUMMARY, group]
    at = (group << 6) + _lowest_bit(word)
    return (at << 6) + _lowest_bit(bits[_WORDS, at])


@inlined
def _best_fit(
    length: int,
    shift: int,
    bits: NDArray[np.uint64],
    lists: NDArray[np.int32],
    segments: NDArray[np.int32],
) -> tuple[int, int, int]:
    """Return the first segment with the smallest space >= length.

    The result also has its predecessor and its list.

    -1: there is none.
    """
    at = _next_list(length >> shift, bits)
    while at >= 0:
        best = before_best = before = -1
        segment = lists[at, _HEAD]
        while segment >= 0:
            space = segments[segment, _SPACE]
            if space >= length and (best < 0 or space < segments[best, _SPACE]):
                best, before_best = segment, before
                if space == max(length, at << shift):  # no smaller space can be in this list
                    break
            before, segment = segment, segments[segment, _NEXT]
        if best >= 0:
            return best, before_best, at
        # Only the list of `length` itself can be without a segment that fits.
        at = _next_list(at + 1, bits)
    return -1, -1, -1


@inlined
def _unlink(
    found: tuple[int, int, int],
    bits: NDArray[np.uint64],
    lists: NDArray[np.int32],
    segments: NDArray[np.int32],
) -> None:
    """Remove a segment found by `_best_fit` from its list."""
    segment, before, at = found
    after = segments[segment, _NEXT]
    if before >= 0:
        segments[before, _NEXT] = after
    else:
        lists[at, _HEAD] = after
    if after < 0:
        lists[at, _TAIL] = before
    if lists[at, _HEAD] < 0:
        word = at >> 6
        bits[_WORDS, word] &= ~(np.uint64(1) << np.uint64(at & 63))
        if bits[_WORDS, word] == 0:
            bits[_SUMMARY, word >> 6] &= ~(np.uint64(1) << np.uint64(word & 63))


@inlined
def _append(
    segment: int,
    values: tuple[int, int, int],
    shift: int,
    bits: NDArray[np.uint64],
    lists: NDArray[np.int32],
    segments: NDArray[np.int32],
) -> None:
    """Append the segment (first, size, space), in row `segment`, to its list."""
    segments[segment, _FIRST], segments[segment, _SIZE] = values[0], values[1]
    segments[segment, _SPACE], segments[segment, _NEXT] = values[2], -1
    at = values[2] >> shift
    if lists[at, _TAIL] >= 0:
        segments[lists[at, _TAIL], _NEXT] = segment
    else:
        word = at >> 6
        lists[at, _HEAD] = segment
        bits[_WORDS, word] |= np.uint64(1) << np.uint64(at & 63)
        bits[_SUMMARY, word >> 6] |= np.uint64(1) << np.uint64(word & 63)
    lists[at, _TAIL] = segment


@inlined
def _double(moves: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the moves in an array of twice the size."""
    grown = np.empty((2 * moves.shape[0], 3), np.int32)
    # Copying a slice instead would double the compile time.
    for row in range(moves.shape[0]):
        for column in range(3):
            grown[row, column] = moves[row, column]
    return grown


@compiled(_I64_ARRAY, _I64_ARRAY, _I64, _I64)
def _plan_moves(  # noqa: PLR0912 - one loop over local state: steps 2 and 3
    run_length: NDArray[np.int64], run_count: NDArray[np.int64], capacity: int, shift: int
) -> tuple[NDArray[np.int32], int, int]:
    """Return the moves, their number, and the number of bins.

    The moves are int32 [>= number of moves, 3]. A move (first, size, k) puts the next size * k
    sequences, in sorted order, into the bins first .. first + size - 1, k into each in turn.
    """
    shortest = run_length[-1] if run_length.size else 1
    num_lists = ((capacity - 1) >> shift) + 1
    lists = np.full((num_lists, 2), -1, np.int32)
    bits = np.zeros((2, (num_lists >> 6) + 2), np.uint64)
    segments = np.empty((2 * run_length.size, 4), np.int32)
    moves = np.empty((4 * run_length.size + 2, 3), np.int32)
    num_segments = num_moves = num_bins = 0
    for run in range(run_length.size):
        length, left = run_length[run], run_count[run]
        while left > 0:
            if num_moves + 2 > moves.shape[0]:
                moves = _double(moves)
            found = _best_fit(length, shift, bits, lists, segments)
            segment = found[0]
            if segment >= 0:
                first, size = segments[segment, _FIRST], segments[segment, _SIZE]
                space = segments[segment, _SPACE]
            else:  # a new segment of empty bins, of exactly the size that the run needs
                first, space = num_bins, capacity
                size = -(-left // (space // length))
                num_bins += size
            k = space // length
            # `full` bins take k each; if the run ends within the segment, one more takes `rest`.
            full = min(size, left // k)
            rest = 0 if full == size else left - full * k
            used = full + (1 if rest > 0 else 0)
            left -= full * k + rest
            free = -1  # a row of `segments` that can be reused
            if segment >= 0 and used == size:
                _unlink(found, bits, lists, segments)
                free = segment
            elif segment >= 0:  # the untouched rest keeps its space, and its position in the list
                segments[segment, _FIRST] = first + used
                segments[segment, _SIZE] = size - used
            # One move for the full bins, and one for the bin that takes the rest.
            for takers in range(2):
                if takers == 0:
                    start, count, taken = first, full, k
                else:
                    start, count, taken = first + full, used - full, rest
                if count == 0:
                    continue
                moves[num_moves, 0], moves[num_moves, 1], moves[num_moves, 2] = start, count, taken
                num_moves += 1
                remaining = space - taken * length
                if remaining < shortest:
                    continue
                if free < 0:
                    free, num_segments = num_segments, num_segments + 1
                _append(free, (start, count, remaining), shift, bits, lists, segments)
                free = -1
    return moves, num_moves, num_bins


@compiled(numba.int32[:, ::1], _I32_ARRAY, _I64_ARRAY, _I64_ARRAY)
def _write_members(
    moves: NDArray[np.int32],
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

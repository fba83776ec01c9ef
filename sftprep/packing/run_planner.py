"""Best-fit decreasing by counts: a compiled planner of runs.

Rule. The longest sequence first, each into the fullest open bin in which it fits, otherwise into a
new bin. Of bins with equal space, the one that has had this space longest is used.

Idea. Sequences arrive longest first, so equal lengths arrive together, in *runs*. Bins that were
opened in a row for one run have the same content for as long as they are treated alike. The unit of
work is therefore a *segment*: the bins first .. first + size - 1, all with the same free space.

Steps.
1. Give a run of length l to the segment with the smallest space >= l. Its first bin takes
   k = space // l sequences in succession, because after each one its space is the smallest that
   still fits; then the second bin does, and so on. The segment moves from `space` to `space - k*l`
   in one step, whatever its size. Only where the run ends within the segment is the segment split:
   into the bins that took k, one that took fewer, and the untouched rest.
2. Record each step as a *move* (first, size, k), from which sequences are assigned by replaying.

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

Cost. A few word operations per move, and there are few moves: 8 thousand for 10**9 chats and a
capacity of 4,096, as many as for 10**6, and never more than sequences.

Reference: tests/packing/textbook.py, one sequence at a time over a list of bins.

Importing this module compiles the kernels or loads them from numba's cache: import it where needed.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from sftprep.packing.compilation import compiled, inlined


def plan_runs(
    run_length: NDArray[np.int64], run_count: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], int]:
    """Plan bins by best-fit decreasing from the number of sequences of each length.

    Memory: 24 bytes per move; 64 per run and 8 per space, at most 2 MB, while planning.

    Args:
        run_length: int64 [runs], C-contiguous; the distinct lengths, descending, 1 .. capacity.
        run_count: int64 [runs], C-contiguous; the number of sequences of each length, at least 1,
            fewer than 2**62 together (not checked).
        capacity: 1 .. 2**31 - 1.

    Returns:
        The moves, int64 [moves, 3], and the number of bins. A move (first, size, k) puts the next
        size * k sequences, in the order of the runs, into the bins first .. first + size - 1, k
        into each in turn.

    Example:
        run_length = [5, 2], run_count = [2, 4], capacity = 8  ->  [[0, 2, 1], [0, 2, 1], [2, 1, 2]]
        and 3 bins: [5, 2], [5, 2] and [2, 2]
    """
    shift = max(0, int(capacity - 1).bit_length() - _LIST_BITS)
    num_lists = ((capacity - 1) >> shift) + 1
    moves, num_moves, num_bins = _plan_moves(
        run_length,
        run_count,
        capacity,
        shift,
        np.zeros((2, (num_lists >> 6) + 2), np.uint64),
        np.full((num_lists, 2), -1, np.int32),
        np.empty((2 * run_length.size, 4), np.int64),
        np.empty((5 * run_length.size + 2, 3), np.int64),
    )
    return moves[:num_moves], num_bins


# Kernels, each after the functions that it calls, since it is compiled at its definition. They stay
# in this file, because numba's cache only checks the file of the kernel for changes.

_I64 = numba.int64
_I64_ARRAY = numba.int64[::1]
_I64_TABLE = numba.int64[:, ::1]

_LIST_BITS = 18  # there are at most 2**18 lists
_WORDS, _SUMMARY = 0, 1  # rows of `bits`: uint64 [2, words]
_HEAD, _TAIL = 0, 1  # columns of `lists`: int32 [lists, 2], segments; -1: empty
_FIRST, _SIZE, _SPACE, _NEXT = 0, 1, 2, 3  # columns of `segments`: int64 [2 x runs, 4]

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
    segments: NDArray[np.int64],
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
    segments: NDArray[np.int64],
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
    segments: NDArray[np.int64],
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
def _double(moves: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the moves in an array of twice the size."""
    grown = np.empty((2 * moves.shape[0], 3), np.int64)
    # Copying a slice instead would double the compile time.
    for row in range(moves.shape[0]):
        for column in range(3):
            grown[row, column] = moves[row, column]
    return grown


@compiled(
    _I64_ARRAY,
    _I64_ARRAY,
    _I64,
    _I64,
    numba.uint64[:, ::1],
    numba.int32[:, ::1],
    _I64_TABLE,
    _I64_TABLE,
)
def _plan_moves(  # noqa: PLR0912 - one loop over local state: both steps
    run_length: NDArray[np.int64],
    run_count: NDArray[np.int64],
    capacity: int,
    shift: int,
    bits: NDArray[np.uint64],
    lists: NDArray[np.int32],
    segments: NDArray[np.int64],
    moves: NDArray[np.int64],
) -> tuple[NDArray[np.int64], int, int]:
    """Return the moves in an array that may be larger than `moves`, their number, and the bins."""
    shortest = run_length[-1] if run_length.size else 1
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

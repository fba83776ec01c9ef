"""Best-fit decreasing over millions of lengths, compiled: the planner works on runs of equal
lengths, not on sequences.

Importing this module imports numba and compiles the kernels, or loads them from numba's cache:
import it where it is used.
"""

from __future__ import annotations

import functools
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

# numba reads `.numba_config.yaml` in the working directory, and two of its settings name code: the
# folder of cached machine code and the classes that find it. Variables win over that file; empty
# ones mean numba's own defaults.
for _name in ("NUMBA_CACHE_DIR", "NUMBA_CACHE_LOCATOR_CLASSES"):
    os.environ.setdefault(_name, "")

import numba  # noqa: E402

_Function = TypeVar("_Function", bound=Callable[..., Any])


def best_fit_decreasing(
    lengths: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pack sequences into bins: the longest first, each into the fullest open bin that can take it,
    else into a new one.

    lengths: int32 [n], C-contiguous, 0 <= length <= capacity (not checked here), n < 2**31;
    capacity: 1 .. 2**31 - 1. Returns `bin_of` int64 [n] (-1 where the length is 0), `members` int64
    [sequences in bins] and `offsets` int64 [bins + 1]: bin b holds members[offsets[b]:offsets[b +
    1]], in the order they went in; bins are in the order they were opened. Of equal lengths the
    first in the input goes first; of bins with equal space the one that has had this space longest.
    Memory: the result (16 bytes a sequence, 8 a bin) and, while planning, 4 bytes a sequence, 16 a
    token of the longest, 100 a distinct length, at most 2 MB for the capacity. Where the longest
    has over four times as many tokens as there are sequences, and 65,536 more, they are sorted by
    comparison instead: about 30 bytes a sequence more, none for the longest. Source: the rule of
    TRL 1.16 `pack_dataset(strategy="bfd")` on one window.
    """
    key, length_of_key = _sort_keys(lengths)
    count_of = _count_keys(key, int(key.max(initial=0)))
    run_key = np.flatnonzero(count_of[1:])[::-1] + 1
    run_count = count_of[run_key]
    place_of = count_of
    place_of[run_key] = np.cumsum(run_count) - run_count
    order = np.empty(int(run_count.sum()), np.int32)
    _place_by_key(key, place_of.copy(), order)
    run_length = run_key if length_of_key is None else length_of_key[run_key]
    moves, num_moves, num_bins = _plan_moves(run_length, run_count, capacity)
    # Large arrays come from NumPy, which asks for huge pages: what follows is bound by memory.
    members = np.empty(order.size, np.int64)
    bounds = np.zeros(num_bins + 2, np.int64)
    _write_members(moves[:num_moves], order, bounds, members)
    bin_of = np.empty(lengths.size, np.int64)
    _write_bin_of(key, place_of, order, bin_of)
    return bin_of, members, bounds[:-1]


def _sort_keys(lengths: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int64] | None]:
    """Keys to sort the sequences by, small enough for a table with an entry a key: 0 for empty
    ones, larger for longer ones.

    Returns the keys int32 [n], and the length that each key stands for, int64 [keys]; None: the
    keys are the lengths.
    """
    if int(lengths.max(initial=0)) <= 4 * lengths.size + 65_536:
        return lengths, None
    distinct, key = np.unique(lengths, return_inverse=True)
    if distinct[0] > 0:
        distinct, key = np.concatenate(([0], distinct)), key + 1
    return key.astype(np.int32), distinct.astype(np.int64)


def _compiled(*arguments: Any) -> Callable[[_Function], _Function]:
    """Compile for exactly these argument types, at import, and keep the machine code in numba's
    cache where that works.

    Numba caches beside this file, or in the user's cache folder where the package is read-only.
    Where neither can be written, the disk is full or a cached file is damaged, it raises; a plan is
    worth two seconds of compiling, so go without.
    """

    def decorate(function: _Function) -> _Function:
        try:
            return cast(_Function, numba.njit(arguments, nogil=True, cache=True)(function))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            _say_uncached(type(error).__name__)
            return cast(_Function, numba.njit(arguments, nogil=True)(function))

    return decorate


@functools.cache  # said once, not once a kernel
def _say_uncached(reason: str) -> None:
    warnings.warn(
        "the packing kernels are compiled anew in each process, since numba's cache cannot be used"
        f" ({reason}); set NUMBA_CACHE_DIR to an empty, writable folder",
        RuntimeWarning,
        stacklevel=3,
    )


def _inlined(function: _Function) -> _Function:
    """Compile as a part of the kernels that call it."""
    return cast(_Function, numba.njit(nogil=True)(function))


# Kernels, with what they call before them: each is compiled where it stands. They stay in this one
# file, because numba's cache looks for changes in the file of the kernel only.

_I64 = numba.int64
_I64_ARRAY = numba.int64[::1]
_I32_ARRAY = numba.int32[::1]
_KEYS = numba.types.Array(numba.int32, 1, "C", readonly=True)  # takes writable arrays as well


@_compiled(_KEYS, _I64)
def _count_keys(keys: NDArray[np.int32], largest: int) -> NDArray[np.int64]:
    """How many sequences have each key: int64 [largest + 1]."""
    count_of = np.zeros(largest + 1, np.int64)
    for index in range(keys.size):
        count_of[keys[index]] += 1
    return count_of


@_compiled(_KEYS, _I64_ARRAY, _I32_ARRAY)
def _place_by_key(
    keys: NDArray[np.int32], place_of: NDArray[np.int64], order: NDArray[np.int32]
) -> None:
    """Second half of a counting sort: write each index to the next place of its key; key 0 has
    none. `place_of` is used up."""
    for index in range(keys.size):
        key = keys[index]
        if key > 0:
            place = place_of[key]
            order[place] = index
            place_of[key] = place + 1


# The planner.  Idea. Sequences arrive longest first, so equal lengths arrive together, in runs; and
# bins that were opened in a row for one run hold the same lengths for as long as they are treated
# alike. So the unit of work is a *segment*: bins first .. first + size - 1, all with the same free
# space. Give a run of length l to the segment with the smallest space >= l: the first bin of the
# segment takes k = space // l sequences in succession, because after each its space is the smallest
# that still fits; then the second bin, and so on. The whole segment has moved from `space` to
# `space - k * l` in one step, whatever its size. Only where the run ends within a segment is it
# cut: the bins that took k, one that took fewer, and the untouched rest. A move (first, size, k) is
# all that is written; sequences are named when the moves are played back.  Structure. Segments with
# one space form a FIFO list, found through a bitmap with one bit a space and a summary with one bit
# a word of it. Above 2**18 spaces, 2**shift neighbouring spaces share a list, which is searched for
# the smallest space that fits; with shift 0 the search ends at the head of the list.  Invariants.
# (1) Bit b is set if and only if list b is not empty. (2) Segments of equal space stand in the
# order in which their bins got that space, and so do the bins of a segment: the first bin of the
# first segment is the one that textbook best-fit with a FIFO tie rule takes. (3) No list holds a
# segment with less space than the shortest sequence: nothing could use it. (4) A run adds at most
# two segments, since it is only cut where it ends.  Cost. A few word operations a move, and moves
# are few: 12 thousand for 10 million chats of capacity 4,096, never more than sequences. What
# remains is sorting and playing back: a sequential and a scattered access or two a sequence.  Plain
# version: tests/packing/textbook.py, one sequence at a time over a list of bins; the packs are
# equal, not only as few.

_MOST_LISTS = 1 << 18
_WORDS, _SUMMARY = 0, 1  # rows of `bits`: uint64 [2, words]
_HEAD, _TAIL = 0, 1  # columns of `lists`: int32 [lists, 2], segments, -1: none
_FIRST, _SIZE, _SPACE, _NEXT = 0, 1, 2, 3  # columns of `segments`: int32 [2 x runs, 4]

_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_OF_PRODUCT = np.zeros(64, np.uint8)
for _bit in range(64):
    _BIT_OF_PRODUCT[((int(_DE_BRUIJN) << _bit) & (2**64 - 1)) >> 58] = _bit


@_inlined
def _lowest_bit(word: np.uint64) -> int:
    """Position of the lowest set bit of a word that has one: its product with a de Bruijn sequence
    tells, in the top 6 bits."""
    return np.int64(
        _BIT_OF_PRODUCT[((word & (~word + np.uint64(1))) * _DE_BRUIJN) >> np.uint64(58)]
    )  # type: ignore[return-value]


@_inlined
def _next_list(start: int, bits: NDArray[np.uint64]) -> int:
    """The first list at or after `start` that is not empty, -1 where there is none."""
    at = start >> 6
    if at >= bits.shape[1]:
        return -1
    word = bits[_WORDS, at] >> np.uint64(start & 63)
    if word != 0:
        return start + _lowest_bit(word)
    group = (at + 1) >> 6
    word = bits[_SUMMARY, group] >> np.uint64((at + 1) & 63) << np.uint64((at + 1) & 63)
    while word == 0:
        group += 1
        if group << 6 >= bits.shape[1]:
            return -1
        word = bits[_SUMMARY, group]
    at = (group << 6) + _lowest_bit(word)
    return (at << 6) + _lowest_bit(bits[_WORDS, at])


@_inlined
def _best_fit(
    length: int,
    shift: int,
    bits: NDArray[np.uint64],
    lists: NDArray[np.int32],
    segments: NDArray[np.int32],
) -> tuple[int, int, int]:
    """The first segment with the smallest space >= length, the one before it in its list, and the
    list; -1: none."""
    at = _next_list(length >> shift, bits)
    while at >= 0:
        best = before_best = before = -1
        segment = lists[at, _HEAD]
        while segment >= 0:
            space = segments[segment, _SPACE]
            if space >= length and (best < 0 or space < segments[best, _SPACE]):
                best, before_best = segment, before
                if space == max(length, at << shift):
                    break
            before, segment = segment, segments[segment, _NEXT]
        if best >= 0:
            return best, before_best, at
        at = _next_list(
            at + 1, bits
        )  # only the list that `length` itself falls into can hold nothing that fits
    return -1, -1, -1


@_inlined
def _unlink(
    found: tuple[int, int, int],
    bits: NDArray[np.uint64],
    lists: NDArray[np.int32],
    segments: NDArray[np.int32],
) -> None:
    """Take a segment that `_best_fit` found out of its list."""
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


@_inlined
def _append(
    segment: int,
    at: int,
    bits: NDArray[np.uint64],
    lists: NDArray[np.int32],
    segments: NDArray[np.int32],
) -> None:
    """Put a segment at the end of list `at`."""
    segments[segment, _NEXT] = -1
    if lists[at, _TAIL] >= 0:
        segments[lists[at, _TAIL], _NEXT] = segment
    else:
        word = at >> 6
        lists[at, _HEAD] = segment
        bits[_WORDS, word] |= np.uint64(1) << np.uint64(at & 63)
        bits[_SUMMARY, word >> 6] |= np.uint64(1) << np.uint64(word & 63)
    lists[at, _TAIL] = segment


@_compiled(_I64_ARRAY, _I64_ARRAY, _I64)
def _plan_moves(  # noqa: PLR0912, PLR0915 - one loop over local state; its steps are the paragraph above
    run_length: NDArray[np.int64], run_count: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int32], int, int]:
    """Best-fit decreasing over runs of equal length, longest first.

    Returns moves int32 [>= number of moves, 3], their number, and the number of bins. A move
    (first, size, k) puts the next size * k sequences, in sorted order, into the bins first .. first
    + size - 1: k into the first, then k into the second ...
    """
    shortest = run_length[-1] if run_length.size else 1
    shift = 0
    while (capacity - 1) >> shift >= _MOST_LISTS:
        shift += 1
    num_lists = ((capacity - 1) >> shift) + 1
    lists = np.full((num_lists, 2), -1, np.int32)
    bits = np.zeros((2, (num_lists >> 6) + 2), np.uint64)
    segments = np.empty((2 * run_length.size, 4), np.int32)
    moves = np.empty((4 * run_length.size + 2, 3), np.int32)
    num_segments = num_moves = num_bins = 0
    for run in range(run_length.size):
        length = run_length[run]
        left = run_count[run]
        while left > 0:
            if num_moves + 2 > moves.shape[0]:
                grown = np.empty((2 * moves.shape[0], 3), np.int32)
                for row in range(
                    num_moves
                ):  # copying a slice instead would double the time that numba compiles
                    grown[row, 0], grown[row, 1], grown[row, 2] = (
                        moves[row, 0],
                        moves[row, 1],
                        moves[row, 2],
                    )
                moves = grown
            found = _best_fit(length, shift, bits, lists, segments)
            segment = found[0]
            if segment >= 0:
                first, size, space = (
                    segments[segment, _FIRST],
                    segments[segment, _SIZE],
                    segments[segment, _SPACE],
                )
                k = space // length
            else:  # as if a segment of empty bins stood ready, of just the size that the run needs
                first, space = num_bins, capacity
                k = space // length
                size = (left + k - 1) // k
                num_bins += size
            # `full` bins take k each; where the run ends within the segment, one more takes the
            # `rest`.
            full = min(size, left // k)
            rest = 0 if full == size else left - full * k
            used = full + (1 if rest > 0 else 0)
            left -= full * k + rest
            free = -1  # a place among `segments` that can be used again
            if segment >= 0 and used == size:
                _unlink(found, bits, lists, segments)
                free = segment
            elif segment >= 0:
                segments[segment, _FIRST] = first + used
                segments[segment, _SIZE] = size - used
            for takers in range(2):
                start, count, each = (
                    (first, full, k) if takers == 0 else (first + full, used - full, rest)
                )
                if count == 0:
                    continue
                moves[num_moves, 0], moves[num_moves, 1], moves[num_moves, 2] = start, count, each
                num_moves += 1
                remaining = space - each * length
                if remaining < shortest:
                    continue
                if free < 0:
                    free = num_segments
                    num_segments += 1
                segments[free, _FIRST], segments[free, _SIZE], segments[free, _SPACE] = (
                    start,
                    count,
                    remaining,
                )
                _append(free, remaining >> shift, bits, lists, segments)
                free = -1
    return moves, num_moves, num_bins


@_compiled(numba.int32[:, ::1], _I32_ARRAY, _I64_ARRAY, _I64_ARRAY)
def _write_members(
    moves: NDArray[np.int32],
    order: NDArray[np.int32],
    bounds: NDArray[np.int64],
    members: NDArray[np.int64],
) -> None:
    """Play the moves back: name the sequences in each bin, and replace each in `order` by its bin.

    bounds: zeros [bins + 2]; its first bins + 1 entries become the offsets. While bins are being
    filled, bounds[b + 1] is the next free place of bin b; it ends as the first place of bin b + 1.
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
        each = moves[move, 2]
        for b in range(first, first + moves[move, 1]):
            place = bounds[b + 1]
            for j in range(each):
                members[place + j] = order[done + j]
                order[done + j] = b
            bounds[b + 1] = place + each
            done += each


@_compiled(_KEYS, _I64_ARRAY, _I32_ARRAY, _I64_ARRAY)
def _write_bin_of(
    keys: NDArray[np.int32],
    place_of: NDArray[np.int64],
    bin_at: NDArray[np.int32],
    bin_of: NDArray[np.int64],
) -> None:
    """Bring the bins from sorted order into the order of the input, by the places of the sort
    again. `place_of` is used up.

    Writing bin_of while the moves are played back would jump through all of it: this reads few
    streams and writes one.
    """
    for index in range(keys.size):
        key = keys[index]
        if key > 0:
            place = place_of[key]
            bin_of[index] = bin_at[place]
            place_of[key] = place + 1
        else:
            bin_of[index] = -1

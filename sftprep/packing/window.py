"""Packing without knowledge of the whole corpus: a carrying window.

A window that is filled, packed and flushed wastes the end of its last packs. This window carries:

1. Fill the window with sequences, in the order of the input.
2. Pack the whole window by best-fit decreasing.
3. Emit the fullest half of the packs, in a seeded random order.
4. Keep the sequences of the other packs, and go to 1.

What is carried longest is what fits in last: the shortest sequences, a few in a pack that would be
emitted half empty in the end. Sequences that were carried `LATE` times are therefore concatenated
to pieces of up to a pack, and a piece is packed like one sequence: it is long, is placed early, and
its pack is filled up. A pack with a sequence that was carried `MOST_WAITS` times is emitted even if
it is nearly empty.

Cost: about 0.1 microseconds per sequence in the window; each sequence is packed about twice.
Reference: `carried_slowly` in tests/packing/test_window.py. Benchmark: benchmarks/window.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftprep.core.hashing import hash64, seeded_permutation
from sftprep.packing.small import best_fit_decreasing_small

MOST_WAITS = 16
"""A pack with a sequence that was carried this often is emitted, however empty it is."""

LATE = 8
"""Sequences that were carried this often are concatenated to pieces."""

_FIRST_SIZE = 256
_SMALL = 512
"""Windows of up to this many sequences are packed in plain Python: they are the first ones, for
which loading the compiled kernels would take longer."""


@dataclass(frozen=True, slots=True, eq=False)
class Emission:
    """Packs emitted from a window, in order.

    Attributes:
        members: int64 [m], the numbers under which the sequences were added, grouped by pack.
        offsets: int64 [packs + 1]; pack k is `members[offsets[k] : offsets[k + 1]]`.
    """

    members: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        return self.members[self.offsets[pack] : self.offsets[pack + 1]]


class CarryingWindow:
    """The sequences of one lane still without a pack.

    The packs depend only on the lengths, their order and the arguments.

    Args:
        capacity: Tokens in a pack.
        size: Sequences in a full window; see `window_size` for the first ones.
        seed, lane: Determine the order in which the packs of a window are emitted.

    Example:
        window = CarryingWindow(1024, 4096)
        window.add(np.arange(window.room), lengths[: window.room])
        packs = window.pack()  # half of the packs; the rest stays in the window
    """

    def __init__(self, capacity: int, size: int, *, seed: int = 0, lane: int = 0) -> None:
        self.capacity, self.size, self.seed, self.lane = capacity, size, seed, lane
        self.number = 0
        """Number of windows that were packed."""
        self.members: NDArray[np.int64] = np.empty(0, np.int64)
        """int64 [n], the numbers of the sequences in the window, in the order of their addition."""
        self.lengths: NDArray[np.int32] = np.empty(0, np.int32)
        """int32 [n], the number of tokens of each."""
        self.waits: NDArray[np.int32] = np.empty(0, np.int32)
        """int32 [n], how often each was carried."""

    @property
    def room(self) -> int:
        """Return the number of sequences to add until the window is full."""
        return window_size(self.number, self.size) - self.members.size

    def add(
        self,
        members: NDArray[np.int64],
        lengths: NDArray[np.int32],
        waits: NDArray[np.int32] | None = None,
    ) -> None:
        """Add sequences.

        Args:
            members: int64 [n], the numbers of the sequences.
            lengths: int [n], 1 .. capacity.
            waits: int32 [n], how often each was carried, if they come from a saved state.
        """
        self.members = np.concatenate((self.members, members))
        self.lengths = np.concatenate((self.lengths, lengths.astype(np.int32, copy=False)))
        self.waits = np.concatenate(
            (self.waits, np.zeros(members.size, np.int32) if waits is None else waits)
        )

    def pack(self, *, flush: bool = False) -> Emission:
        """Pack the window, and emit the fullest half of the packs.

        Of packs that are equally full, the one that was opened first counts as fuller.

        Args:
            flush: Emit all packs, which is done at the end of the input.
        """
        bin_of, members, offsets = self._plan()
        num_packs = offsets.size - 1
        # Choose the packs to emit.
        if flush:
            is_emitted = np.ones(num_packs, np.bool_)
        else:
            fill = np.zeros(num_packs, np.int64)
            np.add.at(fill, bin_of, self.lengths)
            is_emitted = np.zeros(num_packs, np.bool_)
            is_emitted[np.argsort(-fill, kind="stable")[: (num_packs + 1) // 2]] = True
            is_emitted[bin_of[self.waits >= MOST_WAITS]] = True
        # Shuffle them: the plan has the packs of the longest sequences first.
        emitted = np.flatnonzero(is_emitted)
        order = seeded_permutation(emitted.size, hash64(self.seed, self.lane, self.number))
        emitted = emitted[order]
        # Gather their members.
        sizes = np.diff(offsets)[emitted]
        ends = np.cumsum(sizes)
        chosen = members[
            np.arange(int(sizes.sum())) + np.repeat(offsets[:-1][emitted] - (ends - sizes), sizes)
        ]
        emission = Emission(self.members[chosen], np.concatenate(([0], ends)).astype(np.int64))
        # Carry the rest.
        is_carried = ~is_emitted[bin_of]
        self.members, self.lengths = self.members[is_carried], self.lengths[is_carried]
        self.waits = self.waits[is_carried] + 1
        self.number += 1
        return emission

    def _plan(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return bins like `best_fit_decreasing`, with late sequences as pieces."""
        is_late = self.waits >= LATE
        if np.count_nonzero(is_late) < 2:
            return _best_fit(self.lengths, self.capacity)
        # Pack units: the other sequences, then the pieces.
        piece_counts, piece_tokens = _concatenate_late(self.lengths[is_late], self.capacity)
        single = np.flatnonzero(~is_late)
        bin_of_unit, units, offsets = _best_fit(
            np.concatenate((self.lengths[single], piece_tokens)), self.capacity
        )
        # From units back to sequences.
        bin_of = np.empty(self.members.size, np.int64)
        bin_of[single] = bin_of_unit[: single.size]
        bin_of[is_late] = np.repeat(bin_of_unit[single.size :], piece_counts)
        # The sequences in the order of the units, and then in the order of the units in the packs.
        counts = np.concatenate((np.ones(single.size, np.int64), piece_counts))
        sequences = np.concatenate((single, np.flatnonzero(is_late)))
        begins = np.cumsum(counts) - counts
        packed_counts = counts[units]
        ends = np.cumsum(packed_counts)
        members = sequences[
            np.arange(sequences.size)
            + np.repeat(begins[units] - (ends - packed_counts), packed_counts)
        ]
        return bin_of, members, np.concatenate(([0], ends))[offsets]


def window_size(number: int, size: int) -> int:
    """Return the number of sequences in a window: 256, doubling up to `size`.

    Windows are numbered from 0. The first windows are small so that the first packs are available
    soon.
    """
    return min(size, _FIRST_SIZE << min(number, 40))


def plan_lane(
    lengths: NDArray[np.int32], capacity: int, size: int, *, seed: int, lane: int
) -> Emission:
    """Return all packs of a lane with known lengths, in the order of a stream.

    Args:
        lengths: int32 [n], 1 .. capacity.
        capacity: Tokens in a pack.
        size: Sequences in a window.
        seed, lane: See `CarryingWindow`.

    Returns:
        The packs; their members are indices into `lengths`.
    """
    window = CarryingWindow(capacity, size, seed=seed, lane=lane)
    emissions: list[Emission] = []
    at = 0
    while at < lengths.size:
        until = min(at + window.room, lengths.size)
        window.add(np.arange(at, until), lengths[at:until])
        at = until
        if window.room == 0:
            emissions.append(window.pack())
    if window.members.size:
        emissions.append(window.pack(flush=True))
    # The empty arrays give the results their type without packs.
    sizes = np.concatenate([np.empty(0, np.int64), *(np.diff(e.offsets) for e in emissions)])
    members = np.concatenate([np.empty(0, np.int64), *(e.members for e in emissions)])
    return Emission(members, np.concatenate(([0], np.cumsum(sizes))).astype(np.int64))


def in_global_order(lanes: list[Emission]) -> Emission:
    """Return the packs of all lanes, one pack of each lane in turn.

    The members are the numbers that they have in their lanes.

    Example:
        lanes with the packs [A0, A1, A2] and [B0]  ->  [A0, B0, A1, A2]
    """
    counts = np.array([len(lane) for lane in lanes], np.int64)
    # Sort by the number of the pack in its lane, then by lane.
    number = np.concatenate([np.empty(0, np.int64), *(np.arange(n) for n in counts.tolist())])
    order = np.argsort(number, kind="stable")
    sizes = np.concatenate([np.empty(0, np.int64), *(np.diff(lane.offsets) for lane in lanes)])
    members = np.concatenate([np.empty(0, np.int64), *(lane.members for lane in lanes)])
    # Gather the members of each pack.
    begins, ordered_sizes = np.cumsum(sizes) - sizes, sizes[order]
    ends = np.cumsum(ordered_sizes)
    positions = np.arange(members.size) + np.repeat(
        begins[order] - (ends - ordered_sizes), ordered_sizes
    )
    return Emission(members[positions], np.concatenate(([0], ends)).astype(np.int64))


def _concatenate_late(
    lengths: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Concatenate consecutive sequences up to the capacity.

    Returns:
        The number of sequences in each piece, int64 [pieces], and its tokens, int32 [pieces].
    """
    counts, tokens = [0], [0]
    for length in lengths.tolist():
        if tokens[-1] + length > capacity:
            counts.append(0)
            tokens.append(0)
        counts[-1] += 1
        tokens[-1] += length
    return np.array(counts, np.int64), np.array(tokens, np.int32)


def _best_fit(
    lengths: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    if lengths.size <= _SMALL:
        return best_fit_decreasing_small(lengths, capacity)
    from sftprep.packing.bestfit import best_fit_decreasing  # loads numba

    return best_fit_decreasing(lengths, capacity)

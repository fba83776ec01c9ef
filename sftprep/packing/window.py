"""Packing without knowing the whole corpus: a window of sequences that is packed, half emptied and
filled again.

A window that is cut off and flushed wastes the end of its last packs. This one carries: it packs
what it holds best-fit decreasing, lets the fullest half of the packs go, and puts the sequences of
the others back. Measured by benchmarks/window.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftprep.core.hashing import hash64, seeded_permutation
from sftprep.packing.small import best_fit_decreasing_small

MOST_WAITS = 16
"""A pack that holds a sequence which was carried so often goes, however empty it is."""

LATE = 8
"""Sequences that were carried so often are packed together, as one piece."""

_FIRST_SIZE = 256
_PLAIN = 512
"""Windows of up to so many sequences are packed in plain Python: they come first, when the kernels
are not loaded yet."""


@dataclass(frozen=True, slots=True, eq=False)
class Emission:
    """Packs that leave a window, in order: pack k holds the sequences members[offsets[k]:offsets[k
    + 1]].

    members: int64, the numbers under which sequences were added; offsets: int64 [packs + 1].
    """

    members: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        return self.members[self.offsets[pack] : self.offsets[pack + 1]]


class CarryingWindow:
    """The sequences of one lane that wait for a pack. What it emits depends on the lengths, their
    order and the arguments only.

    capacity: tokens in a pack; size: sequences that are held when it is packed (the first windows
    are smaller, so that the first packs come soon); seed, lane: choose the order in which the packs
    of a window leave.
    """

    def __init__(self, capacity: int, size: int, *, seed: int = 0, lane: int = 0) -> None:
        self.capacity, self.size, self.seed, self.lane = capacity, size, seed, lane
        self.number = 0
        """Windows packed so far."""
        self.members: NDArray[np.int64] = np.empty(0, np.int64)
        """Held sequences in the order they came: int64 [held], ascending where they were added
        so."""
        self.lengths: NDArray[np.int32] = np.empty(0, np.int32)
        self.waits: NDArray[np.int32] = np.empty(0, np.int32)
        """How often each was carried: int32 [held]."""

    @property
    def room(self) -> int:
        """Sequences that are missing until the window can be packed."""
        return window_size(self.number, self.size) - self.members.size

    def add(
        self,
        members: NDArray[np.int64],
        lengths: NDArray[np.int32],
        waits: NDArray[np.int32] | None = None,
    ) -> None:
        """Hold more sequences, by number. lengths: 1 .. capacity. waits: of sequences that a state
        brings back."""
        self.members = np.concatenate((self.members, members))
        self.lengths = np.concatenate((self.lengths, lengths.astype(np.int32, copy=False)))
        self.waits = np.concatenate(
            (self.waits, np.zeros(members.size, np.int32) if waits is None else waits)
        )

    def pack(self, *, flush: bool = False) -> Emission:
        """Pack what is held and let go of the fullest half of the packs, and of those that hold a
        sequence carried 16 times.

        Those carried 8 times are put together, in the order they came, in pieces of up to a pack; a
        piece is packed like one sequence.

        flush: let go of all. Of packs equally full, the one opened first is the fuller. Cost: some
        0.1 microseconds a held sequence; each is packed about twice before it goes.
        """
        bin_of, members, offsets = self._planned()
        packs = offsets.size - 1
        if flush:
            goes = np.ones(packs, np.bool_)
        else:
            fill = np.zeros(packs, np.int64)
            np.add.at(fill, bin_of, self.lengths)
            goes = np.zeros(packs, np.bool_)
            goes[np.argsort(-fill, kind="stable")[: (packs + 1) // 2]] = True
            goes[bin_of[self.waits >= MOST_WAITS]] = True
        leaving = np.flatnonzero(goes)
        leaving = leaving[
            seeded_permutation(leaving.size, hash64(self.seed, self.lane, self.number))
        ]
        sizes = np.diff(offsets)[leaving]
        ends = np.cumsum(sizes)
        chosen = members[
            np.arange(int(sizes.sum())) + np.repeat(offsets[:-1][leaving] - (ends - sizes), sizes)
        ]
        emission = Emission(self.members[chosen], np.concatenate(([0], ends)).astype(np.int64))
        stays = ~goes[bin_of]
        self.members, self.lengths, self.waits = (
            self.members[stays],
            self.lengths[stays],
            self.waits[stays] + 1,
        )
        self.number += 1
        return emission

    def _planned(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Bins as `best_fit_decreasing` gives them, over sequences, with those that are late in
        pieces.

        What is carried longest is what fits in last: the shortest sequences, a few in a pack of
        their own, which would have to go half empty in the end. In a piece they are longer, are
        placed early, and their pack is filled up.
        """
        late = self.waits >= LATE
        if np.count_nonzero(late) < 2:
            return _best_fit(self.lengths, self.capacity)
        pieces, sums = _pieces(self.lengths[late], self.capacity)
        alone = np.flatnonzero(~late)
        bin_of_unit, units, offsets = _best_fit(
            np.concatenate((self.lengths[alone], sums)), self.capacity
        )
        bin_of = np.empty(self.members.size, np.int64)
        bin_of[alone] = bin_of_unit[: alone.size]
        bin_of[late] = np.repeat(bin_of_unit[alone.size :], pieces)
        # Units one after the other: sequences by themselves, then the pieces; each stands where its
        # unit does.
        sizes = np.concatenate((np.ones(alone.size, np.int64), pieces))
        flat, begins = np.concatenate((alone, np.flatnonzero(late))), np.cumsum(sizes) - sizes
        taken = sizes[units]
        ends = np.cumsum(taken)
        members = flat[np.arange(flat.size) + np.repeat(begins[units] - (ends - taken), taken)]
        return bin_of, members, np.concatenate(([0], ends))[offsets]


def window_size(number: int, size: int) -> int:
    """Sequences in window `number` (from 0): 256 in the first, doubling up to `size`."""
    return min(size, _FIRST_SIZE << min(number, 40))


def plan_lane(
    lengths: NDArray[np.int32], capacity: int, size: int, *, seed: int, lane: int
) -> Emission:
    """All packs of a lane whose lengths are known, as a stream of the same window emits them.

    lengths: int32 [n], 1 .. capacity; members are places in it.
    """
    window = CarryingWindow(capacity, size, seed=seed, lane=lane)
    emitted: list[Emission] = []
    at = 0
    while at < lengths.size:
        until = min(at + window.room, lengths.size)
        window.add(np.arange(at, until), lengths[at:until])
        at = until
        if window.room == 0:
            emitted.append(window.pack())
    if window.members.size:
        emitted.append(window.pack(flush=True))
    sizes = [np.diff(e.offsets) for e in emitted]
    members = np.concatenate([np.empty(0, np.int64), *(e.members for e in emitted)])
    return Emission(
        members,
        np.concatenate(([0], np.cumsum(np.concatenate([np.empty(0, np.int64), *sizes])))).astype(
            np.int64
        ),
    )


def in_global_order(lanes: list[Emission]) -> Emission:
    """The packs of all lanes, one of each in turn: sorted by number, then lane; members are as they
    were in the lanes."""
    counts = np.array([len(lane) for lane in lanes], np.int64)
    number = np.concatenate([np.empty(0, np.int64), *(np.arange(n) for n in counts.tolist())])
    order = np.argsort(number, kind="stable")
    sizes = np.concatenate([np.empty(0, np.int64), *(np.diff(lane.offsets) for lane in lanes)])
    members = np.concatenate([np.empty(0, np.int64), *(lane.members for lane in lanes)])
    begins, taken = np.cumsum(sizes) - sizes, sizes[order]
    ends = np.cumsum(taken)
    places = np.arange(members.size) + np.repeat(begins[order] - (ends - taken), taken)
    return Emission(members[places], np.concatenate(([0], ends)).astype(np.int64))


def _pieces(
    lengths: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Sequences in a row put together up to the capacity: how many are in each piece, and its
    tokens."""
    pieces, sums = [0], [0]
    for length in lengths.tolist():
        if sums[-1] + length > capacity:
            pieces.append(0)
            sums.append(0)
        pieces[-1] += 1
        sums[-1] += length
    return np.array(pieces, np.int64), np.array(sums, np.int32)


def _best_fit(
    lengths: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    if lengths.size <= _PLAIN:
        return best_fit_decreasing_small(lengths, capacity)
    from sftprep.packing.bestfit import (
        best_fit_decreasing,
    )  # numba and its kernels, where they are first needed

    return best_fit_decreasing(lengths, capacity)

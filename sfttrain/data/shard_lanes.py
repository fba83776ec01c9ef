"""The order of the packs of a build in an epoch, without an array over packs.

A permutation of all packs takes 800 MB and half a minute for 10^8 packs, and makes every machine
read every shard. Instead:

1. The shards are permuted by a hash of the seed and the epoch. Their packs, one shard after the
   other, are the packs in *shard order*.
2. The packs in shard order are cut into C equal ranges, the *shard lanes*. C is a power of two.
3. Each lane is cut into windows of 4 shards, and the packs of a window are shuffled. (In a build of
   layout `sequences`, a group counts as one shard, and a window is one of them.)
4. The order takes one pack from each lane in turn: position p is pack p // C of lane p % C.

Lane n is the range whose number has the bits of n in reverse. So any M successive positions, for a
power of two M <= C, have one pack from each M-th of the shard order, and M machines that divide a
step by ranges read an M-th of the shards each (`StepPlan`).

A position gives its pack by arithmetic and two binary searches among the shards. The shuffle of a
window is a Feistel network and not a table: it computes the pack at one position of the window
without computing the others. The tests compare with the slow reference, which follows the steps
above with lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOST_LANES = 1024
WINDOW_SHARDS = 4
"""Shards of a window: at a time, the packs of a lane come from this number of shards."""
MOST_PLANNED_LANES = 16
"""The same as `MOST_LANES` for packs that are planned while reading: each lane needs the plan of a
group in memory."""
_ROUNDS = 8
"""Rounds of the Feistel network, each of which changes both coordinates of an index. With fewer,
the permutations of 4 or 5 packs are not equally frequent."""
_WORD = (1 << 64) - 1


def default_lanes(shards: int) -> int:
    """Return the number of shard lanes for a number of shards.

    It depends on nothing else, so the order is the same for any number of ranks and machines.
    """
    return 1 << (min(MOST_LANES, max(1, shards)).bit_length() - 1)


@dataclass(frozen=True, eq=False)
class ShardLanes:
    """The shards of a build, divided into shard lanes in each epoch."""

    packs_per_shard: NDArray[np.int64]
    """Packs in each shard: int64 [shards]; a shard may be empty."""
    lanes: int
    """Number of shard lanes, a power of two."""
    window: int = WINDOW_SHARDS
    """Shards of a window."""

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.lanes & (self.lanes - 1):
            raise ValueError(f"{self.lanes} shard lanes: not a power of two")

    @cached_property
    def pack_ends(self) -> NDArray[np.int64]:
        """Index of the first pack after each shard: int64 [shards]."""
        return np.cumsum(self.packs_per_shard, dtype=np.int64)

    @cached_property
    def ranges(self) -> NDArray[np.int64]:
        """The number of the range of each lane: int64 [lanes], a permutation."""
        found = np.zeros(1, np.int64)
        while len(found) < self.lanes:
            found = np.concatenate([2 * found, 2 * found + 1])
        return found

    def order(self, seed: int, epoch: int) -> LaneOrder:
        """Return the order of an epoch.

        Args:
            seed: Any integer.
            epoch: The 0-based number of the epoch.
        """
        return LaneOrder(self, seed, epoch)


class LaneOrder:
    """The packs of a build in the order of one epoch, like an array that is not stored.

    Args:
        lanes: The shard lanes.
        seed: The seed of the run.
        epoch: The epoch.

    Example:
        order = ShardLanes(packs_per_shard, 8).order(seed=0, epoch=1)
        order[[5, 6]]  ->  the indices of the packs at the positions 5 and 6
    """

    def __init__(self, lanes: ShardLanes, seed: int, epoch: int) -> None:
        self._lanes = lanes
        self._key = _mix(_mix(_to_word(seed)) ^ _to_word(epoch))
        shards = np.arange(len(lanes.packs_per_shard), dtype=np.uint64)
        # The shards in shard order, and the start and end of each there.
        self._shards = np.argsort(_mix(self._key ^ _mix(shards)), kind="stable")
        sizes = lanes.packs_per_shard[self._shards]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._starts = self._ends - sizes
        # The start of each range in shard order. Lanes have N // C packs or one more, and the
        # first lanes, which the last round of the order reaches, are those with one more.
        packs, count = len(self), lanes.lanes
        lane_sizes = np.empty(count, np.int64)
        lane_sizes[lanes.ranges] = packs // count + (np.arange(count) < packs % count)
        self._range_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lane_sizes)])

    def __len__(self) -> int:
        ends = self._lanes.pack_ends
        return int(ends[-1]) if len(ends) else 0

    def __getitem__(self, positions: slice | ArrayLike) -> NDArray[np.int64]:
        """Return the packs at positions.

        Args:
            positions: A slice, or integers [n] from 0 to the number of packs - 1.

        Returns:
            int64 [n]; the indices of the packs.

        Raises:
            IndexError: A position is outside the epoch.
        """
        wanted = (
            np.arange(*positions.indices(len(self)), dtype=np.int64)
            if isinstance(positions, slice)
            else np.asarray(positions, np.int64)
        )
        flat = np.atleast_1d(wanted)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"positions {flat.min()} to {flat.max()} of {len(self)}")
        return self._find(flat).reshape(wanted.shape)

    def ranges(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the range of each position's pack in shard order: int64 [n]."""
        return self._lanes.ranges[positions % self._lanes.lanes]

    def _find(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        starts, ends = self._starts, self._ends
        # 1. The range of each position, and its index in shard order before the shuffle.
        number = self.ranges(positions)
        lane_start, lane_end = self._range_starts[number], self._range_starts[number + 1]
        index = lane_start + positions // self._lanes.lanes
        # 2. Its window: some of the shards of the lane, counted from the first one.
        first = np.searchsorted(ends, lane_start, side="right")
        shard = np.searchsorted(ends, index, side="right")
        window = self._lanes.window
        begin = first + (shard - first) // window * window
        window_start = np.maximum(lane_start, starts[begin])
        window_end = np.minimum(lane_end, ends[np.minimum(begin + window, len(ends)) - 1])
        # 3. Shuffle in the window, and find the pack at that index in shard order.
        keys = self._window_keys(window_start.astype(np.uint64))
        index = window_start + permute(index - window_start, window_end - window_start, keys)
        shard = np.searchsorted(ends, index, side="right")
        original = self._shards[shard]
        row = index - starts[shard]
        found: NDArray[np.int64] = (
            self._lanes.pack_ends[original] - self._lanes.packs_per_shard[original] + row
        )
        return found

    def _window_keys(self, starts: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return _mix(self._key + starts)


def permute(
    indices: NDArray[np.int64], sizes: NDArray[np.int64], keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Return the images of indices under pseudo-random permutations.

    Args:
        indices: int64 [n]; each is at least 0 and less than its size.
        sizes: int64 [n]; a permutation of `range(size)` is applied.
        keys: uint64 [n]; they select the permutation.

    Returns:
        int64 [n].
    """
    # An index is a cell of a table with at least `size` cells, which is as square as possible. Each
    # half-round moves a row or a column by a hash of the other coordinate, which can be undone, so
    # the rounds are a permutation of the cells.
    columns = np.ceil(np.sqrt(sizes)).astype(np.int64)
    rows = -(-sizes // columns)
    found = indices.copy()
    outside = np.arange(len(indices))
    # An index beyond the size is permuted again. There are fewer such cells than columns, and a
    # cycle of the permutation that starts within the size comes back to it after all of them.
    while len(outside):
        key, height, width = keys[outside], rows[outside], columns[outside]
        row, column = np.divmod(found[outside], width)
        for number in range(_ROUNDS):
            key = key + _to_word(number + 1)
            row = (row + _below(height, _mix(key ^ column.astype(np.uint64)))) % height
            key = ~key
            column = (column + _below(width, _mix(key ^ row.astype(np.uint64)))) % width
        found[outside] = row * width + column
        outside = outside[found[outside] >= sizes[outside]]
    return found


def _below(limits: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return a number from 0 to the limit - 1 for each hash."""
    return (hashes % limits.astype(np.uint64)).astype(np.int64)


def _to_word(number: int) -> NDArray[np.uint64]:
    # An array of one element: arithmetic of NumPy's scalars warns of an overflow.
    return np.array([number & _WORD], np.uint64)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of each word: the output function of the generator SplitMix64."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[Any] = words ^ (words >> np.uint64(31))
    return mixed

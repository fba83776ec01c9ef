"""The order of the packs of a build: each pack once, from few shards at a time."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfttrain.data.shard_lanes import (
    WINDOW_SHARDS,
    LaneOrder,
    ShardLanes,
    default_lanes,
    permute,
)

shard_sizes = st.lists(st.integers(0, 40) | st.just(300), min_size=1, max_size=30)
lane_counts = st.integers(0, 6).map(lambda bits: 1 << bits)


def lane_order(sizes: list[int], lanes: int, *, seed: int = 0, epoch: int = 0) -> LaneOrder:
    return ShardLanes(np.array(sizes, np.int64), lanes).order(seed, epoch)


def reference(sizes: list[int], lanes: int, order: LaneOrder) -> list[int]:
    """Return the packs in order, by lists; the permutations themselves are those of the module."""
    firsts = np.cumsum([0, *sizes]).tolist()
    # 1. The packs in shard order, each with the number of its shard in that order.
    permuted = [
        (number, firsts[shard] + row)
        for number, shard in enumerate(order._shards.tolist())
        for row in range(sizes[shard])
    ]
    # 2. The lanes, as ranges of about equal size; the bits of n in reverse are that of lane n.
    bits = lanes.bit_length() - 1
    reverse = [int(f"{n:0{bits}b}"[::-1], 2) if bits else 0 for n in range(lanes)]
    counts = [len(range(n, len(permuted), lanes)) for n in range(lanes)]
    by_lane: dict[int, list[int]] = {}
    begin = 0
    for lane in sorted(range(lanes), key=lambda n: reverse[n]):
        range_ = permuted[begin : begin + counts[lane]]
        # 3. Its windows: 4 shards each, counted with empty ones, from the first one on.
        packs: list[int] = []
        position = 0
        while position < len(range_):
            end = position
            limit = range_[0][0] + WINDOW_SHARDS * (
                1 + (range_[position][0] - range_[0][0]) // WINDOW_SHARDS
            )
            while end < len(range_) and range_[end][0] < limit:
                end += 1
            window = [pack for _, pack in range_[position:end]]
            size = len(window)
            keys = order._window_keys(np.full(size, begin + position, np.uint64))
            images = permute(np.arange(size), np.full(size, size), keys)
            packs += [window[image] for image in images.tolist()]
            position = end
        by_lane[lane], begin = packs, begin + counts[lane]
    # 4. One pack from each lane in turn.
    longest = max(map(len, by_lane.values()))
    return [
        by_lane[lane][k] for k in range(longest) for lane in range(lanes) if k < len(by_lane[lane])
    ]


@settings(max_examples=60, deadline=None)
@given(sizes=shard_sizes, lanes=lane_counts, seed=st.integers(), epoch=st.integers(0, 3))
def test_the_order_is_that_of_the_reference_with_each_pack_once(
    sizes: list[int], lanes: int, seed: int, epoch: int
) -> None:
    order = lane_order(sizes, lanes, seed=seed, epoch=epoch)
    found = order[:].tolist()
    assert sorted(found) == list(range(sum(sizes)))
    assert found == (reference(sizes, lanes, order) if found else [])


@settings(max_examples=60, deadline=None)
@given(sizes=shard_sizes, lanes=lane_counts, data=st.data())
def test_a_position_gives_its_pack_without_the_others(
    sizes: list[int], lanes: int, data: st.DataObject
) -> None:
    order = lane_order(sizes, lanes)
    packs = order[:]
    if not len(order):
        with pytest.raises(IndexError):
            order[[0]]
        return
    positions = data.draw(st.lists(st.integers(0, len(order) - 1), max_size=9))
    assert order[positions].tolist() == packs[positions].tolist()
    assert order[positions[0] if positions else 0].shape == ()
    for outside in (-1, len(order)):
        with pytest.raises(IndexError, match=f"of {len(order)}"):
            order[[outside]]


@settings(max_examples=60, deadline=None)
@given(sizes=shard_sizes, lanes=lane_counts)
def test_a_lane_takes_packs_from_at_most_four_shards_at_a_time(
    sizes: list[int], lanes: int
) -> None:
    shards = np.repeat(np.arange(len(sizes)), sizes)[lane_order(sizes, lanes)[:]]
    for lane in range(lanes):
        taken = shards[lane::lanes].tolist()
        first = {shard: taken.index(shard) for shard in taken}
        last = {shard: number for number, shard in enumerate(taken)}
        for number in range(len(taken)):
            assert sum(first[s] <= number <= last[s] for s in first) <= WINDOW_SHARDS


@settings(max_examples=60, deadline=None)
@given(sizes=shard_sizes, bits=st.integers(0, 5), more=st.integers(0, 3), begin=st.integers(0, 99))
def test_successive_positions_are_spread_evenly_over_the_ranges(
    sizes: list[int], bits: int, more: int, begin: int
) -> None:
    order = lane_order(sizes, 1 << (bits + more))
    ranges = order.ranges(np.arange(begin, begin + (1 << bits))) >> more
    assert sorted(ranges.tolist()) == list(range(1 << bits))


def test_seeds_and_epochs_have_different_orders() -> None:
    orders = {
        tuple(lane_order([9, 9, 9], 2, seed=seed, epoch=epoch)[:].tolist())
        for seed in (-1, 0, 1, 2**64)
        for epoch in range(3)
    }
    assert len(orders) == 9  # 2**64 is 0, modulo 2**64


def test_the_order_is_that_of_older_checkpoints() -> None:
    """If this fails, a resume must refuse checkpoints of the earlier order, see `RunState`."""
    assert lane_order([9, 9, 9], 2)[:5].tolist() == [25, 7, 1, 16, 26]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_window_is_permuted(size: int, key: int) -> None:
    images = permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))
    assert sorted(images.tolist()) == list(range(size))


@pytest.mark.parametrize(("size", "permutations"), [(2, 2), (3, 6), (4, 24), (5, 120)])
def test_all_permutations_of_a_window_are_about_equally_frequent(
    size: int, permutations: int
) -> None:
    keys = 240 * permutations
    images = permute(
        np.tile(np.arange(size), keys),
        np.full(size * keys, size),
        np.repeat(np.arange(keys, dtype=np.uint64), size) << np.uint64(20),
    ).reshape(keys, size)
    counts = Counter(map(tuple, images.tolist()))
    assert len(counts) == permutations
    # The standard deviation of a count is sqrt(240), or 6.5 %.
    assert all(0.7 < count / 240 < 1.3 for count in counts.values())


def test_neighbours_of_a_large_window_are_not_neighbours_any_more() -> None:
    size = 4000
    images = permute(np.arange(size), np.full(size, size), np.full(size, 7, np.uint64))
    steps = Counter(b - a for a, b in pairwise(images.tolist()))
    assert max(steps.values()) < 10


def test_the_number_of_lanes_depends_on_the_shards_only() -> None:
    assert [default_lanes(n) for n in (0, 1, 2, 3, 5, 1023, 1024, 10**6)] == [
        *(1, 1, 2, 2, 4, 512, 1024, 1024)
    ]
    with pytest.raises(ValueError, match="power of two"):
        ShardLanes(np.array([1]), 3)

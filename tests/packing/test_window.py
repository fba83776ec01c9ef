"""Carrying windows: no sequence is lost or late, and there are nearly as few packs as possible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sftprep.packing import pack_lengths
from sftprep.packing.window import (
    LATE,
    MOST_WAITS,
    CarryingWindow,
    Emission,
    in_global_order,
    plan_lane,
    window_size,
)
from tests.packing.textbook import best_fit_decreasing_slow
from tests.support import SHARED, needs_shared


def packs_of(emission: Emission) -> list[list[int]]:
    return [emission[k].tolist() for k in range(len(emission))]


def carried_slowly(lengths: list[int], capacity: int, size: int) -> list[set[frozenset[int]]]:
    """Return the packs of each window by a slow implementation, one sequence at a time."""
    windows, held, waits, rest = [], [], {}, list(range(len(lengths)))
    while rest or held:
        wanted = window_size(len(windows), size) - len(held)
        held, rest = held + rest[:wanted], rest[wanted:]
        last = len(held) < window_size(len(windows), size)
        late = [k for k in held if waits.get(k, 0) >= LATE]
        late = late if len(late) > 1 else []  # one alone is a sequence like any other, in its place
        pieces = [[k] for k in held if k not in late]
        for k in late:
            if k != late[0] and sum(lengths[j] for j in pieces[-1]) + lengths[k] <= capacity:
                pieces[-1].append(k)
            else:
                pieces.append([k])
        bins = best_fit_decreasing_slow(
            [sum(lengths[k] for k in piece) for piece in pieces], capacity
        )
        packs = [[k for number in chosen for k in pieces[number]] for chosen in bins]
        fullest = sorted(packs, key=lambda pack: -sum(lengths[k] for k in pack))[
            : (len(packs) + 1) // 2
        ]
        gone = [
            p
            for p in packs
            if last or p in fullest or any(waits.get(k, 0) >= MOST_WAITS for k in p)
        ]
        windows.append({frozenset(pack) for pack in gone})
        held = [k for k in held if not any(k in pack for pack in gone)]
        waits.update({k: waits.get(k, 0) + 1 for k in held})
    return windows


@settings(deadline=None)
@example(
    lengths=np.array([21, *[22] * 8, 21, 1], np.int32), capacity=40, size=2
)  # one waits for long
@example(
    lengths=np.random.default_rng(0).integers(1, 6, 1500).astype(np.int32), capacity=60, size=30
)  # many wait for long
@given(
    lengths=arrays(np.int32, st.integers(0, 300), elements=st.integers(1, 40)),
    capacity=st.integers(40, 64),
    size=st.integers(1, 40),
)
def test_packs_are_those_of_the_slow_implementation(lengths, capacity, size):
    slow = [pack for window in carried_slowly(lengths.tolist(), capacity, size) for pack in window]
    fast = packs_of(plan_lane(lengths, capacity, size, seed=0, lane=0))
    assert {frozenset(pack) for pack in fast} == set(slow)
    assert sorted(k for pack in fast for k in pack) == list(range(len(lengths)))
    assert all(lengths[pack].sum() <= capacity for pack in fast)


@settings(deadline=None)
@given(
    lengths=arrays(np.int32, st.integers(0, 1500), elements=st.integers(1, 40)),
    size=st.integers(20, 900),
    cuts=st.lists(st.integers(0, 2000), max_size=6),
)
def test_packs_do_not_depend_on_how_sequences_are_added(lengths, size, cuts):
    window, packs = CarryingWindow(50, size, seed=3, lane=5), []
    for piece in np.split(np.arange(lengths.size), sorted(min(cut, lengths.size) for cut in cuts)):
        at = 0
        while at < piece.size:
            part = piece[at : at + window.room]
            at += part.size
            window.add(part, lengths[part])
            if window.room == 0:
                packs += packs_of(window.pack())
    if window.members.size:
        packs += packs_of(window.pack(flush=True))
    assert packs == packs_of(plan_lane(lengths, 50, size, seed=3, lane=5))


def test_compiled_and_plain_windows_pack_alike(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 1000, 6000).astype(np.int32)
    compiled = packs_of(plan_lane(lengths, 1000, 2000, seed=0, lane=0))
    monkeypatch.setattr("sftprep.packing.window._SMALL", 10**9)
    assert packs_of(plan_lane(lengths, 1000, 2000, seed=0, lane=0)) == compiled


def test_no_sequence_waits_for_long():
    # Sequences of just over half a pack fit with nothing, and are never in the fullest half while
    # full packs come.
    lengths = np.where(np.arange(9000) % 100 == 0, 501, 1000).astype(np.int32)
    window, came, left = CarryingWindow(1000, 512), {}, {}
    at = 0
    while at < lengths.size:
        part = np.arange(at, min(at + window.room, lengths.size))
        at = int(part[-1]) + 1
        window.add(part, lengths[part])
        came.update(dict.fromkeys(part.tolist(), window.number))
        left.update(dict.fromkeys(window.pack().members.tolist(), window.number - 1))
    waits = [left[k] - came[k] for k in left]
    assert max(waits) == MOST_WAITS


def lognormal(mean: float, draw: np.random.Generator) -> np.ndarray:
    return np.clip(draw.lognormal(np.log(mean) - 0.5, 1.0, 40_000), 1, 16_384).astype(np.int32)


DRAWN = {
    "log-normal, 6,256": (lambda draw: lognormal(6256, draw), 0.2),
    "log-normal, 2,799": (lambda draw: lognormal(2799, draw), 0.2),
    "uniform": (lambda draw: draw.integers(1, 16_385, 40_000).astype(np.int32), 0.4),
}


@pytest.mark.parametrize("name", list(DRAWN))
def test_nearly_as_few_packs_as_one_plan_over_all(name):
    make, percent = DRAWN[name]
    lengths = make(np.random.default_rng(1))
    whole = pack_lengths(lengths, 16_384).num_bins
    for window in (1000, 4096, 16_384):
        assert len(plan_lane(lengths, 16_384, window, seed=0, lane=0)) <= whole * (
            1 + percent / 100
        )


@needs_shared
@pytest.mark.parametrize("capacity", [4096, 16_384])
@pytest.mark.parametrize(
    "name", [path.name for path in sorted((SHARED / "datasets" / "lengths").glob("*.npy"))]
)
def test_nearly_as_few_packs_on_real_lengths(name, capacity):
    real = np.load(SHARED / "datasets" / "lengths" / name)
    real = real[real > 0]
    lengths = np.minimum(np.random.default_rng(0).choice(real, 40_000), capacity).astype(np.int32)
    whole = pack_lengths(lengths, capacity).num_bins
    for window in (1000, 4096):
        assert len(plan_lane(lengths, capacity, window, seed=0, lane=0)) <= whole * 1.002


def test_the_size_of_a_pack_does_not_depend_on_its_position():
    """Check this within a window, whose packs are planned longest first, and between windows."""
    lengths = lognormal(1500, np.random.default_rng(2))
    window, places, counts, means, at = CarryingWindow(16_384, 1000), [], [], [], 0
    while at < lengths.size:
        part = np.arange(at, min(at + window.room, lengths.size))
        at = int(part[-1]) + 1
        window.add(part, lengths[part])
        sizes = np.diff(window.pack().offsets)
        if window.number > 6:  # steady
            places += (np.arange(sizes.size) / sizes.size).tolist()
            counts += sizes.tolist()
            means.append(sizes.mean())
    assert len(means) > 50
    assert abs(np.corrcoef(places, counts)[0, 1]) < 0.05
    half = len(means) // 2
    assert abs(np.mean(means[:half]) / np.mean(means[half:]) - 1) < 0.05
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3


def test_each_seed_and_lane_has_its_order_of_the_same_packs():
    lengths = np.random.default_rng(3).integers(1, 300, 900).astype(np.int32)
    plans = [
        packs_of(plan_lane(lengths, 1000, 2000, seed=seed, lane=lane))
        for seed, lane in ((0, 0), (1, 0), (0, 1))
    ]
    assert plans[0] != plans[1] != plans[2] != plans[0]
    flushed = [sorted(map(sorted, plan)) for plan in plans]
    assert flushed[0] == flushed[1] == flushed[2]


def test_lanes_take_turns():
    lanes = [
        Emission(np.arange(first, first + n), np.arange(n + 1))
        for first, n in ((0, 3), (10, 1), (20, 2))
    ]
    assert packs_of(in_global_order(lanes)) == [[0], [10], [20], [1], [21], [2]]
    assert packs_of(in_global_order([])) == []

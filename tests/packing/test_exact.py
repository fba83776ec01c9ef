"""Exact packing fills bins, uses every sequence once and is never worse than best fit."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.packing import exact, pack_lengths, plan_counts, small
from sftprep.packing.exact import find_patterns
from tests.packing.test_pack_lengths import assert_sound, lengths_and_capacity, packs


def has_pattern(run_length: list[int], counts: list[int], capacity: int, top: int) -> bool:
    """Whether some subset with a sequence of run `top` and none longer fills a bin."""

    @cache
    def can_fill(space: int, run: int) -> bool:
        if space == 0 or run == len(counts):
            return space == 0
        available = counts[run] - (run == top)
        most = min(available, space // run_length[run])
        return any(can_fill(space - k * run_length[run], run + 1) for k in range(most + 1))

    return can_fill(capacity - run_length[top], top)


@st.composite
def runs_and_capacity(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Up to ten distinct lengths, descending, with small or huge counts."""
    capacity = draw(st.integers(1, 60))
    chosen = draw(st.sets(st.integers(1, capacity), min_size=1, max_size=10))
    counts = st.one_of(st.integers(1, 5), st.integers(1, 10**12))
    return sorted(chosen, reverse=True), [draw(counts) for _ in chosen], capacity


@given(runs_and_capacity())
@settings(max_examples=300, deadline=None)
def test_a_pattern_fills_a_bin_and_is_found_whenever_there_is_one(
    case: tuple[list[int], list[int], int],
) -> None:
    run_length, counts, capacity = case
    patterns, left = find_patterns(run_length, counts, capacity)
    remaining = list(counts)
    expected_left = [0] * len(counts)

    def leave_unfillable(until: int) -> None:
        """Leave the runs before `until` that still have sequences, none of which fills a bin."""
        for run in range(until):
            if remaining[run]:
                assert not has_pattern(run_length, remaining, capacity, run)
                expected_left[run], remaining[run] = remaining[run], 0

    for pattern, times in patterns:
        assert sum(run_length[run] * k for run, k in pattern) == capacity
        assert times >= 1
        leave_unfillable(pattern[0][0])
        for run, k in pattern:
            remaining[run] -= times * k
        assert min(remaining) >= 0
        # as often as the counts allow
        assert any(remaining[run] < k for run, k in pattern)
    leave_unfillable(len(counts))
    assert left == expected_left


@pytest.mark.parametrize("most_small", [-1, 10**9], ids=["compiled", "plain"])
@given(case=lengths_and_capacity())
@settings(max_examples=200, deadline=None)
def test_exact_packs_are_sound_and_at_most_as_many_as_best_fit(
    most_small: int, case: tuple[list[int], int]
) -> None:
    lengths, capacity = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "SMALL", most_small)
        patch.setattr(small, "SMALL_WHEN_LOADED", most_small)
        plan = pack_lengths(lengths, capacity, "exact")
        best_fit = pack_lengths(lengths, capacity)
    assert_sound(plan, np.array(lengths, np.int64), capacity)
    assert plan.num_bins <= best_fit.num_bins
    for pack in packs(plan):  # the longest first, and equal lengths in the order of the input
        assert pack == sorted(pack, key=lambda index: (-lengths[index], index))


def test_the_plain_and_the_compiled_planner_give_the_same_exact_packs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = np.random.default_rng(3).lognormal(5.2, 0.34, 20_000).astype(np.int32)
    plans = []
    for most_small in (-1, 10**9):
        monkeypatch.setattr(small, "SMALL", most_small)
        monkeypatch.setattr(small, "SMALL_WHEN_LOADED", most_small)
        plans.append(pack_lengths(lengths, 4_096, "exact"))
    for name in ("bin_of", "members", "offsets"):
        assert np.array_equal(getattr(plans[0], name), getattr(plans[1], name))


@pytest.mark.parametrize("capacity", [2_048, 4_096])
@pytest.mark.parametrize(("median", "spread"), [(190, 0.34), (320, 0.35), (155, 0.22)])
def test_bins_are_within_six_parts_of_ten_thousand_where_best_fit_is_not(
    median: int, spread: float, capacity: int
) -> None:
    # Narrow distributions, as of gsm8k, sgd and gpteacher.
    rng = np.random.default_rng(4)
    lengths = np.clip(rng.lognormal(np.log(median), spread, 300_000), 1, capacity).astype(np.int32)
    bound = -(-int(lengths.sum(dtype=np.int64)) // capacity)
    assert pack_lengths(lengths, capacity).num_bins > 1.001 * bound
    assert pack_lengths(lengths, capacity, "exact").num_bins <= 1.0006 * bound


def test_patterns_keep_short_sequences_for_the_end() -> None:
    # 6 + 4 and 5 + 5 keep the 1s; 6 + 3 + 1 would leave a 5 that nothing fills up.
    plan = pack_lengths([6, 5, 5, 4, 3, 1], 10, "exact")
    assert packs(plan) == [[0, 3], [1, 2], [4, 5]]


def test_exact_finds_the_packs_that_best_fit_misses() -> None:
    lengths = [44, 24, 24, 22, 21, 17, 8, 8, 6, 6]  # 180 tokens
    assert pack_lengths(lengths, 60).num_bins == 4
    assert pack_lengths(lengths, 60, "exact").num_bins == 3


def test_too_many_runs_or_steps_give_the_packs_of_best_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [44, 24, 24, 22, 21, 17, 8, 8, 6, 6]
    best_fit = packs(pack_lengths(lengths, 60))
    for name, value in (("MOST_RUNS", 6), ("MOST_STEPS", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(exact, name, value)
            assert packs(pack_lengths(lengths, 60, "exact")) == best_fit


@pytest.mark.parametrize("strategy", ["bfd", "exact"])
def test_counts_of_any_size_are_used_exactly_once(strategy: str) -> None:
    lengths, counts = np.arange(1, 61), np.arange(1, 61) * 10**10
    plan = plan_counts((lengths, counts), 97, strategy)
    first, size, taken = plan.moves.T
    # Each move takes sequences of one run, and all moves together take all sequences.
    ends = np.cumsum(size * taken)
    run_ends = np.cumsum(counts[::-1])
    assert ends[-1] == counts.sum()
    assert set(run_ends.tolist()) <= set(ends.tolist())
    # The tokens of the bins, at all bins where a move begins or ends.
    tokens = lengths[::-1][np.searchsorted(run_ends, ends)] * taken
    changed = np.unique(np.concatenate((first, first + size)))
    change = np.zeros(changed.size, np.int64)
    np.add.at(change, np.searchsorted(changed, first), tokens)
    np.add.at(change, np.searchsorted(changed, first + size), -tokens)
    totals = np.cumsum(change)
    assert changed[-1] == plan.num_bins
    assert 0 < totals[:-1].min() <= totals.max() <= 97
    assert totals[:-1] @ np.diff(changed) == plan.tokens

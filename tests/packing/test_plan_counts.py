"""Plans by counts are those of `pack_lengths`, for any number of sequences and any partitions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks import groups
from sftprep.errors import ConfigError
from sftprep.packing import Moves, pack_lengths, plan_counts, small
from sftprep.packing.runs import expand_moves
from tests.packing.test_pack_lengths import lengths_and_capacity

BOTH = pytest.mark.parametrize("strategy", ["bfd", "exact"])


@pytest.fixture(scope="module", autouse=True, params=["plain", "compiled"])
def _planner(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run each test with the plain planner of small plans and with the compiled one."""
    before = small.SMALL, small.SMALL_WHEN_LOADED
    small.SMALL = small.SMALL_WHEN_LOADED = 10**6 if request.param == "plain" else -1
    yield
    small.SMALL, small.SMALL_WHEN_LOADED = before


def histogram_of(lengths: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The distinct lengths and their counts."""
    return np.unique(lengths, return_counts=True)


def name_partitions(
    plan: Moves, lengths: NDArray[Any], cuts: list[int], order: list[int]
) -> NDArray[np.int64]:
    """The bins of all sequences, partition by partition in the specified order."""
    edges = [0, *sorted(cuts), lengths.size]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    counts = [
        np.bincount(np.searchsorted(plan.lengths, lengths[part]), minlength=plan.lengths.size)
        for part in parts
    ]
    bins = np.full(lengths.size, -7, np.int64)
    for number in order:
        first_ranks = np.sum([np.zeros_like(plan.counts), *counts[:number]], axis=0)
        bins[parts[number]] = plan.bins_of(lengths[parts[number]], first_ranks)
    return bins


@BOTH
@given(case=lengths_and_capacity(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_bins_of_partitions_in_any_order_are_those_of_all_sequences(
    strategy: str, case: tuple[list[int], int], data: st.DataObject
) -> None:
    lengths, capacity = np.array(case[0], np.int64), case[1]
    cuts = data.draw(st.lists(st.integers(0, lengths.size), max_size=6))
    order = data.draw(st.permutations(range(len(cuts) + 1)))
    plan = plan_counts(histogram_of(lengths), capacity, strategy)
    expected = pack_lengths(lengths, capacity, strategy)
    assert (plan.num_bins, plan.tokens) == (expected.num_bins, expected.tokens)
    assert plan.fill == expected.fill
    assert np.array_equal(name_partitions(plan, lengths, cuts, order), expected.bin_of)


@BOTH
@pytest.mark.parametrize("capacity", [2_048, 32_768, 2**20])
def test_bins_of_a_hundred_partitions_of_a_hundred_thousand(strategy: str, capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    lengths = np.minimum(rng.lognormal(6.0, 1.2, 100_000), capacity).astype(np.int32)
    plan = plan_counts(histogram_of(lengths), capacity, strategy)
    cuts = rng.integers(0, lengths.size, 99).tolist()
    bins = name_partitions(plan, lengths, cuts, rng.permutation(100).tolist())
    assert np.array_equal(bins, pack_lengths(lengths, capacity, strategy).bin_of)


def test_moves_are_the_bins_of_sorted_sequences() -> None:
    lengths = np.sort(np.random.default_rng(5).integers(1, 300, 5_000))[::-1]
    plan = plan_counts(histogram_of(lengths), 1_000)
    assert plan.moves.dtype == np.int64
    assert np.array_equal(expand_moves(plan.moves), pack_lengths(lengths, 1_000).bin_of)


def test_counts_beyond_thirty_two_bits_do_not_overflow() -> None:
    plan = plan_counts(([600, 3_000], [5 * 10**12, 10**12]), 4_096)
    # One of 3,000 and one of 600 per bin; 6 of 600 in each of the others.
    assert plan.num_bins == 10**12 + (4 * 10**12 + 5) // 6
    assert plan.tokens == 6_000 * 10**12
    last = plan.bins_of([600, 3_000], [5 * 10**12 - 1, 10**12 - 1])
    assert last.tolist() == [plan.num_bins - 1, 10**12 - 1]


def test_the_number_of_moves_does_not_grow_with_the_counts() -> None:
    lengths, counts = histogram_of(np.random.default_rng(6).integers(1, 4_096, 10**5))
    plans = [plan_counts((lengths, counts * factor), 4_096) for factor in (10**2, 10**6, 10**10)]
    assert len(plans[2].moves) < 1.1 * len(plans[1].moves) < 1.2 * len(plans[0].moves)


def test_the_histogram_is_copied_and_may_have_empty_classes() -> None:
    lengths, counts = np.arange(9), np.array([2, 0, 1, 0, 0, 3, 0, 1, 0])
    plan = plan_counts((lengths, counts), 8)
    assert plan.bins_of([5, 0, 2, 7], [1, 0, 0, 0, 0, 1, 0, 0, 0]).tolist() == [2, -1, 1, 0]
    counts[:] = 0
    assert plan.tokens == 2 + 15 + 7


def test_a_manifest_gives_a_plan_with_rounded_lengths() -> None:
    stored = {"up_to": [64, 128, 1_024], "sequences": [10, 20, 5]}
    assert plan_counts((stored["up_to"], stored["sequences"]), 1_024).num_bins == 5 + 4


def test_an_empty_histogram_has_no_bins() -> None:
    for histogram in (([], []), ([0], [7]), ([5], [0])):
        plan = plan_counts(histogram, 8)
        assert (plan.num_bins, plan.fill, plan.tokens, plan.moves.shape) == (0, 1.0, 0, (0, 3))


@pytest.mark.parametrize(
    ("histogram", "message"),
    [
        ([1, 2, 3], "not a pair"),
        (([1, 2], [1]), "2 lengths and 1 counts"),
        (([1.5], [1]), "float64"),
        (([1], [2.0]), "float64"),
        (([[1]], [1]), "2 dimensions"),
        (([-1, 2], [1, 1]), "a length of -1"),
        (([1, 2], [1, -4]), "a count of -4"),
        (([2, 1], [1, 1]), "not ascending: 1 follows 2"),
        (([2, 2], [1, 1]), "not ascending: 2 follows 2"),
        (([4, 9, 10], [1, 3, 4]), "7 sequences are longer than the capacity of a pack, 8"),
        (([8], [2**60]), "2\\*\\*62"),
        (([0, 1], [2**62, 2**62]), "2\\*\\*62"),
        (([1], np.array([2**63], np.uint64)), "above 64 bits"),
    ],
)
def test_invalid_histograms_are_rejected(histogram: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan_counts(histogram, 8)
    assert caught.value.remedy


def test_lengths_above_the_capacity_without_sequences_are_accepted() -> None:
    assert plan_counts(([4, 9], [2, 0]), 8).num_bins == 1


@pytest.mark.parametrize("capacity", [0, 2**31, 8.0])
def test_an_invalid_capacity_is_rejected(capacity: Any) -> None:
    with pytest.raises(ConfigError, match="capacity is"):
        plan_counts(([1], [1]), capacity)


def test_a_strategy_that_needs_the_order_is_rejected() -> None:
    with pytest.raises(ConfigError, match="'wrapped' does not plan by counts") as caught:
        plan_counts(([1], [1]), 8, "wrapped")
    assert "exact" in caught.value.remedy


@pytest.mark.parametrize(
    ("lengths", "first_ranks", "message"),
    [
        ([3], [0, 0], "sequence 0 has 3 tokens, a length that the plan does not have"),
        ([2, 9], [0, 0], "sequence 1 has 9 tokens"),
        ([2, 2], [3, 0], "2 sequences of length 2 after 3 in the preceding ones, and .* 4"),
        ([2], [-1, 0], "after -1"),
        ([2], [0], "first_ranks has 1 integers"),
        ([2.0], [0, 0], "float64"),
    ],
)
def test_partitions_that_the_plan_does_not_have_are_rejected(
    lengths: Any, first_ranks: Any, message: str
) -> None:
    plan = plan_counts(([2, 5], [4, 2]), 8)
    with pytest.raises(ConfigError, match=message) as caught:
        plan.bins_of(lengths, first_ranks)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["chat-like", "short"])
def test_groups_need_hardly_more_packs_than_one_plan(name):
    row = groups.measure(name, 4096, 1 << 30, groups=8)
    assert 0 <= row.groups_over_plan <= 0.02

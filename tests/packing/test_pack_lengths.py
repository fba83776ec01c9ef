"""Invariants of `pack_lengths`, and its equality with textbook best-fit decreasing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sftprep.config import Packing
from sftprep.errors import ConfigError
from sftprep.packing import PackPlan, pack_lengths, small
from sftprep.packing.strategies import STRATEGIES
from tests.packing.textbook import best_fit_decreasing_slow

LARGEST = 2**31 - 1


@pytest.fixture(scope="module", autouse=True, params=["plain", "compiled"])
def _planner(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run each test with the plain planner of small plans and with the compiled one."""
    before = small.SMALL, small.SMALL_WHEN_LOADED
    small.SMALL = small.SMALL_WHEN_LOADED = 10**9 if request.param == "plain" else -1
    yield
    small.SMALL, small.SMALL_WHEN_LOADED = before


def packs(plan: PackPlan) -> list[list[int]]:
    """The members of each bin, as lists."""
    return [
        plan.members[a:b].tolist() for a, b in zip(plan.offsets[:-1], plan.offsets[1:], strict=True)
    ]


def assert_sound(plan: PackPlan, lengths: NDArray[Any], capacity: int) -> None:
    """Check the invariants of every strategy."""
    assert plan.bin_of.dtype == plan.members.dtype == plan.offsets.dtype == np.int64
    assert plan.capacity == capacity
    assert plan.tokens == int(lengths.sum(dtype=np.int64))
    # each non-empty sequence in one bin, empty ones in none
    assert np.array_equal(np.sort(plan.members), np.flatnonzero(lengths))
    assert np.array_equal(plan.bin_of < 0, lengths == 0)
    assert np.all(plan.bin_of >= -1)
    # the two views of the plan agree, and no bin is empty
    sizes = np.diff(plan.offsets)
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == plan.members.size
    assert np.all(sizes > 0)
    assert np.array_equal(plan.bin_of[plan.members], np.repeat(np.arange(plan.num_bins), sizes))
    # no bin over capacity
    totals = np.zeros(plan.num_bins, np.int64)
    np.add.at(totals, plan.bin_of[plan.members], lengths[plan.members].astype(np.int64))
    assert totals.max(initial=0) <= capacity
    assert plan.fill == (totals.sum() / (plan.num_bins * capacity) if plan.num_bins else 1.0)


@st.composite
def lengths_and_capacity(draw: st.DrawFn) -> tuple[list[int], int]:
    """Few or many distinct lengths, ties, zeros, lengths near fractions of the capacity; capacities
    small, usual and huge."""
    capacity = draw(
        st.one_of(
            st.integers(1, 100),
            st.sampled_from([64, 4095, 4096, 4097, 131_072]),
            st.integers(
                2**18 - 2, 2**18 + 2
            ),  # around the capacity from which several spaces share a list
            st.integers(2**18, LARGEST),
        )
    )
    near_fraction = st.tuples(st.integers(1, 9), st.integers(-3, 3)).map(
        lambda f: min(max(capacity // f[0] + f[1], 0), capacity)
    )
    few = st.sampled_from(draw(st.lists(st.integers(0, capacity), min_size=1, max_size=4)))
    anything = st.integers(0, capacity)
    return draw(st.lists(st.one_of(near_fraction, few, anything), max_size=150)), capacity


@given(lengths_and_capacity())
@settings(max_examples=400, deadline=None)
def test_packs_are_those_of_textbook_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    plan = pack_lengths(lengths, capacity)
    assert_sound(plan, np.array(lengths, np.int64), capacity)
    assert packs(plan) == best_fit_decreasing_slow(lengths, capacity)


@pytest.mark.parametrize("capacity", [97, 4096, 40_000, 300_000, LARGEST])
@pytest.mark.parametrize("kind", ["log-normal", "uniform", "few"])
def test_packs_of_two_thousand_are_those_of_the_textbook(kind: str, capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    lengths = {
        "log-normal": np.minimum(rng.lognormal(np.log(capacity / 6), 1.0, 2_000), capacity).astype(
            np.int64
        ),
        "uniform": rng.integers(0, capacity, 2_000, endpoint=True),
        "few": rng.choice(rng.integers(1, capacity // 2, 5), 2_000),
    }[kind]
    plan = pack_lengths(lengths, capacity)
    assert_sound(plan, lengths, capacity)
    assert packs(plan) == best_fit_decreasing_slow(lengths.tolist(), capacity)


def test_spaces_that_share_a_list_are_distinguished() -> None:
    # Above 2**18, neighbouring spaces share a list. Before the last sequence is packed, the list
    # has the second bin, with a space of 40, then the first, whose space has dropped from 30 to 10
    # and which is the best fit.
    capacity = 2**24
    assert packs(pack_lengths([capacity - 30, capacity - 40, 20, 10], capacity)) == [[0, 2, 3], [1]]


@pytest.mark.parametrize("capacity", [2_048, 32_768])
def test_laws_hold_for_three_hundred_thousand(capacity: int) -> None:
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(6.0, 1.2, 300_000), capacity).astype(np.int32)
    plan = pack_lengths(lengths, capacity)
    assert_sound(plan, lengths, capacity)
    # Any best fit: two bins that could be one would have been one.
    totals = np.bincount(plan.bin_of[lengths > 0], weights=lengths[lengths > 0])
    assert np.sort(totals)[:2].sum() > capacity


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(50, 70))
@settings(max_examples=100, deadline=None)
def test_none_gives_each_sequence_its_own_bin_in_input_order(
    lengths: list[int], capacity: int
) -> None:
    plan = pack_lengths(lengths, capacity, "none")
    assert_sound(plan, np.array(lengths, np.int64), capacity)
    assert packs(plan) == [[i] for i, length in enumerate(lengths) if length]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "dtype", ["i1", "u1", "<i2", "<u2", "<i4", ">i4", "<u4", "<i8", ">i8", "<u8"]
)
def test_every_integer_dtype_gives_the_same_plan(dtype: str, strategy: str) -> None:
    lengths = [7, 0, 3, 7, 120, 64, 1, 1, 0, 99]
    expected = pack_lengths(lengths, 127, strategy)
    array = np.array(lengths, dtype)
    array.flags.writeable = False
    strided = np.repeat(array, 2)[::2]
    for given_lengths in (array, strided, tuple(lengths), [np.int16(x) for x in lengths]):
        plan = pack_lengths(given_lengths, np.uint8(127), strategy)
        assert packs(plan) == packs(expected)
        assert np.array_equal(plan.bin_of, expected.bin_of)


def test_input_is_not_changed_and_the_plan_is_the_same_each_time() -> None:
    lengths = np.random.default_rng(2).integers(0, 512, 5_000, dtype=np.int32)
    before = lengths.copy()
    first, second = pack_lengths(lengths, 512), pack_lengths(lengths, 512)
    assert np.array_equal(lengths, before)
    for name in ("bin_of", "members", "offsets"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "lengths", [[], [0], [0, 0, 0], np.array([], np.float64), np.zeros(4, np.uint8)]
)
def test_nothing_to_pack_gives_no_bin(lengths: Any, strategy: str) -> None:
    plan = pack_lengths(lengths, 16, strategy)
    assert (plan.num_bins, plan.fill, plan.tokens) == (0, 1.0, 0)
    assert plan.members.size == 0
    assert plan.offsets.tolist() == [0]
    assert plan.bin_of.tolist() == [-1] * len(lengths)


def test_a_sequence_of_just_the_capacity_fits() -> None:
    assert packs(pack_lengths([1, 1], 1)) == [[0], [1]]
    assert packs(pack_lengths([LARGEST, 1, LARGEST - 1], LARGEST)) == [[0], [2, 1]]


def test_fill_is_tokens_over_capacity_of_all_bins() -> None:
    assert pack_lengths([5, 3, 4], 8).fill == 12 / 16
    assert pack_lengths([5, 3, 4], 8, "none").fill == 12 / 24


@pytest.mark.parametrize("strategy", ["bfd", "exact", "none"])  # the others cut it
def test_a_sequence_over_capacity_is_named(strategy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pack_lengths([4, 8, 9, 30], 8, strategy)
    assert "sequence 2 has 9 tokens" in caught.value.message
    assert "8" in caught.value.message.split("capacity")[1]
    assert "truncate or split" in caught.value.remedy


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, -1, -2], "sequence 1 is -1"),
        (np.array([1, -(2**40)]), "sequence 1 is"),
        ([1, 2**31], "sequence 1 has 2147483648"),
        (np.array([1, 2**64 - 1], np.uint64), "sequence 1 has 18446744073709551615"),
        ([1.0, 2.0], "float64"),
        ([True, False], "bool"),
        ([[1, 2]], "2 dimensions"),
        (5, "0 dimensions"),
        ([[1], [1, 2]], "not a one-dimensional array"),
        (["a"], "dtype"),
        ([2**70], "dtype object"),
        (np.broadcast_to(np.int8(1), 2**31), "too many"),
    ],
)
def test_invalid_lengths_are_rejected(lengths: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        pack_lengths(lengths, 8)
    assert caught.value.remedy


@pytest.mark.parametrize("capacity", [0, -5, 2**31, 8.0, "8", None])
def test_an_invalid_capacity_is_rejected(capacity: Any) -> None:
    with pytest.raises(ConfigError, match="capacity is") as caught:
        pack_lengths([1], capacity)
    assert caught.value.remedy


def test_an_unknown_strategy_is_rejected_and_the_known_ones_are_the_choices_of_packing() -> None:
    with pytest.raises(ConfigError, match="'ffd'") as caught:
        pack_lengths([1], 8, "ffd")
    assert "bfd" in caught.value.remedy
    assert set(STRATEGIES) == set(get_args(Packing))

"""The first texts and one text in each thousand are checked, chosen by the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftprep.tokenize.hf import HfEncoder
from sftprep.tokenize.spot import SpotChecks, spot_numbers
from sftprep.tokenize.tokens import Encoder, Mismatch, Tokens
from tests.tokenize.made import byte_level, spec_of
from tests.tokenize.test_probe import Liar


@given(
    count=st.integers(0, 400),
    seed=st.integers(0, 2**64 - 1),
    every=st.integers(1, 50),
    first=st.integers(0, 20),
)
def test_the_first_ones_and_one_in_each_block(
    count: int, seed: int, every: int, first: int
) -> None:
    found = spot_numbers(count, seed, first=first, every=every)
    assert found == sorted(set(found))
    assert all(0 <= number < count for number in found)
    assert found[: min(first, count)] == list(range(min(first, count)))
    drawn = spot_numbers(count, seed, every=every)
    assert set(found) == {*drawn, *range(min(first, count))}
    counts = np.bincount(np.array(drawn, np.int64) // every, minlength=count // every)
    assert (counts[: count // every] == 1).all()
    assert spot_numbers(count + 100, seed, every=every)[: len(drawn)] == drawn


def test_another_seed_checks_other_texts() -> None:
    assert spot_numbers(100_000, seed=1) != spot_numbers(100_000, seed=2)
    assert len({number % 1000 for number in spot_numbers(100_000, seed=1)}) > 50


def test_a_lie_is_found_where_it_is_looked_for() -> None:
    truth = HfEncoder(spec_of(byte_level()), threads=False)
    liar = Liar(truth, "ids")
    asked: list[int] = []

    def ask(texts: Sequence[str]) -> Callable[[], Tokens]:
        asked.append(len(texts))
        return lambda: truth.encode(texts)

    def mismatch(
        encoder: Encoder, texts: list[str], first: int = 0, every: int = 1000
    ) -> Mismatch | None:
        checks = SpotChecks(ask, seed=0, first=first, every=every)
        checks.begin(texts)(encoder.encode(texts))
        return checks.mismatch()

    texts = [f"the fox {number}" for number in range(1500)]
    assert mismatch(liar, []) is None
    assert asked == []
    assert mismatch(liar, texts, first=8) is not None
    assert asked[0] >= 9
    assert mismatch(truth, texts) is None
    assert mismatch(Liar(truth, "nothing"), texts, every=10) is None


def test_texts_in_parts_are_asked_for_at_once_and_waited_for_at_the_end() -> None:
    truth = HfEncoder(spec_of(byte_level()), threads=False)
    answered: list[list[str]] = []
    asked: list[list[str]] = []

    def ask(texts: Sequence[str]) -> Callable[[], Tokens]:
        asked.append([*texts])

        def answer() -> Tokens:
            answered.append([*texts])
            return truth.encode(texts)

        return answer

    checks = SpotChecks(ask, seed=0, first=3, every=1_000_000)
    parts = [["the", "fox"], ["quick", "brown"], ["the fox"]]
    for part in parts:
        checks.begin(part)(truth.encode(part))
    # The first three of all, and not of each part, beside what the seed draws: in parts so small,
    # nothing but the first.
    assert asked[0] == parts[0]
    assert asked[1][0] == "quick"
    assert not answered
    assert checks.mismatch() is None
    assert answered == asked

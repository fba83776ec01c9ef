"""The first texts and one text in each thousand are checked, chosen by the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftprep.tokenize.hf import HfEncoder
from sftprep.tokenize.spot import spot_check, spot_numbers
from sftprep.tokenize.tokens import Tokens
from tests.tokenize.made import byte_level, spec_of
from tests.tokenize.test_probe import Liar


@given(count=st.integers(0, 400), seed=st.integers(0, 2**64 - 1), every=st.integers(1, 50), first=st.integers(0, 20))
def test_the_first_ones_and_one_in_each_block(count: int, seed: int, every: int, first: int) -> None:
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

    texts = [f"the fox {number}" for number in range(1500)]
    assert spot_check(truth, ask, texts, seed=0)(truth.encode(texts)) is None
    assert spot_check(liar, ask, [], seed=0)(liar.encode([])) is None
    assert asked == []
    assert spot_check(liar, ask, texts, seed=0, first=8)(liar.encode(texts)) is not None
    assert asked[0] >= 9
    assert spot_check(Liar(truth, "nothing"), ask, texts, seed=0, every=10)(truth.encode(texts)) is None

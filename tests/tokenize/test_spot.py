"""One text in each thousand is checked, whichever way a build is cut into batches, and small builds load nothing for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftprep.tokenize.hf import HfEncoder
from sftprep.tokenize.spot import spot_check, spot_numbers
from sftprep.tokenize.tokens import Tokens
from tests.tokenize.made import byte_level, spec_of
from tests.tokenize.test_probe import Liar


@given(
    total=st.integers(0, 400),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    seed=st.integers(0, 2**64 - 1),
    every=st.integers(1, 50),
)
def test_one_in_each_block_after_the_first(total: int, cuts: list[int], seed: int, every: int) -> None:
    edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
    found = [a + number for a, b in pairwise(edges) for number in spot_numbers(a, b - a, seed, every)]
    assert found == spot_numbers(0, total, seed, every)
    assert all(every <= number < total for number in found)
    counts = np.bincount(np.array(found, np.int64) // every, minlength=max(total // every, 1))
    assert (counts[1 : total // every] == 1).all()


def test_another_seed_checks_other_texts() -> None:
    assert spot_numbers(0, 100_000, seed=1) != spot_numbers(0, 100_000, seed=2)
    assert len({number % 1000 for number in spot_numbers(0, 100_000, seed=1)}) > 50


def test_a_lie_is_found_and_nothing_is_loaded_before_there_is_something_to_check() -> None:
    truth = HfEncoder(spec_of(byte_level()), threads=False)
    liar = Liar(truth, "ids")
    loads: list[str] = []

    def reference(texts: Sequence[str]) -> Tokens:
        loads.append("tokenizers")
        return truth.encode(texts)

    texts = [f"the fox {number}" for number in range(500)]
    tokens = liar.encode(texts)
    assert spot_check(liar, reference, texts, tokens, seen=0, seed=0) is None
    assert spot_check(liar, reference, texts, tokens, seen=500, seed=0) is None
    assert loads == []
    found = [spot_check(liar, reference, texts, tokens, seen=seen, seed=0) for seen in range(1000, 5000, 500)]
    assert len(loads) == 4
    assert sum(mismatch is not None for mismatch in found) == 4
    assert spot_check(truth, reference, texts, truth.encode(texts), seen=5000, seed=0) is None
    assert spot_check(Liar(truth, "nothing"), reference, texts, truth.encode(texts), seen=0, seed=0, every=10) is None
    assert len(loads) == 5

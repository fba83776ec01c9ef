"""The first texts, and one of each thousand, are compared; the seed alone draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftprep.tokenize.encoders.base import Tokens
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.verified_encoder import VerifiedEncoder, sample_numbers
from tests.tokenize.small_tokenizers import byte_level, spec_of
from tests.tokenize.test_probe import FaultyEncoder


@given(count=st.integers(0, 5000), seed=st.integers(0, 2**64 - 1), num_first=st.integers(0, 20))
def test_the_first_texts_and_one_of_each_block_are_drawn(
    count: int, seed: int, num_first: int
) -> None:
    found = sample_numbers(count, seed, num_first=num_first)
    assert found == sorted(set(found))
    assert all(0 <= number < count for number in found)
    assert found[: min(num_first, count)] == list(range(min(num_first, count)))
    drawn = sample_numbers(count, seed)
    assert set(found) == {*drawn, *range(min(num_first, count))}
    counts = np.bincount(np.array(drawn, np.int64) // 1000, minlength=count // 1000)
    assert (counts[: count // 1000] == 1).all()
    assert sample_numbers(count + 100, seed)[: len(drawn)] == drawn


def test_another_seed_draws_other_texts() -> None:
    assert sample_numbers(100_000, seed=1) != sample_numbers(100_000, seed=2)
    assert len({number % 1000 for number in sample_numbers(100_000, seed=1)}) > 50


class Watched(VerifiedEncoder):
    """A verified encoder with an injected fast encoder, which records the requested samples."""

    def __init__(self, fast: object) -> None:
        super().__init__(spec_of(byte_level()), "gigatoken", threads=False)
        self.__dict__["fast"] = fast
        self.asked: list[list[str]] = []
        self.answered: list[list[str]] = []

    def ask_reference(self, texts: Sequence[str]) -> Callable[[], Tokens]:
        self.asked.append([*texts])

        def answer() -> Tokens:
            self.answered.append([*texts])
            return self.reference.encode(texts)

        return answer


def test_a_fault_is_found_in_the_sample() -> None:
    truth = HfEncoder(spec_of(byte_level()), threads=False)
    texts = [f"the fox {number}" for number in range(1500)]
    for fault, num_first, found in (("ids", 8, True), ("nothing", 8, False)):
        encoder = Watched(FaultyEncoder(truth, fault))
        own = encoder.partition(seed=0, num_first=num_first)
        own.encode([])
        assert encoder.asked == []
        own.encode(texts)
        assert len(encoder.asked[0]) >= 9
        assert own.samples[:8] == [*range(8)]
        assert (own.verify() is not None) == found


def test_without_a_seed_nothing_is_compared() -> None:
    truth = HfEncoder(spec_of(byte_level()), threads=False)
    encoder = Watched(FaultyEncoder(truth, "ids"))
    own = encoder.partition(seed=None, num_first=8)
    own.encode(["the fox"] * 2000)
    assert own.samples == []
    assert own.verify() is None
    assert encoder.asked == []


def test_samples_are_requested_at_once_and_awaited_at_the_end() -> None:
    encoder = Watched(HfEncoder(spec_of(byte_level()), threads=False))
    own = encoder.partition(seed=2, num_first=3)
    parts = [["the", "fox"], ["quick", "brown"], ["the fox"]]
    for part in parts:
        own.encode(part)
    # The first three of all parts, and not of each part, and what the seed draws.
    assert encoder.asked[:2] == [parts[0], parts[1][:1]]
    assert not encoder.answered
    assert own.verify() is None
    assert encoder.answered == encoder.asked

"""fastokens gives the ids of `tokenizers` on threads, in forked processes, and for any length."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from sftprep.tokenize.encoders.base import Encoder, first_mismatch
from sftprep.tokenize.encoders.fastokens import FastokensEncoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.loading.spec import TokenizerSpec
from tests.support import at_most
from tests.tokenize.small_tokenizers import STOP, byte_level, spec_of
from tests.tokenize.text_strategies import texts


def unusual_words() -> Tokenizer:
    """Return a tokenizer whose words only the regular expressions of fastokens find."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(?<=[a-z])[A-Z]\w*|\w+(?!\d)|[^\w\s]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


SPECS = {
    "bytes": spec_of(byte_level()),
    "unusual words": spec_of(unusual_words()),
    "words by a regular expression": spec_of(byte_level(nfc=True, gpt4=True)),
    "bytes that are missing": spec_of(byte_level(every_byte=False)),
    "special tokens as text": spec_of(byte_level(), split_special_tokens=True),
}
LONG = "The quick brown fox — 中文 12345 don't\n" * 2_000  # more than 64 KiB
SAMPLE = ["short", "", LONG, f"a{STOP}b", "\r\x04", "naïve", LONG[:70_000], "x" * 20_000, "end"]


@cache
def pair(name: str, *, threads: bool) -> tuple[FastokensEncoder, HfEncoder]:
    reference = HfEncoder(SPECS[name], threads=False)
    encoder = FastokensEncoder(SPECS[name], reference=lambda: reference, threads=threads)
    return encoder, reference


def assert_equal(encoder: Encoder, reference: Encoder, sample: Sequence[str]) -> None:
    tokens = encoder.encode(sample)
    assert (tokens.input_ids.dtype, tokens.offsets.dtype) == (np.int32, np.int64)
    assert first_mismatch(sample, reference.encode(sample), tokens) is None


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_long_and_short_texts_have_the_ids_of_the_reference(name: str, threads: bool) -> None:
    encoder, reference = pair(name, threads=threads)
    assert_equal(encoder, reference, SAMPLE)
    assert_equal(encoder, reference, [f"text {number}" for number in range(3_000)])


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ids_and_characters_are_those_of_the_reference(name: str, data: st.DataObject) -> None:
    encoder, reference = pair(name, threads=False)
    sample = data.draw(st.lists(texts(list(SPECS[name].added_tokens())), max_size=6))
    tokens, chars = encoder.encode_with_chars(sample)
    expected, expected_chars = reference.encode_with_chars(sample)
    assert first_mismatch(sample, expected, tokens) is None
    assert chars.tolist() == expected_chars.tolist()


def test_only_texts_with_missing_bytes_are_encoded_by_the_reference() -> None:
    asked: list[str] = []

    class Recorder(HfEncoder):
        def encode(self, texts: Sequence[str]) -> object:  # type: ignore[override]
            asked.extend(texts)
            return super().encode(texts)

    spec = SPECS["bytes that are missing"]
    reference = Recorder(spec, threads=False)
    encoder = FastokensEncoder(spec, reference=lambda: reference, threads=False)
    encoder.encode(["plain", "a\rb", "fox", "\x04"])
    assert asked == ["a\rb", "\x04"]


def encode_sample(spec: TokenizerSpec) -> tuple[bool, list[int]]:
    """Encode the sample in another process; return whether it has threads, and the ids."""
    reference = HfEncoder(spec, threads=False)
    encoder = FastokensEncoder(spec, reference=lambda: reference, threads=False)
    return encoder.has_threads, encoder.encode(SAMPLE).input_ids.tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("name", ["bytes", "unusual words"])
def test_a_forked_process_does_not_wait_for_threads_of_its_parent(name: str) -> None:
    encoder, reference = pair(name, threads=True)
    assert_equal(encoder, reference, SAMPLE)  # starts the threads
    with multiprocessing.get_context("fork").Pool(1) as pool, at_most(60):
        has_threads, ids = pool.apply(encode_sample, (SPECS[name],))
    assert not has_threads
    assert ids == reference.encode(SAMPLE).input_ids.tolist()
    assert FastokensEncoder.has_threads

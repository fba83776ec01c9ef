"""Both encoders give the ids and offsets of transformers, for any text and on any code path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from sftprep.errors import TokenizerError
from sftprep.tokenize.encoders import gigatoken as fast
from sftprep.tokenize.encoders.base import Encoder, EncoderFault, Tokens
from sftprep.tokenize.encoders.fast import guard
from sftprep.tokenize.encoders.gigatoken import GigatokenEncoder
from sftprep.tokenize.encoders.load import ENCODERS, load_encoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.probe import compare_encoders
from sftprep.tokenize.loading.adversarial_texts import adversarial_texts
from sftprep.tokenize.loading.spec import TokenizerSpec
from tests.support import needs_shared
from tests.tokenize.real_tokenizers import (
    REAL,
    REAL_PAIRS,
    real_fast,
    real_reference,
    real_spec,
    real_tokenizer,
)
from tests.tokenize.small_tokenizers import STOP, byte_level, live, sentence_piece, spec_of
from tests.tokenize.text_strategies import texts

NEW = (  # two marks that Unicode 17 reorders, and that Unicode 9 does not contain
    "\U0001e135\U00011235"
)
_strip = AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)
MADE: dict[str, Tokenizer] = {
    "as gpt-2": byte_level(),
    "as qwen": byte_level(nfc=True, gpt4=True),
    "a token that strips whitespace": byte_level(added=(_strip,)),
    "whitespace as a token": byte_level(
        added=(AddedToken("  ", normalized=False), AddedToken("\n\n", normalized=False))
    ),
    "a space before the text": byte_level(add_prefix_space=True),
    "offsets without whitespace": byte_level(trim=True),
    "as llama-2": sentence_piece(prepend=True),
    "as gemma": sentence_piece(prepend=False),
}


@cache
def made_spec(name: str) -> TokenizerSpec:
    return spec_of(MADE[name])


PAIRS = [
    *(("gigatoken", name) for name in MADE),
    # fastokens 0.3 encodes "<0x0A>" as a byte with these, which the probe finds.
    *(("fastokens", name) for name in MADE if name not in ("as llama-2", "as gemma")),
]
"""Each fast encoder with each small tokenizer for which it is equal."""


@cache
def pair(encoder: str, name: str) -> tuple[Encoder, HfEncoder]:
    if name in MADE:
        spec = made_spec(name)
        return load_encoder(spec, encoder, threads=False), HfEncoder(spec, threads=False)
    return real_fast(encoder, name), real_reference(name)


def assert_equal(encoder: str, name: str, sample: Sequence[str]) -> None:
    fast_encoder, reference = pair(encoder, name)
    result = compare_encoders(fast_encoder, reference, sample)
    assert result.equal, f"{name}: {result.reason}: {result.example}"


@pytest.mark.parametrize(("encoder", "name"), PAIRS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_fast_equals_reference_on_small_tokenizers(
    encoder: str, name: str, data: st.DataObject
) -> None:
    sample = data.draw(st.lists(texts(list(made_spec(name).added_tokens())), max_size=6))
    assert_equal(encoder, name, sample)


@needs_shared
@pytest.mark.parametrize(("encoder", "name"), REAL_PAIRS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_fast_equals_reference_on_real_tokenizers(
    encoder: str, name: str, data: st.DataObject
) -> None:
    sample = data.draw(st.lists(texts(list(real_spec(name).added_tokens())[:40]), max_size=6))
    assert_equal(encoder, name, sample)


@pytest.mark.parametrize(("encoder", "name"), PAIRS)
def test_fast_equals_reference_on_adversarial_texts(encoder: str, name: str) -> None:
    assert_equal(encoder, name, adversarial_texts(made_spec(name)))
    assert_equal(encoder, name, [])
    assert_equal(encoder, name, [""])
    assert_equal(encoder, name, ["", "a", "", NEW, "", "b"])


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_reference_is_what_transformers_does(name: str) -> None:
    """The ids and offsets of direct calls equal those of batches, with and without threads."""
    sample = [*adversarial_texts(real_spec(name))[:50], *adversarial_texts(real_spec(name))[59:80]]
    expected = [
        real_tokenizer(name)(text, add_special_tokens=False, return_offsets_mapping=True)
        for text in sample
    ]
    for encoder in (real_reference(name), HfEncoder(real_spec(name), threads=False)):
        tokens, chars = encoder.encode_with_chars(sample)
        assert (tokens.input_ids.dtype, tokens.offsets.dtype, chars.dtype) == (
            np.int32,
            np.int64,
            np.int64,
        )
        for number, want in enumerate(expected):
            rows = slice(int(tokens.offsets[number]), int(tokens.offsets[number + 1]))
            assert tokens.input_ids[rows].tolist() == want["input_ids"]
            assert chars[rows].tolist() == [list(pair) for pair in want["offset_mapping"]]
        again = encoder.encode(sample)
        assert again.input_ids.tolist() == tokens.input_ids.tolist()
        assert again.offsets.tolist() == tokens.offsets.tolist()
        assert encoder.token_chars(sample, again).tolist() == chars.tolist()


def test_reference_works_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = adversarial_texts(made_spec("as qwen"))
    encoder = HfEncoder(made_spec("as qwen"), threads=False)
    whole, chars = encoder.encode_with_chars(sample)
    monkeypatch.setattr("sftprep.tokenize.encoders.reference._BATCH_CHARACTERS", 10)
    parts, part_chars = encoder.encode_with_chars(sample)
    assert (parts.input_ids.tolist(), parts.offsets.tolist()) == (
        whole.input_ids.tolist(),
        whole.offsets.tolist(),
    )
    assert part_chars.tolist() == chars.tolist()


def test_char_to_token_of_transformers_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL finds the token of a character with `char_to_token`, which is computed from offsets."""
    monkeypatch.setattr("sftprep.tokenize.encoders.char_offsets._GROUP_CHARACTERS", 7)
    tokenizer = live(MADE["as qwen"])
    sample = ["<|im_start|>user\nnaïve 中文 🤯?<|im_end|>\n", "e\u0301 two", "a  b"]
    encoder, _ = pair("gigatoken", "as qwen")
    tokens, chars = encoder.encode_with_chars(sample)
    for number, text in enumerate(sample):
        own = chars[tokens.offsets[number] : tokens.offsets[number + 1]]
        encoding = tokenizer(text, add_special_tokens=False)
        for place in range(len(text)):
            holds = np.flatnonzero((own[:, 0] <= place) & (place < own[:, 1]))
            assert encoding.char_to_token(place) == (int(holds[0]) if len(holds) else None)


@pytest.mark.parametrize("name", ["as qwen", "as llama-2"])
def test_every_path_of_the_fast_encoder_gives_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = made_spec(name)
    sample = [*adversarial_texts(spec), NEW, "plain " * 50]
    expected = HfEncoder(spec, threads=False).encode(sample)

    def check() -> None:
        encoder = load_encoder(spec, "gigatoken", threads=False)
        for _ in range(3):
            got = encoder.encode(sample)
            assert (got.input_ids.dtype, got.offsets.dtype) == (np.int32, np.int64)
            assert got.input_ids.tolist() == expected.input_ids.tolist()
            assert got.offsets.tolist() == expected.offsets.tolist()

    check()
    monkeypatch.setattr(
        fast, "_MEMORY_CHECK_BYTES", 0
    )  # the process always seems to have grown too much
    monkeypatch.setattr(fast, "_CACHE_BYTES", -(1 << 60))
    check()


def count_loads() -> None:
    """Encode words that never recur, until the limit is passed, and print the number of loads."""
    fast._MEMORY_CHECK_BYTES, fast._CACHE_BYTES = 1 << 19, 8 << 20
    encoder = load_encoder(made_spec("as gpt-2"), "gigatoken", threads=False)
    assert isinstance(encoder, GigatokenEncoder)
    loaded: list[object] = [encoder._backend]
    random = np.random.default_rng(0)
    for _ in range(12):
        letters = random.integers(97, 123, size=1 << 19, dtype=np.uint8)
        letters[random.random(len(letters)) < 0.1] = 32
        encoder.encode([letters.tobytes().decode()])
        if encoder._backend is not loaded[-1]:
            loaded.append(encoder._backend)
    print(len(loaded))


def test_memory_is_released_before_it_exceeds_the_limit() -> None:
    # In a process of its own: here, memory that other tests released may be reused, so that the
    # process does not seem to grow.
    code = "from tests.tokenize.test_encoders import count_loads; count_loads()"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 1


class Recorder:
    """A reference encoder that records its calls."""

    name, version = "tokenizers", "0"

    def __init__(self, inner: Encoder) -> None:
        self.inner, self.asked = inner, []

    def encode(self, texts: Sequence[str]) -> Tokens:
        self.asked += texts
        return self.inner.encode(texts)

    def token_chars(self, texts: Sequence[str], tokens: Tokens) -> np.ndarray:
        self.asked += texts
        return self.inner.token_chars(texts, tokens)

    def encode_with_chars(self, texts: Sequence[str]) -> tuple[Tokens, np.ndarray]:
        raise AssertionError("unexpected call")


def test_only_unsafe_texts_are_encoded_by_the_reference() -> None:
    spec = made_spec("as qwen")
    reference = Recorder(HfEncoder(spec, threads=False))
    encoder = GigatokenEncoder(spec, reference=lambda: reference)
    sample = ["plain", "中文 🤯 é", f"a{NEW}", "", "\U0001faea", "e\u0301 decomposed"]
    tokens = encoder.encode(sample)
    assert reference.asked == [sample[2], sample[4]]
    reference.asked.clear()
    encoder.token_chars(sample, tokens)
    assert reference.asked == ["e\u0301 decomposed"]  # NFC changes its bytes


def test_a_request_for_offsets_of_other_ids_is_a_fault() -> None:
    """If the reference encoder computes the offsets, it compares the ids too."""
    encoder, _ = pair(
        "gigatoken", "offsets without whitespace"
    )  # a kind that char_offsets.py leaves to the reference
    tokens = encoder.encode(["hello world"])
    tokens.input_ids[0] += 1
    with pytest.raises(
        EncoderFault, match=r"ids that tokenizers does not give: 'hello world': from token 0 on"
    ):
        encoder.token_chars(["hello world"], tokens)


@pytest.mark.parametrize("half", ["\ud83d", "fine \udc00 fine"])
def test_half_a_surrogate_pair_is_refused(half: str) -> None:
    for threads in (False, True):
        for name in ENCODERS:
            encoder = load_encoder(made_spec("as gpt-2"), name, threads=threads)
            with pytest.raises(TokenizerError, match="half of a surrogate pair at character"):
                encoder.encode(["good", half])


class PanicException(BaseException):
    """The exception that the binding of a Rust library raises."""


def test_a_panic_is_a_fault_and_an_interrupt_is_not() -> None:
    def fail(error: BaseException) -> list[str]:
        raise error

    for error in (
        PanicException("index out of bounds"),
        RuntimeError("no such token\n\nLocation: src"),
        OverflowError(),
    ):
        with pytest.raises(EncoderFault, match=r"it (cannot|broke down)"):
            guard(lambda error=error: fail(error))
    with pytest.raises(KeyboardInterrupt):
        guard(lambda: fail(KeyboardInterrupt()))


@pytest.mark.parametrize(
    "tokenizer", [byte_level(), sentence_piece(prepend=True)], ids=["bytes", "pieces"]
)
def test_environment_variables_stay_unchanged(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    before = dict(os.environ)
    for name in ENCODERS:
        for threads in (False, True):
            load_encoder(spec_of(tokenizer), name, threads=threads).encode(["a b", f"c{STOP}"] * 3)
    assert dict(os.environ) == before

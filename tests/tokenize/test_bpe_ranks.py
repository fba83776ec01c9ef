"""Ranks are derived only if they are proven to give the same tokens, and they do give them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from sftprep.tokenize.encoders.bpe_ranks import (
    _merge_below,
    byte_by_character,
    cache_ranks,
    derive_ranks,
    find_ranks,
)
from sftprep.tokenize.encoders.gigatoken import GigatokenEncoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.probe import compare_encoders
from sftprep.tokenize.loading.adversarial_texts import adversarial_texts
from sftprep.tokenize.loading.spec import TokenizerSpec
from tests.support import needs_shared
from tests.tokenize.real_tokenizers import real_spec
from tests.tokenize.small_tokenizers import END, START, STOP, byte_level, spec_of

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_like(
    *, nfc: bool = True, added: tuple[AddedToken, ...] = (), cut: str = QWEN
) -> TokenizerSpec:
    made = json.loads(byte_level().to_str())["model"]
    words = [
        word
        for word in sorted(made["vocab"], key=made["vocab"].__getitem__)
        if word not in (END, START, STOP)
    ]
    pairs = [tuple(pair) for pair in made["merges"]]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, pairs))
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated"), level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (END, START, STOP)]
    )
    tokenizer.add_tokens(list(added))
    return spec_of(tokenizer)


def encoder_of(spec: TokenizerSpec, folder: Path) -> tuple[GigatokenEncoder, HfEncoder]:
    cache_ranks(spec, folder)
    ranks = find_ranks(spec, folder)
    assert ranks is not None
    reference = HfEncoder(spec, threads=False)
    return GigatokenEncoder(spec, reference=lambda: reference, ranks=ranks), reference


@st.composite
def bpe_models(draw: st.DrawFn) -> dict[str, Any]:
    """Small models over three characters; for most of them, merging by ranks would be wrong."""
    letters = {byte: letter for letter, byte in byte_by_character().items()}
    vocab = {letters[byte]: byte for byte in range(256)}
    merges: list[tuple[str, str]] = []
    words = ["a", "b", "c"]
    for _ in range(draw(st.integers(0, 9))):
        pair = (draw(st.sampled_from(words)), draw(st.sampled_from(words)))
        if "".join(pair) not in vocab:
            merges.append(pair)
            words.append("".join(pair))
            vocab["".join(pair)] = len(vocab)
    return {"type": "BPE", "vocab": vocab, "merges": [" ".join(pair) for pair in merges]}


@settings(max_examples=400, deadline=None)
@given(model=bpe_models(), word=st.text("abc", max_size=14))
def test_what_is_proven_merges_alike(model: dict[str, Any], word: str) -> None:
    ranks = derive_ranks(model, {})
    if ranks is None:
        return
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in model["merges"])]
    tokenizer = Tokenizer(models.BPE(model["vocab"], pairs))
    ids = dict(ranks)
    assert [
        ids[part] for part in _merge_below(word.encode(), sys.maxsize, ids)
    ] == tokenizer.encode(word).ids


def test_a_token_that_two_pairs_can_make_is_not_proven() -> None:
    letters = {byte: letter for letter, byte in byte_by_character().items()}
    vocab = {letters[byte]: byte for byte in range(256)} | {"ab": 256, "bc": 257, "abc": 258}
    model = {"type": "BPE", "vocab": vocab, "merges": ["a b", "b c", "ab c"]}
    assert derive_ranks(model, {}) is not None
    assert derive_ranks({**model, "merges": ["a b", "b c", "a bc"]}, {}) is None
    assert derive_ranks({**model, "merges": ["b c", "a b", "ab c"]}, {}) is None, (
        "ids that do not follow the merges"
    )
    assert derive_ranks({**model, "vocab": {**vocab, "cab": 259}}, {}) is None, (
        "a token without a merge"
    )
    assert derive_ranks({**model, "vocab": {**vocab, "cab": 259}}, {"cab": 259}) is not None, (
        "but an added one needs no merge"
    )
    assert derive_ranks({**model, "byte_fallback": True}, {}) is None


@pytest.mark.parametrize("nfc", [True, False])
def test_ranks_give_what_tokenizers_gives(tmp_path: Path, nfc: bool) -> None:
    spec = qwen_like(nfc=nfc)
    fast, reference = encoder_of(spec, tmp_path)
    result = compare_encoders(fast, reference, adversarial_texts(spec))
    assert result.equal, result


def test_texts_are_normalized_before_ranks_are_used(tmp_path: Path) -> None:
    fast, reference = encoder_of(qwen_like(), tmp_path)
    texts = [
        "cafe\u0301",
        "plain",
        "caf\u00e9",
        "<|im_end|>\u0338 a\u0301",
        "",
        "\u1112\u1161\u11ab",
    ]
    want, got = reference.encode(texts), fast.encode(texts)
    assert np.array_equal(want.offsets, got.offsets)
    assert np.array_equal(want.input_ids, got.input_ids)


@pytest.mark.parametrize(
    "spec",
    [
        lambda: qwen_like(cut=r"\p{L}+|\s+"),
        lambda: qwen_like(added=(AddedToken("<x>", normalized=True),)),
        lambda: qwen_like(added=(AddedToken("<x>", normalized=False, lstrip=True),)),
        lambda: spec_of(byte_level()),
        lambda: spec_of(byte_level(gpt4=True, nfc=True)),
    ],
)
def test_other_tokenizers_have_no_ranks(tmp_path: Path, spec: Any) -> None:
    cache_ranks(spec(), tmp_path)
    assert find_ranks(spec(), tmp_path) is None


def test_damaged_ranks_are_not_used(tmp_path: Path) -> None:
    spec = qwen_like()
    cache_ranks(spec, tmp_path)
    (ranks,) = tmp_path.rglob("*.tiktoken")
    ranks.write_bytes(ranks.read_bytes()[:-5] + b"7\n")
    assert find_ranks(spec, tmp_path) is None
    ranks.unlink()
    assert find_ranks(spec, tmp_path) is None


@needs_shared
def test_qwen3_has_ranks(tmp_path: Path) -> None:
    spec = real_spec("qwen3")
    fast, reference = encoder_of(spec, tmp_path)
    result = compare_encoders(fast, reference, adversarial_texts(spec))
    assert result.equal, result
    assert json.loads(spec.json)["model"]["type"] == "BPE"

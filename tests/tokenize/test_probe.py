"""The probe finds an encoder that is wrong before it is used, and caches its answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, models, normalizers

from sftprep.core.disk_cache import read_entry, write_entry
from sftprep.errors import MissingDependency, TokenizerError
from sftprep.tokenize.encoders.base import EncoderFault, Mismatch, Tokens, first_mismatch
from sftprep.tokenize.encoders.fast import explain_refusal
from sftprep.tokenize.encoders.fastokens import FastokensEncoder
from sftprep.tokenize.encoders.gigatoken import GigatokenEncoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.probe import ProbeResult, cached_probe, compare_encoders
from sftprep.tokenize.loading.adversarial_texts import adversarial_texts
from sftprep.tokenize.select import make_encoder, probe_encoder
from tests.support import needs_shared
from tests.tokenize.real_tokenizers import (
    ONLY_FASTOKENS,
    REAL_PAIRS,
    SLOW,
    real_fast,
    real_reference,
    real_spec,
)
from tests.tokenize.small_tokenizers import byte_level, sentence_piece, spec_of

WHOLE_WORDS = byte_level(added=(AddedToken("zq", single_word=True, normalized=False),))
"""gigatoken 0.10 matches such a token inside words too: a real difference."""
WHITESPACE_TWICE = byte_level(
    added=(AddedToken("<m>", rstrip=True, normalized=False), AddedToken("  ", normalized=False))
)
"""Two added tokens match the same whitespace: another real difference."""


class FaultyEncoder:
    """A fast encoder that is right except for one fault."""

    name, version = "gigatoken", "faulty"

    def __init__(self, truth: HfEncoder, fault: str) -> None:
        self.truth, self.fault = truth, fault

    def encode(self, texts: Sequence[str]) -> Tokens:
        tokens = self.truth.encode(texts)
        for number, text in enumerate(texts):
            if self.fault == "ids" and "fox" in text:
                tokens.ids_of_text(number)[-1] ^= 1
            if self.fault == "fault" and "fox" in text:
                raise EncoderFault("gigatoken broke down")
        return tokens

    def token_chars(self, texts: Sequence[str], tokens: Tokens) -> NDArray[np.int64]:
        chars = self.truth.token_chars(texts, self.truth.encode(texts))
        if self.fault == "chars":
            chars[-1, 0] += 1
        return chars

    def encode_with_chars(self, texts: Sequence[str]) -> tuple[Tokens, NDArray[np.int64]]:
        tokens = self.encode(texts)
        return tokens, self.token_chars(texts, tokens)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("ids", "other ids"),
        ("chars", "other characters"),
        ("fault", "broke down"),
        ("nothing", "equal"),
    ],
)
def test_every_fault_is_found(fault: str, reason: str) -> None:
    spec = spec_of(byte_level())
    truth = HfEncoder(spec, threads=False)
    result = compare_encoders(FaultyEncoder(truth, fault), truth, adversarial_texts(spec))
    assert reason in result.reason
    assert result.equal == (fault == "nothing")
    assert result.encoder == ("gigatoken" if result.equal else "tokenizers")
    assert result.checked == len(adversarial_texts(spec))
    if fault == "ids":
        assert result.example is not None
        assert "fox" in result.example.text
        assert result.example.expected[0] == result.example.got[0] ^ 1


@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [(WHOLE_WORDS, "zq"), (WHITESPACE_TWICE, "<m>")],
    ids=["words", "whitespace"],
)
def test_tokenizers_is_selected_if_the_fast_encoders_differ(
    tokenizer: Tokenizer, token: str, tmp_path: Path
) -> None:
    spec = spec_of(tokenizer)
    encoder, result = make_encoder(spec, "auto", threads=False, cache_folder=tmp_path)
    assert isinstance(encoder, HfEncoder)
    assert (result.encoder, result.equal) == ("tokenizers", False)
    assert [refusal.encoder for refusal in result.refused] == ["gigatoken", "fastokens"]
    example = result.refused[0].example
    assert example is not None
    assert token in example.text
    assert probe_encoder(spec, "auto", cache_folder=tmp_path) == ("tokenizers", result.to_dict())
    with pytest.raises(
        TokenizerError, match="gigatoken cannot be used for made: it gives other ids"
    ) as caught:
        make_encoder(spec, "gigatoken", threads=False, cache_folder=tmp_path)
    assert "encoder=" in caught.value.remedy
    assert ProbeResult.from_dict(result.to_dict()) == result


def test_fastokens_is_selected_if_gigatoken_does_not_load_the_tokenizer(tmp_path: Path) -> None:
    spec = spec_of(byte_level(every_byte=False))
    for choice in ("auto", "fastokens"):
        encoder, result = make_encoder(spec, choice, threads=False, cache_folder=tmp_path)  # type: ignore[arg-type]
        assert isinstance(encoder, FastokensEncoder)
        assert (result.encoder, result.equal, result.reason) == ("fastokens", True, "equal")
    missing = len(spec.missing_bytes)
    result = make_encoder(spec, "auto", threads=False, cache_folder=tmp_path)[1]
    (refusal,) = result.to_dict()["refused"]
    assert refusal == {
        "encoder": "gigatoken",
        "reason": "it needs a token for each of the 256 bytes, and the vocabulary lacks"
        f" {missing} of them",
        "example": None,
    }
    assert ProbeResult.from_dict(result.to_dict()) == result


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (WHOLE_WORDS, "it does not support added tokens that match only as whole words"),
        (
            byte_level(nfc=True, added=(AddedToken("\u00e9x", normalized=True),)),
            "it does not support added tokens that match only normalized text",
        ),
        (
            Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
            "it encodes only with BPE, and this tokenizer is of the kind Unigram",
        ),
    ],
    ids=["words", "normalized", "unigram"],
)
def test_a_tokenizer_that_fastokens_does_not_support_is_refused(
    tokenizer: Tokenizer, reason: str, tmp_path: Path
) -> None:
    assert cached_probe("fastokens", spec_of(tokenizer), (), tmp_path).reason == reason


def test_a_step_that_a_library_does_not_know_is_named() -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    message = EncoderFault("it cannot load this tokenizer: unsupported normalizer type: Lowercase")
    assert explain_refusal(spec_of(tokenizer), message).reason == (
        "it does not support the normalizer of this tokenizer (Lowercase)"
    )


def test_an_encoder_that_is_not_installed_is_not_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sftprep.tokenize.select.version_of", lambda name: "1" if name == "tokenizers" else ""
    )
    spec = spec_of(byte_level())
    encoder, result = make_encoder(spec, "auto", threads=False, cache_folder=tmp_path)
    assert isinstance(encoder, HfEncoder)
    assert [str(refusal) for refusal in result.refused] == [
        "gigatoken: it is not installed (pip install gigatoken)",
        "fastokens: it is not installed (pip install fastokens)",
    ]
    with pytest.raises(MissingDependency, match="encoder fastokens needs the package") as caught:
        make_encoder(spec, "fastokens", threads=False, cache_folder=tmp_path)
    assert caught.value.remedy == "pip install fastokens"


@pytest.mark.parametrize("choice", ["auto", "gigatoken"])
def test_gigatoken_is_selected_if_it_does_not_differ(choice: str, tmp_path: Path) -> None:
    for tokenizer in (byte_level(nfc=True, gpt4=True), sentence_piece(prepend=True)):
        spec = spec_of(tokenizer)
        encoder, result = make_encoder(spec, choice, threads=False, cache_folder=tmp_path)  # type: ignore[arg-type]
        assert isinstance(encoder, GigatokenEncoder)
        assert (result.encoder, result.equal, result.reason, result.example) == (
            "gigatoken",
            True,
            "equal",
            None,
        )
        assert result.checked == len(adversarial_texts(spec))


def test_tokenizers_is_selected_on_request(tmp_path: Path) -> None:
    encoder, result = make_encoder(
        spec_of(byte_level()), "tokenizers", threads=False, cache_folder=tmp_path
    )
    assert (encoder.name, encoder.version) == (result.encoder, result.encoder_version)
    assert isinstance(encoder, HfEncoder)
    assert list(tmp_path.iterdir()) == []


def test_gigatoken_is_not_selected_if_special_tokens_are_split(tmp_path: Path) -> None:
    result = cached_probe(
        "gigatoken", spec_of(byte_level(), split_special_tokens=True), (), tmp_path
    )
    assert (result.encoder, result.checked) == ("tokenizers", 0)
    assert "special tokens" in result.reason


def test_an_answer_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(byte_level())
    first = cached_probe("gigatoken", spec, (), tmp_path)
    with_samples = cached_probe("gigatoken", spec, ("one", "two \ud800"[:4]), tmp_path)
    assert with_samples.checked == first.checked + 2

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compared again")

    monkeypatch.setattr("sftprep.tokenize.equivalence.probe.compare_encoders", refuse)
    monkeypatch.setattr("sftprep.tokenize.equivalence.probe.HfEncoder", refuse)
    assert cached_probe("gigatoken", spec, (), tmp_path) == with_samples
    assert cached_probe("gigatoken", spec, ("one", "two \ud800"[:4]), tmp_path) == with_samples
    with pytest.raises(AssertionError, match="compared again"):
        cached_probe("gigatoken", spec, ("one",), tmp_path)
    (entry,) = (tmp_path / "probes").iterdir()
    entry.write_bytes(entry.read_bytes()[:-3])
    with pytest.raises(AssertionError, match="compared again"):
        cached_probe("gigatoken", spec, (), tmp_path)


def test_a_difference_on_samples_is_cached_for_later_calls(tmp_path: Path) -> None:
    """The cached answer of the fixed texts is changed to "equal", as if they had not shown the
    difference."""
    spec = spec_of(WHOLE_WORDS)
    cached_probe("gigatoken", spec, (), tmp_path)
    (entry,) = (tmp_path / "probes").iterdir()
    found = read_entry(entry)
    assert found is not None
    write_entry(
        entry,
        {
            "result": {
                **found[0]["result"],
                "equal": True,
                "encoder": "gigatoken",
                "example": None,
            },
            "samples": [],
        },
    )
    assert cached_probe("gigatoken", spec, (), tmp_path).equal
    assert cached_probe("gigatoken", spec, ("harmless",), tmp_path).equal
    shown = cached_probe("gigatoken", spec, ("harmless", "azqb"), tmp_path)
    assert not shown.equal
    assert shown.example is not None
    assert shown.example.text == "azqb"
    assert cached_probe("gigatoken", spec, (), tmp_path) == shown


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "probes").write_text("in the way")
    spec = spec_of(byte_level())
    assert make_encoder(spec, "auto", threads=False, cache_folder=tmp_path)[1].equal


@needs_shared
@pytest.mark.parametrize(("encoder", "name"), REAL_PAIRS)
def test_fast_encoders_equal_the_reference_on_real_tokenizers(encoder: str, name: str) -> None:
    result = compare_encoders(
        real_fast(encoder, name), real_reference(name), adversarial_texts(real_spec(name))
    )
    assert result.equal, result


@needs_shared
@pytest.mark.parametrize("name", [*ONLY_FASTOKENS, *SLOW])
def test_the_first_encoder_that_loads_a_real_tokenizer_is_selected(
    name: str, tmp_path: Path
) -> None:
    encoder, result = make_encoder(real_spec(name), "auto", threads=False, cache_folder=tmp_path)
    expected = "tokenizers" if name in SLOW else "fastokens"
    assert encoder.name == result.encoder == expected
    assert result.refused[0].encoder == "gigatoken"
    assert result.refused[0].reason.startswith(("it needs", "it does not support", "it encodes"))


def test_the_first_difference_is_shown() -> None:
    def tokens(*ids: Sequence[int]) -> Tokens:
        flat = np.array([i for one in ids for i in one], np.int32)
        return Tokens(flat, np.cumsum([0, *map(len, ids)]).astype(np.int64))

    texts = ["same", "long " * 100]
    same = tokens([1, 2], range(100))
    assert first_mismatch(texts, same, same) is None
    other = tokens([1, 2], [*range(50), 7, *range(51, 100)])
    shown = first_mismatch(texts, same, other)
    assert shown is not None
    assert (shown.token, shown.expected, shown.got) == (
        50,
        tuple(range(50, 58)),
        (7, *range(51, 58)),
    )
    assert len(shown.text) == 200
    assert shown.text in texts[1]
    shorter = first_mismatch(texts, same, tokens([1], range(100)))
    assert shorter == Mismatch("same", 1, (2,), ())
    assert Mismatch.from_dict(shorter.to_dict()) == shorter

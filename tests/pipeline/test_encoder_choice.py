"""A build uses the fastest encoder that is right, and reports why it is not a faster one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sftprep import BuildConfig, build, read_manifest
from sftprep.report.summary import summary_data, summary_lines
from sftprep.tokenize.encoders.base import EncoderFault, Tokens
from sftprep.tokenize.encoders.fastokens import FastokensEncoder
from sftprep.tokenize.loading.load import load_tokenizer
from sftprep.tokenize.select import probe_encoder
from tests.conftest import EXAMPLES
from tests.tokenize.small_tokenizers import byte_level, save

CHATS = EXAMPLES / "data" / "chats.jsonl"
REASON = "gigatoken: it needs a token for each of the 256 bytes, and the vocabulary lacks"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tokenizer that lacks bytes, which gigatoken does not load."""
    return save(byte_level(every_byte=False), tmp_path_factory.mktemp("tokenizer"))


def config(tokenizer: Path, output: Path, **settings: object) -> BuildConfig:
    return BuildConfig.of(
        **{
            "inputs": str(CHATS),
            "tokenizer": str(tokenizer),
            "output": str(output),
            "max_length": 512,
            "train_on": "assistant",
            "workers": 1,
            **settings,
        }
    )


def test_the_encoder_does_not_change_the_bytes_and_is_reported(
    tokenizer: Path, tmp_path: Path
) -> None:
    slow = build(config(tokenizer, tmp_path / "slow", encoder="tokenizers"))
    assert not any(line.startswith("encoder ") for line in summary_lines(slow))
    for output, workers in (("one", 1), ("two", 2)):
        report = build(config(tokenizer, tmp_path / output, workers=workers))
        assert report.manifest.data_digest == slow.manifest.data_digest
        assert report.manifest.accounting == slow.manifest.accounting
        (line,) = [line for line in summary_lines(report) if line.startswith("encoder ")]
        assert line.startswith(f"encoder fastokens ({REASON}")
    stored = read_manifest(tmp_path / "two").encoder
    assert (stored["encoder"], stored["equal"]) == ("fastokens", True)
    assert [refusal["encoder"] for refusal in stored["refused"]] == ["gigatoken"]
    assert summary_data(report)["encoder"] == stored


@pytest.mark.parametrize("is_wrong", [True, False], ids=["wrong", "failing"])
def test_a_partition_is_encoded_again_if_fastokens_is_wrong_or_fails(
    is_wrong: bool, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = build(config(tokenizer, tmp_path / "right", encoder="tokenizers"))
    probe_encoder(load_tokenizer(str(tokenizer)), "auto")  # with the right encoder, and cached
    encode_batch = FastokensEncoder._encode_batch

    def encode_wrongly(encoder: FastokensEncoder, texts: list[str]) -> Tokens:
        if not is_wrong:
            raise EncoderFault("it cannot encode these texts: a limit was reached")
        tokens = encode_batch(encoder, texts)
        return Tokens(np.where(tokens.input_ids > 250, 250, tokens.input_ids), tokens.offsets)

    monkeypatch.setattr(FastokensEncoder, "_encode_batch", encode_wrongly)
    report = build(config(tokenizer, tmp_path / "wrong"))
    assert report.manifest.encoder["encoder"] == "fastokens"
    assert report.manifest.data_digest == right.manifest.data_digest
    assert report.manifest.accounting.warnings["encoder_failed_over"] == 1

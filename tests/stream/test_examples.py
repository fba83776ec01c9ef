"""The examples of streaming run, on a tiny model."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import EXAMPLES

FOLDER = EXAMPLES / "stream"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("demo") / "model"
    module = runpy.run_path(str(EXAMPLES / "tiny_model.py"))
    tokenizer = module["train_tokenizer"](EXAMPLES / "data")
    tokenizer.save_pretrained(folder)
    # Smaller than that of the examples, which takes most of the time.
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def main_of(name: str):
    return runpy.run_path(str(FOLDER / name))["main"]


def test_every_example_is_tested():
    assert {path.name for path in FOLDER.glob("*.py")} == {
        "plain_loop.py",
        "with_trl.py",
        "with_datasets.py",
    }


def test_plain_loop(model, tmp_path):
    losses = main_of("plain_loop.py")(model, str(EXAMPLES / "data" / "chats.jsonl"))
    assert len(losses) == 4
    assert all(0 < loss < 20 for loss in losses)
    assert Path(model, "stream.json").is_file()


@pytest.mark.parity
def test_with_trl(model, tmp_path):
    pytest.importorskip("trl")
    assert (
        0 < main_of("with_trl.py")(model, str(EXAMPLES / "data" / "qa.jsonl"), str(tmp_path)) < 20
    )


def test_with_datasets(model, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    assert len(main_of("with_datasets.py")(model, str(EXAMPLES / "data"))) == 3

"""Fixtures that several rooms use: a tokenizer made on the spot, and small files of records."""

from __future__ import annotations

import gc
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import hypothesis
import pytest

from tests.support import thorough

# Tests neither look at a user's cache nor leave anything in it, and fetch nothing.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# One thread for tiny models: more would only wait for each other, and for other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Property tests without a number of their own; 100 is the default of hypothesis.
hypothesis.settings.register_profile("short", max_examples=thorough(100, default=50))
hypothesis.settings.load_profile("short")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def pytest_collection_finish() -> None:
    """Exclude imported libraries from garbage collection.

    A full collection walks the million objects of torch, transformers and TRL in half a second, and
    accelerate collects at the end of each run of a trainer.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SFTPREP_CACHE"] = str(tmp_path_factory.getbasetemp().parent / "sftprep-cache")


@pytest.fixture(scope="session", autouse=True)
def _forked_tokenizer_loader() -> Iterator[None]:
    """Fork the child that loads a new tokenizer, which would take three seconds for its imports."""
    from sftprep.tokenize.loading import load
    from tests.preloaded_python import run_python

    def run(command: list[str], *, cwd: Path, env: dict[str, str], **_: object) -> Any:
        return run_python(*command[1:], cwd=cwd, env=env)

    forking = SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL, PIPE=subprocess.PIPE)
    with patch.object(load, "subprocess", forking):
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waits_for_the_disk() -> Iterator[None]:
    """Skip fsync, which only matters after a power failure and takes most of a small build."""
    with patch.object(os, "fsync", lambda _descriptor: None):
        yield


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 600 tokens with ChatML markers, and a chat template that marks
    assistant turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (EXAMPLES / "data" / "chats.jsonl").read_text(encoding="utf-8").split("\n")[:60], trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(
        (EXAMPLES / "chatml.jinja").read_text(encoding="utf-8"), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="session")
def base_tokenizer_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer without ChatML markers and without a template, as of a base model."""
    folder = tmp_path_factory.mktemp("base-tokenizer")
    tokenizer = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] == 0]
    vocabulary = tokenizer["model"]["vocab"]
    for marker in ("<|im_start|>", "<|im_end|>"):
        number = vocabulary.pop(marker)
        vocabulary[f"<{number}>"] = number
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def records(tmp_path: Path) -> Callable[..., str]:
    """Writes records as JSON lines and returns the path."""

    def write(rows: list[Any], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        return str(path)

    return write


@pytest.fixture
def folder_with(tokenizer_dir: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A folder with the tokenizer made on the spot and the chat template given."""

    def make(template: str) -> Path:
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tokenizer_dir / name).read_bytes())
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return folder

    return make

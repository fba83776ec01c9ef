"""Real files with real tokenizers: everything is packed or counted, and what is trained is what
should be."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from sftprep import BuildConfig, build, open_shards, verify
from tests.support import SHARED, needs_shared

pytestmark = needs_shared

QWEN3, SMOLLM2, MISTRAL, GPT2, TINY = "qwen3", "smollm2", "mistral-v3", "gpt2", "tiny-chatml-4k"


def cut(name: str, folder: Path, lines: int) -> str:
    path = folder / name
    with open(SHARED / "datasets" / name, encoding="utf-8") as source:
        path.write_text("".join(islice(source, lines)), encoding="utf-8")
    return str(path)


def run(name: str, tokenizer: str, folder: Path, lines: int = 120, **settings):
    settings = {"max_length": 1024, **settings}
    inputs = cut(name, folder, lines)
    return build(
        BuildConfig.of(
            inputs=inputs,
            tokenizer=str(SHARED / "tokenizers" / tokenizer),
            output=str(folder / "out"),
            **settings,
        )
    )


def first_trained(folder: Path, tokenizer: str) -> tuple[str, str]:
    """Text of the sequence of the first record, and of its trained tokens."""
    backend = Tokenizer.from_file(str(SHARED / "tokenizers" / tokenizer / "tokenizer.json"))
    for pack in open_shards(folder):
        at = 0
        for length, origin in zip(pack.seq_lengths.tolist(), pack.origin.tolist(), strict=True):
            if origin == 0:
                ids, mask = pack.input_ids[at : at + length], pack.completion_mask[at : at + length]
                return (
                    backend.decode(ids.tolist(), skip_special_tokens=False),
                    backend.decode(ids[mask].tolist(), skip_special_tokens=False),
                )
            at += length
    raise AssertionError("the first record is in no pack")


@pytest.mark.parametrize("tokenizer", [QWEN3, SMOLLM2, MISTRAL, GPT2, TINY])
def test_gsm8k_with_renamed_keys(tokenizer, tmp_path):
    report = run("gsm8k_train.jsonl", tokenizer, tmp_path, map="question=prompt,answer=completion")
    accounts = report.manifest.accounting
    assert (accounts.records, accounts.sequences) == (120, 120)
    assert report.manifest.plan["fill"] > 0.9
    assert verify(report.folder).ok
    text, trained = first_trained(report.folder, tokenizer)
    assert text.removeprefix("<s>").lstrip().startswith("Natalia sold clips")
    assert trained.startswith("Natalia sold 48/2")
    assert trained.endswith({MISTRAL: "</s>", GPT2: "<|endoftext|>"}.get(tokenizer, "<|im_end|>"))


@pytest.mark.parametrize("tokenizer", [QWEN3, SMOLLM2, MISTRAL, TINY])
def test_chitchat_messages(tokenizer, tmp_path):
    report = run("chitchat_600_messages.jsonl", tokenizer, tmp_path)
    assert report.manifest.accounting.sequences == 120
    assert (
        report.manifest.tokens
        == report.manifest.accounting.tokens_in - report.manifest.accounting.tokens_truncated
    )
    assert verify(report.folder).ok


@pytest.mark.parametrize("tokenizer", [QWEN3, SMOLLM2, TINY])
def test_glaive_conversations_with_tools(tokenizer, tmp_path):
    report = run("glaive_toolcall_en_demo.jsonl", tokenizer, tmp_path, max_length=4096)
    assert report.manifest.inputs[0].format == "sharegpt"
    assert report.manifest.accounting.sequences == 120
    text, _ = first_trained(report.folder, tokenizer)
    assert "search_recipes" in text
    assert "chicken" in text


@pytest.mark.parametrize("tokenizer", [QWEN3, SMOLLM2, MISTRAL, GPT2, TINY])
def test_alpaca_trains_the_output(tokenizer, tmp_path):
    report = run("alpaca_en_demo.jsonl", tokenizer, tmp_path)
    assert report.manifest.accounting.sequences == 120
    text, trained = first_trained(report.folder, tokenizer)
    assert "Describe a process of making crepes." in text
    assert "Describe a process of making crepes." not in trained
    assert "Making crepes is an easy and delicious process!" in trained
    assert ("### Instruction" in text) == (tokenizer == GPT2)


@pytest.mark.parametrize("tokenizer", [QWEN3, GPT2])
def test_code(tokenizer, tmp_path):
    report = run("humaneval.jsonl", tokenizer, tmp_path, map="canonical_solution=completion")
    assert report.manifest.accounting.sequences == 120
    _, trained = first_trained(report.folder, tokenizer)
    assert "for idx, elem in enumerate(numbers):" in trained

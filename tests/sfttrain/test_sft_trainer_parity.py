"""The same script trains on the same tokens and labels with TRL and with sfttrain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.sfttrain.trainer_factory import (
    CHATS,
    COMPLETIONS,
    QUESTIONS,
    TEXTS,
    make_sft_trainer,
    sequences,
)

trl = pytest.importorskip("trl", reason="compares with TRL")


def question(example: Any) -> str:
    return f"### {example['question']} ### {example['answer']}"


CHAT_COMPLETIONS = [
    {"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in CHATS
]
SHAREGPT = [
    {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]}
    for row in CHATS
]
TOKENS = [
    {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, -100, 9, 10]},
    {"input_ids": [5, 6], "labels": [-100, 6]},
]
MASKED = [
    {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1]},
    {"input_ids": [9, 10], "completion_mask": [0, 1]},
]

CASES: dict[str, tuple[list[Any], dict[str, Any], Any]] = {
    "text": (TEXTS, {}, None),
    "text, another field": (
        [{"body": row["text"]} for row in TEXTS],
        {"dataset_text_field": "body"},
        None,
    ),
    "text, cut": (TEXTS, {"max_length": 5}, None),
    "text, cut at its start": (TEXTS, {"max_length": 5, "truncation_mode": "keep_end"}, None),
    "text, not cut": ([{"text": "word " * 1200}], {"max_length": None}, None),
    "another end": (TEXTS, {"eos_token": "<|endoftext|>"}, None),
    "completions": (COMPLETIONS, {}, None),
    "completions, told": (COMPLETIONS, {"completion_only_loss": True}, None),
    "completions, all trained": (COMPLETIONS, {"completion_only_loss": False}, None),
    "completions, cut": (COMPLETIONS, {"max_length": 12}, None),
    "chats": (CHATS, {}, None),
    "chats, assistant": (CHATS, {"assistant_only_loss": True}, None),
    "chats, sharegpt": (SHAREGPT, {}, None),
    "chats, completions": (CHAT_COMPLETIONS, {}, None),
    "chats, completions, all trained": (CHAT_COMPLETIONS, {"completion_only_loss": False}, None),
    "chats, completions, assistant": (CHAT_COMPLETIONS, {"assistant_only_loss": True}, None),
    "formatted": (QUESTIONS, {}, question),
    "tokens": (TOKENS, {}, None),
    "tokens, cut": (TOKENS, {"max_length": 4}, None),
    "tokens, masked": (MASKED, {"completion_only_loss": True}, None),
    "text, packed": (TEXTS, {"packing": True, "max_length": 24}, None),
    "text, packed and split": (
        TEXTS,
        {"packing": True, "max_length": 6, "packing_strategy": "bfd_split"},
        None,
    ),
    "chats, packed": (
        CHATS,
        {"packing": True, "max_length": 64, "assistant_only_loss": True},
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_tokens_and_labels(case: str, model: Path, tmp_path: Path) -> None:
    rows, settings, formatting = CASES[case]
    options = {"formatting_func": formatting} if formatting else {}
    ours = make_sft_trainer(model, tmp_path, Dataset.from_list(rows), options=options, **settings)
    theirs = trl.SFTTrainer(
        str(model),
        args=trl.SFTConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, **settings),
        train_dataset=Dataset.from_list(rows),
        **options,
    )
    assert sequences(ours.train_dataset) == sorted(their_sequences(theirs.train_dataset))
    if settings.get("packing"):
        fill = [sum(row) for row in theirs.train_dataset["seq_lengths"]]
        assert len(ours.train_dataset) <= len(fill)


def their_sequences(dataset: Any) -> list[tuple[list[int], list[bool]]]:
    """Return the ids and trained positions of the sequences in TRL's rows with trained tokens.

    When it packs, TRL keeps the sequences without trained tokens as well (B1).
    """
    found = []
    for row in dataset:
        begin = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            marks = [label != -100 for label in row["labels"][begin : begin + length]]
            if any(marks[1:]):
                found.append((row["input_ids"][begin : begin + length], marks))
            begin += length
    return found

"""Shared helpers for tests of SFTTrainer: a tiny model with a tokenizer, datasets, and trainers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sfttrain import SFTConfig, SFTTrainer
from tests.sfttrain.tiny import tiny_model

TEXTS = [
    {"text": f"The {thing} is {colour}."}
    for thing in ("sky", "sea", "old house", "road")
    for colour in ("blue", "grey and wide")
]
QUESTIONS = [
    {"question": f"What is {a} plus {b}?", "answer": f"{a + b}."}
    for a in range(2)
    for b in range(3)
]
COMPLETIONS = [{"prompt": row["question"], "completion": " " + row["answer"]} for row in QUESTIONS]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    }
    for row in QUESTIONS
]


def model_folder(folder: Path, tokenizer_dir: Path, kind: str = "llama") -> Path:
    """Save a model with a vocabulary of 600 tokens and its tokenizer to a folder."""
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    tiny_model(
        kind, vocab_size=600, pad_token_id=0, eos_token_id=2, max_position_embeddings=4096
    ).save_pretrained(folder)
    return folder


def make_sft_trainer(
    model: Any, folder: Path, data: Any, *, options: dict[str, Any] | None = None, **settings: Any
) -> SFTTrainer:
    """Create a trainer as a TRL script does.

    Args:
        model: The model, or the folder of one.
        folder: The parent of the output folder and of the cache.
        data: The train_dataset.
        options: Other arguments of the trainer.
        settings: The settings of its SFTConfig, in addition to those of a short run.
    """
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "dataset_cache_dir": str(folder / "prepared"),
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    name = str(model) if isinstance(model, Path) else model
    return SFTTrainer(
        name, SFTConfig(**{**defaults, **settings}), train_dataset=data, **(options or {})
    )


def sequences(source: Any) -> list[tuple[list[int], list[bool]]]:
    """Return the ids and the trained positions of every sequence in the packs, sorted."""
    found = []
    for pack in source:
        begin = 0
        for length in pack.seq_lengths.tolist():
            found.append(
                (
                    pack.input_ids[begin : begin + length].tolist(),
                    pack.completion_mask[begin : begin + length].tolist(),
                )
            )
            begin += length
    return sorted(found)


def losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)

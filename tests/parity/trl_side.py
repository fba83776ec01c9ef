"""TRL's own preparation of a dataset, row by row, for comparison."""

from __future__ import annotations

import contextlib
import io
import warnings
from functools import cache
from pathlib import Path
from typing import Any

Sequence = tuple[tuple[int, ...], tuple[bool, ...]]
"""Ids, and which of them are trained."""


@cache
def tokenizer_of(folder: Path) -> Any:
    """A tokenizer as people load it; loading takes seconds for a large one."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@cache
def stand_in(vocab_size: int) -> Any:
    """A model of one layer: TRL asks it for nothing but its presence."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )


def trl_dataset(
    rows: list[dict[str, Any]],
    folder: Path,
    output: Path,
    *,
    template: str | None = None,
    formatting: Any = None,
    **settings: Any,
) -> Any:
    """What TRL's SFTTrainer trains on: its prepared train_dataset.

    settings: fields of SFTConfig; template: another chat template; formatting: a formatting
    function.
    """
    import datasets
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_of(folder)
    own = tokenizer.chat_template
    tokenizer.chat_template = template or own
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            arguments = SFTConfig(
                output_dir=str(output),
                report_to="none",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                **settings,
            )
            trainer = SFTTrainer(
                stand_in(len(tokenizer)),
                args=arguments,
                train_dataset=datasets.Dataset.from_list(rows, on_mixed_types="use_json"),
                processing_class=tokenizer,
                formatting_func=formatting,
            )
    finally:
        tokenizer.chat_template = own
    return trainer.train_dataset


def trl_sequences(
    rows: list[dict[str, Any]], folder: Path, output: Path, **settings: Any
) -> list[Sequence]:
    """Ids and trained positions of each row that TRL prepares."""
    return [
        (
            tuple(row["input_ids"]),
            tuple(label != -100 for label in row.get("labels", row["input_ids"])),
        )
        for row in trl_dataset(rows, folder, output, **settings)
    ]


def trl_packed_sequences(
    rows: list[dict[str, Any]], folder: Path, output: Path, **settings: Any
) -> list[Sequence]:
    """Ids and trained positions of each sequence in the packs that TRL makes."""
    found: list[Sequence] = []
    for row in trl_dataset(rows, folder, output, packing=True, **settings):
        at = 0
        for length in row["seq_lengths"]:
            ids, labels = row["input_ids"][at : at + length], row["labels"][at : at + length]
            found.append((tuple(ids), tuple(label != -100 for label in labels)))
            at += length
    return found

"""TRL's own preparation of a dataset, row by row, for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Sequence = tuple[tuple[int, ...], tuple[bool, ...]]
"""Ids, and which of them are trained."""


def trl_sequences(rows: list[dict[str, Any]], tokenizer_dir: Path, output: Path, **settings: Any) -> list[Sequence]:
    """What TRL's SFTTrainer trains on: its prepared train_dataset, ids and labels that are not -100.

    settings: fields of SFTConfig. The model is a stand-in of one layer: TRL asks it for nothing but its presence.
    """
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
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
        LlamaForCausalLM(config),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows, on_mixed_types="use_json"),
        processing_class=tokenizer,
    )
    return [
        (tuple(row["input_ids"]), tuple(label != -100 for label in row.get("labels", row["input_ids"])))
        for row in trainer.train_dataset
    ]

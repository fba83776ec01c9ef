"""What a user writes in another tool to train on an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScriptFacts:
    """What the lines depend on.

    Attributes:
        path: The folder of the export.
        max_length: The most tokens of a row.
        has_validation: Whether the export has the split `validation`.
        tokenizer: The folder of the tokenizer, if the build added tokens to it; else "".
    """

    path: str
    max_length: int
    has_validation: bool
    tokenizer: str = ""


def script_for(target: str, facts: ScriptFacts) -> str:
    """Return the lines for a tool: Python, or YAML for axolotl."""
    script = _SCRIPTS[target](facts).rstrip("\n")
    if not facts.tokenizer:
        return script
    return (
        f"# The build added tokens to the tokenizer, which is in {facts.tokenizer}.\n"
        "# The embedding of the model must have a row for each of them:\n"
        "# model.resize_token_embeddings(len(tokenizer))\n"
        f"{script}"
    )


def _trl(facts: ScriptFacts) -> str:
    evaluation = ', eval_dataset=data["validation"]' if facts.has_validation else ""
    return f"""\
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

data = load_dataset({facts.path!r})
args = SFTConfig(
    output_dir="model",
    packing=False,  # the rows are packs already: True would drop seq_lengths and cut them again
    padding_free=True,  # with seq_lengths, sequences of a pack do not attend to each other
    max_length=None,  # required with padding_free; no row has more than {facts.max_length} tokens
    dataset_kwargs={{"skip_prepare_dataset": True}},  # the rows have ids and labels
    model_init_kwargs={{"attn_implementation": "flash_attention_2"}},
)
trainer = SFTTrainer("MODEL", args=args, train_dataset=data["train"]{evaluation})
trainer.train()
"""


def _hf(facts: ScriptFacts) -> str:
    evaluation = ', eval_dataset=data["validation"]' if facts.has_validation else ""
    return f"""\
from datasets import load_dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

data = load_dataset({facts.path!r})
args = TrainingArguments(
    output_dir="model",
    per_device_train_batch_size=1,  # a row is a pack, and rows have different lengths
    per_device_eval_batch_size=1,
    gradient_accumulation_steps=8,
)
# Sequences are kept apart by position_ids. Trainer does not use the column loss_weights.
model = AutoModelForCausalLM.from_pretrained("MODEL", attn_implementation="flash_attention_2")
trainer = Trainer(model, args, train_dataset=data["train"]{evaluation})
trainer.train()
"""


def _megatron_bridge(facts: ScriptFacts) -> str:
    validation = (
        f"        packed_val_data_path={facts.path + '/validation'!r},\n"
        if facts.has_validation
        else ""
    )
    return f"""\
from megatron.bridge.data.builders import GPTSFTDatasetConfig
from megatron.bridge.data.packing import PackedSequenceSpecs

dataset = GPTSFTDatasetConfig(
    dataset_root={facts.path!r},
    seq_length={facts.max_length},
    enable_offline_packing=True,
    offline_packing_specs=PackedSequenceSpecs(
        packed_sequence_size={facts.max_length},
        packed_train_data_path={facts.path + "/train"!r},
{validation}    ),
    do_validation={facts.has_validation},
    do_test=False,
)
# In the configuration of the training: micro_batch_size=1, as packed sequences require.
"""


def _mds(facts: ScriptFacts) -> str:
    return f"""\
import numpy as np
import torch
from streaming import StreamingDataLoader, StreamingDataset


def collate(packs):  # one row without padding; positions restart in each sequence
    lengths = np.concatenate([pack["seq_lengths"] for pack in packs])
    columns = {{
        "input_ids": np.concatenate([pack["input_ids"] for pack in packs]),
        "labels": np.concatenate([pack["labels"] for pack in packs]),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
    }}
    return {{name: torch.from_numpy(values).long()[None] for name, values in columns.items()}}


# Instead of local, remote="s3://..." reads an uploaded copy. The column loss_weights has the weight
# of each token in the loss, and collate ignores it.
data = StreamingDataset(local={facts.path + "/train"!r}, batch_size=1, shuffle=True)
loader = StreamingDataLoader(data, batch_size=1, collate_fn=collate)
"""


def _axolotl(facts: ScriptFacts) -> str:
    path = json.dumps(facts.path, ensure_ascii=False)  # also a string of YAML
    validation = (
        f"test_datasets:\n  - path: {path}\n    split: validation\n    type:\n"
        if facts.has_validation
        else ""
    )
    return f"""\
datasets:
  - path: {path}
    split: train
    type:  # empty: the rows are tokenized
{validation}sequence_len: {facts.max_length}  # rows with more tokens would be dropped
sample_packing: true  # the rows are sequences, which axolotl packs
"""


_SCRIPTS: dict[str, Callable[[ScriptFacts], str]] = {
    "trl": _trl,
    "hf": _hf,
    "megatron-bridge": _megatron_bridge,
    "mds": _mds,
    "axolotl": _axolotl,
}

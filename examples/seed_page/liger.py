"""Liger's kernels in the layers of the model. They need a GPU with Triton; elsewhere the setting is
refused."""

import torch
from datasets import load_dataset

from sfttrain import SFTConfig, SFTTrainer

try:
    training_args = SFTConfig(use_liger_kernel=True)
except Exception as error:
    if torch.cuda.is_available() and "liger-kernel" not in str(error):
        raise
    print(f"refused, as it should be: {error}")
else:
    dataset = load_dataset("json", data_files="examples/data/chats.jsonl", split="train")
    SFTTrainer("demo/Qwen2.5-0.5B", train_dataset=dataset, args=training_args).train()

"""Several processes: torchrun --nproc_per_node 2 examples/seed_page/multi_gpu.py, or accelerate
launch."""

import os
import sys

import torch
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from sfttrain import SFTConfig, SFTTrainer

on_gpu = torch.cuda.is_available()
dataset = load_dataset("json", data_files="examples/seed_page/reviews.jsonl", split="train")

training_args = SFTConfig(
    output_dir="demo/out",
    use_cpu=not on_gpu,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    num_train_epochs=1,
    per_device_train_batch_size=4,
    logging_steps=1,
)
device_string = PartialState().process_index
model = AutoModelForCausalLM.from_pretrained(
    "demo/opt-350m",
    device_map={"": device_string} if on_gpu else None,
)
trainer = SFTTrainer(model, args=training_args, train_dataset=dataset)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"rank {training_args.process_index} of {training_args.world_size}: losses {losses}")

sys.stdout.flush()
if training_args.world_size > 1:
    # Taking gloo's process group down while its threads still hold tensors may hang (torch 2.13).
    os._exit(0)

"""Noise on the embeddings while training, and none after it."""

import torch
from datasets import load_dataset

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/seed_page/reviews.jsonl", split="train")

training_args = SFTConfig(
    neftune_noise_alpha=5,
)
trainer = SFTTrainer(
    "demo/opt-350m",
    train_dataset=dataset,
    args=training_args,
)
trainer.train()

embedding = trainer.model.train().get_input_embeddings()
tokens = torch.arange(8)[None]
assert torch.equal(embedding(tokens), embedding(tokens)), "the noise is still on"

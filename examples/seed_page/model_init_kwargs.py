"""Arguments of from_pretrained, such as another precision."""

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/seed_page/reviews.jsonl", split="train")

# As this does it outside the trainer:
model = AutoModelForCausalLM.from_pretrained("demo/opt-350m", torch_dtype=torch.bfloat16)

training_args = SFTConfig(
    model_init_kwargs={
        "torch_dtype": "bfloat16",
    },
    output_dir="demo/out",
)
trainer = SFTTrainer(
    "demo/opt-350m",
    train_dataset=dataset,
    args=training_args,
)

trainer.train()
assert trainer.model.dtype == model.dtype == torch.bfloat16

"""The model is built outside the trainer."""

from datasets import load_dataset
from transformers import AutoModelForCausalLM

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/seed_page/reviews.jsonl", split="train")

model = AutoModelForCausalLM.from_pretrained("demo/opt-350m")

training_args = SFTConfig(output_dir="demo/out")

trainer = SFTTrainer(
    model,
    train_dataset=dataset,
    args=training_args,
)

trainer.train()

"""Fine-tune on a column of text: the first snippet of TRL's page, with the import changed."""

from datasets import load_dataset

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/seed_page/reviews.jsonl", split="train")

training_args = SFTConfig(
    max_length=512,
    output_dir="demo/out",
)
trainer = SFTTrainer(
    "demo/opt-350m",
    train_dataset=dataset,
    args=training_args,
)
trainer.train()

"""A dataset with a column input_ids is taken as it is."""

from datasets import load_dataset
from transformers import AutoTokenizer

from sfttrain import SFTConfig, SFTTrainer

tokenizer = AutoTokenizer.from_pretrained("demo/opt-350m")
dataset = load_dataset("json", data_files="examples/seed_page/reviews.jsonl", split="train")
dataset = dataset.map(
    lambda example: {"input_ids": tokenizer(example["text"])["input_ids"]},
    remove_columns=["text", "label"],
)

trainer = SFTTrainer(
    "demo/opt-350m",
    train_dataset=dataset,
    args=SFTConfig(output_dir="demo/out"),
)
trainer.train()
assert sorted(pack.input_ids.tolist() for pack in trainer.train_dataset) == sorted(
    dataset["input_ids"]
)

"""A dataset that is read as it is trained, in place of one that is all on the disk: max_steps says
when it is enough."""

from datasets import load_dataset

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/data/qa.jsonl", split="train", streaming=True)

trainer = SFTTrainer(
    "demo/opt-350m",
    train_dataset=dataset,
    args=SFTConfig(output_dir="demo/out", packing=True, max_steps=5),
)
trainer.train()

"""Several short examples in a row of the model; the evaluation set is not packed."""

from datasets import load_dataset

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/seed_page/reviews.jsonl", split="train")
held_out = dataset.select(range(6))
dataset = dataset.select(range(6, len(dataset)))

training_args = SFTConfig(packing=True, eval_packing=False)

trainer = SFTTrainer(
    "demo/opt-350m", train_dataset=dataset, eval_dataset=held_out, args=training_args
)

trainer.train()
assert len(trainer.train_dataset) < len(dataset)
assert len(trainer.eval_dataset) == len(held_out)
print(trainer.evaluate())

"""Prompts and completions: the loss is of the completions, or with completion_only_loss=False of
both."""

from datasets import load_dataset

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/data/qa.jsonl", split="train")

trained = {}
for completion_only_loss in (None, False):
    training_args = SFTConfig(
        output_dir="demo/out", completion_only_loss=completion_only_loss, num_train_epochs=1
    )
    trainer = SFTTrainer("demo/opt-350m", train_dataset=dataset, args=training_args)
    trainer.train()
    trained[completion_only_loss] = trainer.trained_tokens

print(f"{trained[None]:,} tokens of completions, {trained[False]:,} with their prompts")
assert trained[None] < trained[False]

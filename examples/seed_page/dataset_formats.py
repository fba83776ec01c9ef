"""Conversations and instructions are given to the trainer as they are."""

from datasets import load_dataset

from sfttrain import SFTConfig, SFTTrainer

# Conversations: {"messages": [{"role": "system", "content": "You are helpful"}, ...]}
conversations = load_dataset("json", data_files="examples/data/chats.jsonl", split="train").select(
    range(12)
)
# Instructions: {"prompt": "<prompt text>", "completion": "<ideal generated text>"}
instructions = load_dataset("json", data_files="examples/data/qa.jsonl", split="train")

for dataset in (conversations, instructions):
    training_args = SFTConfig(packing=True, num_train_epochs=1)
    trainer = SFTTrainer(
        "demo/Qwen2.5-0.5B",
        args=training_args,
        train_dataset=dataset,
    )
    trainer.train()

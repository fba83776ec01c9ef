"""A function makes the texts, and they are packed."""

from datasets import load_dataset

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/seed_page/questions.jsonl", split="train")


def formatting_func(example):
    text = f"### Question: {example['question']}\n ### Answer: {example['answer']}"
    return text


training_args = SFTConfig(packing=True)
trainer = SFTTrainer(
    "demo/opt-350m",
    train_dataset=dataset,
    args=training_args,
    formatting_func=formatting_func,
)

trainer.train()

"""A function makes the text of an example from its fields."""

from datasets import load_dataset
from transformers import AutoModelForCausalLM

from sfttrain import SFTConfig, SFTTrainer

model = AutoModelForCausalLM.from_pretrained("demo/opt-350m")
dataset = load_dataset("json", data_files="examples/seed_page/questions.jsonl", split="train")
training_args = SFTConfig(output_dir="demo/out")


def formatting_prompts_func(example):
    return f"### Question: {example['question']}\n ### Answer: {example['answer']}"


trainer = SFTTrainer(
    model,
    args=training_args,
    train_dataset=dataset,
    formatting_func=formatting_prompts_func,
)

trainer.train()


# Older TRL called it with columns of several examples; that works too.
def formatting_columns_func(examples):
    return [
        f"### Question: {question}\n ### Answer: {answer}"
        for question, answer in zip(examples["question"], examples["answer"], strict=True)
    ]


again = SFTTrainer(
    model, args=training_args, train_dataset=dataset, formatting_func=formatting_columns_func
)
assert len(again.train_dataset) == len(trainer.train_dataset) == len(dataset)

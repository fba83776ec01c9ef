"""Turns end with a token of the template, not with the tokenizer's own end of text."""

from datasets import load_dataset

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/data/chats.jsonl", split="train").select(
    range(16)
)

trainer = SFTTrainer(
    "demo/Qwen2.5-0.5B",
    train_dataset=dataset,
    args=SFTConfig(
        output_dir="demo/out", eos_token="<|im_end|>", max_length=512, num_train_epochs=1
    ),
)
trainer.train()
assert trainer.processing_class.eos_token == "<|im_end|>"
assert trainer.model.config.eos_token_id == trainer.processing_class.eos_token_id

"""Train an adapter, with the embedding and the head beside it."""

from datasets import load_dataset
from peft import LoraConfig

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/data/chats.jsonl", split="train").select(
    range(8)
)

peft_config = LoraConfig(
    r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    target_modules="all-linear",
    modules_to_save=["lm_head", "embed_token"],
    task_type="CAUSAL_LM",
)

trainer = SFTTrainer(
    "demo/Qwen2.5-0.5B",
    train_dataset=dataset,
    args=SFTConfig(output_dir="demo/Qwen2.5-0.5B-SFT"),
    peft_config=peft_config,
)

trainer.train()
trainer.save_model()

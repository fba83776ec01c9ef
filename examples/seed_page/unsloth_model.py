"""A model that unsloth loaded and gave an adapter, passed in as it is. Needs unsloth, and says so
where it is missing."""

import importlib.util
import sys

from datasets import load_dataset

from sfttrain import SFTConfig, SFTTrainer

if importlib.util.find_spec("unsloth") is None:
    print("unsloth is not installed: pip install unsloth")
    sys.exit(0)

from unsloth import FastLanguageModel

max_length = 2048  # any number: unsloth scales the positions

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="demo/Qwen2.5-0.5B",
    max_seq_length=max_length,
    dtype=None,  # None: found out. float16 for Tesla T4, V100; bfloat16 for Ampere and later
    load_in_4bit=True,  # less memory; may be False
)

model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing=True,
    random_state=3407,
)

training_args = SFTConfig(output_dir="demo/out", max_length=max_length)

trainer = SFTTrainer(
    model=model,
    args=training_args,
    train_dataset=load_dataset("json", data_files="examples/data/chats.jsonl", split="train"),
    processing_class=tokenizer,
)
trainer.train()

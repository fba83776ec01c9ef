"""Go on training an adapter that was trained before: it is loaded outside, and no peft_config is
given.

Run lora.py first.
"""

from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/data/chats.jsonl", split="train").select(
    range(8)
)

base = AutoModelForCausalLM.from_pretrained("demo/Qwen2.5-0.5B")
model = PeftModel.from_pretrained(base, "demo/Qwen2.5-0.5B-SFT", is_trainable=True)

trainer = SFTTrainer(
    model,
    train_dataset=dataset,
    args=SFTConfig(output_dir="demo/Qwen2.5-0.5B-SFT-more", num_train_epochs=1),
)

trainer.train()

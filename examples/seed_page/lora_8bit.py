"""Train an adapter on a base model in 8 bits, and in 4. Without a GPU bitsandbytes computes on the
CPU."""

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sfttrain import SFTConfig, SFTTrainer

dataset = load_dataset("json", data_files="examples/seed_page/reviews.jsonl", split="train")

peft_config = LoraConfig(
    r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)

# transformers 5 has quantization_config where the page has load_in_8bit=True.
model = AutoModelForCausalLM.from_pretrained(
    "demo/gpt-neo-125m",
    quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    device_map="auto",
)

trainer = SFTTrainer(
    model,
    train_dataset=dataset,
    args=SFTConfig(num_train_epochs=1),
    peft_config=peft_config,
)

trainer.train()

# By name, the trainer loads it so itself, and takes the older spelling.
trainer = SFTTrainer(
    "demo/gpt-neo-125m",
    train_dataset=dataset,
    args=SFTConfig(num_train_epochs=1, model_init_kwargs={"load_in_4bit": True}),
    peft_config=peft_config,
)
trainer.train()

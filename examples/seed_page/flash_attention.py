"""An implementation of attention that is asked for is used or refused, never replaced by
another."""

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sfttrain import SFTConfig, SFTTrainer

model_id = "demo/Qwen2.5-0.5B"
dataset = load_dataset("json", data_files="examples/seed_page/reviews.jsonl", split="train")

if torch.cuda.is_available():
    model = AutoModelForCausalLM.from_pretrained(
        model_id,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        attn_implementation="flash_attention_2",
    )
else:
    try:
        SFTTrainer(
            model_id,
            train_dataset=dataset,
            args=SFTConfig(model_init_kwargs={"attn_implementation": "flash_attention_2"}),
        )
    except Exception as error:
        print(f"refused, as it should be: {error}")
    else:
        raise AssertionError("flash attention without a GPU")
    model = AutoModelForCausalLM.from_pretrained(model_id)

trainer = SFTTrainer(model, train_dataset=dataset, args=SFTConfig(packing=True, num_train_epochs=1))

# Flash Attention 1, as the page has it: torch's own kernels, chosen around train().
with torch.nn.attention.sdpa_kernel(
    [torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.MATH],
    set_priority=True,
):
    trainer.train()

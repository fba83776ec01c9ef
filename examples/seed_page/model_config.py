"""The helpers that make a model from a ModelConfig."""

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from sfttrain import (
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)

training_args = SFTConfig(output_dir="demo/out", num_train_epochs=1)
model_args = ModelConfig(
    model_name_or_path="demo/opt-350m",
    attn_implementation=None,  # or "flash_attention_2"
)
torch_dtype = (
    model_args.torch_dtype
    if model_args.torch_dtype in ["auto", None]
    else getattr(torch, model_args.torch_dtype)
)
quantization_config = get_quantization_config(model_args)
model_kwargs = dict(  # noqa: C408
    revision=model_args.model_revision,
    trust_remote_code=model_args.trust_remote_code,
    attn_implementation=model_args.attn_implementation,
    torch_dtype=torch_dtype,
    use_cache=False if training_args.gradient_checkpointing else True,  # noqa: SIM211
    device_map=get_kbit_device_map() if quantization_config is not None else None,
    quantization_config=quantization_config,
)
model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **model_kwargs)
trainer = SFTTrainer(
    train_dataset=load_dataset(
        "json", data_files="examples/seed_page/reviews.jsonl", split="train"
    ),
    args=training_args,
    model=model_args.model_name_or_path,
    peft_config=get_peft_config(model_args),
)
trainer.train()

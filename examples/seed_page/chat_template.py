"""Give a base model the chat template of another, and train it on conversations."""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from sfttrain import SFTConfig, SFTTrainer, clone_chat_template

# Load model and tokenizer
model = AutoModelForCausalLM.from_pretrained("demo/opt-350m")
tokenizer = AutoTokenizer.from_pretrained("demo/opt-350m")

# Set up the chat format, as the page writes it ...
model, tokenizer = clone_chat_template(model, tokenizer, "demo/Qwen3-0.6B")
assert "<|im_start|>" in tokenizer.get_vocab()

# ... and as TRL has it today: the ids that are new come back too. The embedding is rounded up to a
# multiple.
model = AutoModelForCausalLM.from_pretrained("demo/opt-350m")
tokenizer = AutoTokenizer.from_pretrained("demo/opt-350m")
model, tokenizer, added = clone_chat_template(
    model, tokenizer, "demo/Qwen3-0.6B", resize_to_multiple_of=128
)
assert model.get_input_embeddings().weight.shape[0] % 128 == 0
assert len(added) >= 2

dataset = load_dataset("json", data_files="examples/data/chats.jsonl", split="train").select(
    range(12)
)
trainer = SFTTrainer(
    model,
    train_dataset=dataset,
    args=SFTConfig(output_dir="demo/out", max_length=512, num_train_epochs=1),
    processing_class=tokenizer,
)
trainer.train()

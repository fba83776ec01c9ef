"""A collator of one's own for pictures and text: the processor of the model makes batches, and
nothing is prepared before."""

from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from sfttrain import SFTConfig, SFTTrainer

model = LlavaForConditionalGeneration.from_pretrained("demo/llava-1.5-7b-hf")
processor = AutoProcessor.from_pretrained("demo/llava-1.5-7b-hf")


def conversation(question, answer):
    return [
        {
            "role": "user",
            "content": [{"type": "text", "text": question}, {"type": "image", "text": None}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


colours = {
    "red": (200, 30, 30),
    "green": (30, 160, 60),
    "blue": (30, 60, 200),
    "grey": (120, 120, 120),
}
dataset = Dataset.from_list(
    [
        {
            "messages": conversation("Which colour is this?", f"It is {name}."),
            "images": [Image.new("RGB", (48, 32), rgb)],
        }
        for name, rgb in colours.items()
    ]
)


def collate_fn(examples):
    # The texts and the images, with the chat template applied
    texts = [
        processor.apply_chat_template(example["messages"], tokenize=False) for example in examples
    ]
    images = [example["images"][0] for example in examples]

    # Tokenize the texts and process the images
    batch = processor(text=texts, images=images, return_tensors="pt", padding=True)

    # The labels are the input_ids, and padding tokens are left out of the loss
    labels = batch["input_ids"].clone()
    labels[labels == processor.tokenizer.pad_token_id] = -100
    batch["labels"] = labels

    return batch


examples = [dataset[0], dataset[1]]  # two examples, to see what comes out
collated_data = collate_fn(examples)
print(collated_data.keys())  # dict_keys(['input_ids', 'attention_mask', 'pixel_values', 'labels'])

training_args = SFTConfig(output_dir="demo/out", per_device_train_batch_size=2)
training_args.remove_unused_columns = False
training_args.dataset_kwargs = {"skip_prepare_dataset": True}

trainer = SFTTrainer(
    model=model,
    args=training_args,
    data_collator=collate_fn,
    train_dataset=dataset,
    processing_class=processor.tokenizer,
)
trainer.train()

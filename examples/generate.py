"""Ask a trained adapter something.

python examples/generate.py --model demo/model --adapter demo/adapter --ask "How do I boil an egg?"
"""

from __future__ import annotations

import argparse

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub name of the base model")
    parser.add_argument(
        "--adapter", required=True, help="folder of the adapter, the --output_dir of sfttrain run"
    )
    parser.add_argument("--ask", required=True, help="what the user says")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.adapter)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # for the tokens of the chat template
    model = PeftModel.from_pretrained(model, arguments.adapter).eval()
    chat = [{"role": "user", "content": arguments.ask}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.3,
        )
    print(f"user: {arguments.ask}")
    print(
        "assistant:"
        f" {tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}"
    )


if __name__ == "__main__":
    main()

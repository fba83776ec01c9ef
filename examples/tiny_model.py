"""A tiny model to try things with: a tokenizer trained on the spot, and a Llama made from a config.
Nothing is downloaded.

python examples/tiny_model.py --output demo/model
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging

HERE = Path(__file__).parent
VOCABULARY = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument(
        "--data",
        type=Path,
        default=HERE / "data",
        help="folder of .jsonl files to train the tokenizer on",
    )
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = train_tokenizer(arguments.data)
    tokenizer.save_pretrained(arguments.output)
    model = make_model(tokenizer)
    model.save_pretrained(arguments.output)
    print(f"{arguments.output}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


def train_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML markers, trained on every string in the data."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_pattern(), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_strings(data), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
    )
    fast.chat_template = (HERE / "chatml.jinja").read_text(encoding="utf-8")
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About a million parameters, random."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _pattern() -> object:
    from tokenizers import Regex

    # The split of GPT-4 and Qwen: words with one leading sign, single digits, runs of signs, line
    # breaks, blanks.
    return Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _strings(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                yield from _leaves(json.loads(line))


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield (
            json.dumps(value, ensure_ascii=False)
            if "parameters" in value or "arguments" in value
            else ""
        )
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)


if __name__ == "__main__":
    main()

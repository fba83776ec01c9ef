"""Small tokenizers that the tests train themselves, so that they need no external data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from sftprep.tokenize.loading.spec import TokenizerSpec, tokenizer_spec

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 times that we're here!",
    "naïve café, déjà vu: 中文 和 日本語 — 한국어; привет мир\n\n  indented\tcode(x) == y",
    "user assistant system hello world foo bar\n\n\n   and 3.14159 ... --- ***",
] * 30


def byte_level(
    *,
    added: tuple[AddedToken, ...] = (),
    nfc: bool = False,
    gpt4: bool = False,
    qwen: bool = False,
    add_prefix_space: bool = False,
    trim: bool = False,
    every_byte: bool = True,
) -> Tokenizer:
    """Return a byte-level BPE of 400 tokens.

    It splits strings as GPT-2 does, with `gpt4` as Llama 3, with `qwen` as Qwen (digit by digit).
    Without `every_byte`, the vocabulary lacks some bytes that rarely occur, as that of SmolLM2.
    """
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(
        add_prefix_space=add_prefix_space, use_regex=not (gpt4 or qwen)
    )
    split = pre_tokenizers.Split(Regex(_GPT4.replace("{1,3}", "") if qwen else _GPT4), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if gpt4 or qwen else level
    tokenizer.decoder = decoders.ByteLevel()
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if not every_byte:
        # The bytes 04, 06 and F1, and that of a line end on old systems, 0D.
        alphabet = [character for character in alphabet if character not in "ĄĆñč"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END, START, STOP],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def sentence_piece(*, prepend: bool, pieces: tuple[str, ...] = ()) -> Tokenizer:
    """Return a BPE with byte fallback that writes spaces as "▁".

    With `prepend` it is like Llama 2, without it like Gemma.
    """
    steps: list[Any] = [normalizers.Prepend("▁")] if prepend else []
    normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    vocabulary = {
        piece: number
        for number, piece in enumerate(
            ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        )
    }
    for piece in (*model["vocab"], *pieces):
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizer
    if not prepend:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    return tokenizer


def live(tokenizer: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer wrapped in the class of transformers."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def spec_of(tokenizer: Tokenizer, **settings: Any) -> TokenizerSpec:
    """Return its spec."""
    return tokenizer_spec(live(tokenizer, **settings), name="made")


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """Write a folder as the author of a model would publish it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": STOP,
        "pad_token": END,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": CHATML, **config}), encoding="utf-8"
    )
    return folder

"""The tokenizers of real models in the shared folder, each loaded once for all tests."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoTokenizer

from sftprep.tokenize.encoders.base import Encoder
from sftprep.tokenize.encoders.load import load_encoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.loading.spec import TokenizerSpec, tokenizer_spec
from tests.support import SHARED

FAST = ("qwen3", "mistral-v3", "mistral-v1", "deepseek-v4", "gpt2", "../models/stories260k")
"""Those that gigatoken and fastokens load."""
ONLY_FASTOKENS = ("smollm2", "tiny-chatml-4k")
"""Those that fastokens loads, and gigatoken does not."""
SLOW = ("t5",)
REAL = (*FAST, *ONLY_FASTOKENS, *SLOW)
REAL_PAIRS = [
    *(("gigatoken", name) for name in FAST),
    *(("fastokens", name) for name in (*FAST, *ONLY_FASTOKENS)),
]
"""Each fast encoder with each tokenizer that it loads."""


@cache
def real_tokenizer(name: str) -> Any:
    """Return it as transformers loads it."""
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


@cache
def real_spec(name: str) -> TokenizerSpec:
    """Return its spec."""
    return tokenizer_spec(real_tokenizer(name))


@cache
def real_fast(encoder: str, name: str) -> Encoder:
    """Return a fast encoder for it."""
    return load_encoder(
        real_spec(name), encoder, threads=False, reference=lambda: real_reference(name)
    )


@cache
def real_reference(name: str) -> HfEncoder:
    """Return the reference encoder for it."""
    return HfEncoder(real_spec(name), threads=True)

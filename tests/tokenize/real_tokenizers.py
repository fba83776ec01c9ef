"""The tokenizers of real models in the shared folder, each loaded once for all tests."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoTokenizer

from sftprep.tokenize.encoders.gigatoken import GigatokenEncoder
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.loading.spec import TokenizerSpec, tokenizer_spec
from tests.support import SHARED

FAST = ("qwen3", "mistral-v3", "mistral-v1", "deepseek-v4", "gpt2", "../models/stories260k")
"""Those that gigatoken loads."""
SLOW = ("smollm2", "t5", "tiny-chatml-4k")
REAL = (*FAST, *SLOW)


@cache
def real_tokenizer(name: str) -> Any:
    """Return it as transformers loads it."""
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


@cache
def real_spec(name: str) -> TokenizerSpec:
    """Return its spec."""
    return tokenizer_spec(real_tokenizer(name))


@cache
def real_fast(name: str) -> GigatokenEncoder:
    """Return the fast encoder for it."""
    return GigatokenEncoder(real_spec(name), reference=lambda: real_reference(name))


@cache
def real_reference(name: str) -> HfEncoder:
    """Return the reference encoder for it."""
    return HfEncoder(real_spec(name), threads=True)

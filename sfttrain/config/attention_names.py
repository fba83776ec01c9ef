"""Names of attention implementations, and the refusal of unsuitable ones.

Unsuitable implementations let packed sequences attend to each other.
"""

from __future__ import annotations

from sftprep.errors import AttentionError, setting

CHOICES = (
    "auto",
    "flash_attention_4",
    "flash_attention_3",
    "flash_attention_2",
    "torch_varlen",
    "sft_varlen",
    "unpack",
)
"""The values of `attn`, apart from names of kernel repositories (kernels-community/flash-attn2)."""

_MIXING = {"eager", "sdpa", "flex_attention"}
"""Implementations that attend across the boundaries of packed sequences in many models."""


def reject_mixing(name: str) -> None:
    """Refuse attention implementations without isolation of packed sequences.

    Raises:
        AttentionError: `name` is one of them.
    """
    if name in _MIXING:
        raise AttentionError(
            f"attention {name!r} lets packed sequences attend to each other in many models, and is"
            " slow in the others",
            remedy=f"use {setting('attn', 'auto')}, or one of: {', '.join(CHOICES[1:])}",
        )

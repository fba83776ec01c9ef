"""Names of attention implementations, and those that would mix packed sequences."""

from __future__ import annotations

from sftprep.errors import AttentionError

CHOICES = (
    "auto",
    "flash_attention_4",
    "flash_attention_3",
    "flash_attention_2",
    "torch_varlen",
    "sft_varlen",
    "unpack",
)
"""What --attn takes, besides the name of a kernel repository (kernels-community/flash-attn2)."""


_MIXES = {"eager", "sdpa", "flex_attention"}


def reject_mixing(asked: str) -> None:
    """Raise AttentionError for implementations under which packed sequences may see each other."""
    if asked in _MIXES:
        raise AttentionError(
            f"attention {asked!r} would let packed sequences see each other in many models, and is"
            " slow where it does not",
            remedy=f"use --attn auto, or one of: {', '.join(CHOICES[1:])}",
        )

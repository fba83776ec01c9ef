"""NEFTune on packed rows: noise on the embeddings by the length of each sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sfttrain.models.unwrap import unwrap_peft


@contextlib.contextmanager
def noise_by_sequence(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """Add noise to the embeddings of a training model while the context is open.

    The noise is uniform with the amplitude alpha / sqrt(L * D), where L is the length of the
    sequence of a token and D the width of the embedding. transformers takes the length of the row
    for L, which gives too little noise on packed rows. Source: https://arxiv.org/abs/2310.05914,
    where a row is one sequence.

    Args:
        model: The model, which gets two hooks while the context is open.
        alpha: The strength of the noise; None for no noise.
    """
    if alpha is None:
        yield
        return
    inner = unwrap_peft(model)
    lengths: list[Tensor] = []  # one entry: the lengths of the present forward, for its embedding

    def record_lengths(_module: nn.Module, _args: Any, arguments: dict[str, Any]) -> None:
        lengths[:] = [_lengths_by_token(arguments)]

    def add_noise(module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        scale = alpha / (lengths[0].float() * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * scale[..., None].to(
            embedded.dtype
        )

    hooks = [
        inner.register_forward_pre_hook(record_lengths, with_kwargs=True),
        inner.get_input_embeddings().register_forward_hook(add_noise),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _lengths_by_token(arguments: dict[str, Any]) -> Tensor:
    """Return the length of the sequence of each token.

    The shape is [1, T] for a packed row, and [B, 1] for a padded batch.
    """
    offsets, mask, ids = (
        arguments.get("cu_seq_lens_q"),
        arguments.get("attention_mask"),
        arguments["input_ids"],
    )
    if offsets is not None:
        sizes = (offsets[1:] - offsets[:-1]).long()
        # With output_size, repeat_interleave does not read the sizes on the host.
        return torch.repeat_interleave(sizes, sizes, output_size=ids.shape[1])[None]
    if mask is not None:
        padded: Tensor = mask.sum(-1, keepdim=True)
        return padded
    full: Tensor = torch.full_like(ids[:, :1], ids.shape[1])
    return full

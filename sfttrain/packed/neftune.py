"""NEFTune on packed rows: noise on the embeddings, scaled by each sequence's own length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sfttrain.models.unwrap import unwrap_peft


@contextlib.contextmanager
def noise_by_sequence(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """While this is open, a model in training gets uniform noise of alpha / sqrt(L * D) on its
    embeddings; None: no noise.

    L is the length of the sequence a token is in (transformers takes that of the row), D the width
    of the embedding. Source: https://arxiv.org/abs/2310.05914, where a row is one sequence.
    """
    if alpha is None:
        yield
        return
    inner = unwrap_peft(model)
    lengths: list[Tensor] = []

    def remember(_module: nn.Module, _args: Any, arguments: dict[str, Any]) -> None:
        lengths[:] = [_length_of_each(arguments)]

    def add_noise(module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        scale = alpha / (lengths[0].float() * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * scale[..., None].to(
            embedded.dtype
        )

    hooks = [
        inner.register_forward_pre_hook(remember, with_kwargs=True),
        inner.get_input_embeddings().register_forward_hook(add_noise),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _length_of_each(arguments: dict[str, Any]) -> Tensor:
    """Length of the sequence that each token is in: [1, T] for a packed row, [B, 1] for a padded
    batch."""
    bounds, mask, ids = (
        arguments.get("cu_seq_lens_q"),
        arguments.get("attention_mask"),
        arguments["input_ids"],
    )
    if bounds is not None:
        sizes = (bounds[1:] - bounds[:-1]).long()
        return torch.repeat_interleave(sizes, sizes, output_size=ids.shape[1])[None]
    if mask is not None:
        padded: Tensor = mask.sum(-1, keepdim=True)
        return padded
    whole: Tensor = torch.full_like(ids[:, :1], ids.shape[1])
    return whole

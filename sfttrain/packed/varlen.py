"""Attention over a packed row, one sequence at a time: ours through SDPA (any device), and torch's
own kernel (CUDA).

Both have the signature that transformers calls attention functions with, and are known to it under
the names `sft_varlen` and `torch_varlen` after `register()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def register() -> None:
    """Make `sft_varlen` and `torch_varlen` known to transformers. Doing it again changes
    nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, function in (("sft_varlen", sft_varlen), ("torch_varlen", torch_varlen)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask_only_for_padding)


def sft_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_lens: Sequence[int] | None = None,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a row, through scaled_dot_product_attention; its
    cost is sum(len ** 2).

    query: [1, heads, T, D]; key: [1, kv heads, T, D]; value: [1, kv heads, T, Dv]; cu_seq_lens_q:
    int32 [S + 1], the bounds of the sequences, or seq_lens: their lengths as Python ints. Returns
    [1, T, heads, Dv]. Without either, the rows are ordinary ones (generation, padded batches):
    `attention_mask` decides, as in `sdpa`. Takes grouped-query heads, sliding windows, softcapping,
    attention sinks (s_aux) and heads whose value is narrower than their key; refuses a position
    bias, which belongs to whole rows, with NotImplementedError.
    """
    if position_bias is not None:
        raise NotImplementedError("sft_varlen has no position bias")
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    options = _Options(dropout, scaling, causal, sliding_window, softcap, s_aux)
    if seq_lens is None and cu_seq_lens_q is None:
        return _attend(query, key, value, attention_mask, options).transpose(
            1, 2
        ).contiguous(), None
    if seq_lens is None:
        assert cu_seq_lens_q is not None
        seq_lens = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    lengths = list(seq_lens)
    pieces = zip(*(torch.split(t, lengths, 2) for t in (query, key, value)), strict=True)
    # Put together in the layout that is asked for, which is the one that the CPU's kernel writes.
    return torch.cat(
        [_attend(q, k, v, None, options).transpose(1, 2) for q, k, v in pieces], 1
    ), None


def torch_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """`torch.nn.attention.varlen.varlen_attn` (CUDA, 16-bit) under transformers' signature; shapes
    as in `sft_varlen`.

    Rows without bounds go through `sft_varlen`. Raises NotImplementedError for softcapping, sinks,
    dropout, a position bias, and attention that is not causal, which that kernel does not have.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sft_varlen(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            sliding_window=sliding_window,
            softcap=softcap,
            s_aux=s_aux,
            position_bias=position_bias,
        )
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if (
        softcap is not None
        or s_aux is not None
        or dropout
        or position_bias is not None
        or not causal
    ):
        raise NotImplementedError(
            "torch_varlen has no softcap, sinks, dropout or position bias, and is causal"
        )
    q, k, v = (_kernel_layout(t) for t in (query, key, value))
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    bounds = (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
    longest = (max_length_q, max_length_q if max_length_k is None else max_length_k)
    out = _varlen_kernel((q, k, v), bounds, longest, scale=scaling, window=window)
    return out[None].to(query.dtype), None


def mask_only_for_padding(
    *args: Any, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """The mask of these implementations: none for packed rows, whose bounds say all; SDPA's for a
    padded batch.

    Without it a model that was trained with `sft_varlen` would ignore the padding of a batch it
    generates for.
    """
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = (
        None
        if attention_mask is None
        else sdpa_mask(*args, attention_mask=attention_mask, **options)
    )
    return mask


@dataclass(frozen=True, slots=True)
class _Options:
    """What does not change from one sequence of a row to the next."""

    dropout: float
    scaling: float | None
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Tensor | None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
    """Attention of one sequence (mask None), or of a padded batch: [B, heads, n, Dv]."""
    n, m = q.shape[2], k.shape[2]
    windowed = options.window is not None and m > options.window
    if mask is None and options.causal and (windowed or 1 < n < m):
        mask = _band(n, m, options.window, q.device)
    causal = mask is None and options.causal and n > 1
    if options.softcap is not None or options.sinks is not None:
        return _attend_by_hand(q, k, v, _band(n, m, None, q.device) if causal else mask, options)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=options.dropout,
        is_causal=causal,
        scale=options.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _band(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """bool [n, m]: the last n of m positions look back, at most `window` positions including
    themselves."""
    back = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return (back >= 0) & (back < window) if window is not None else back >= 0


def _attend_by_hand(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: _Options
) -> Tensor:
    """Softcapping and sinks, which SDPA does not know: scores are made in full, for one sequence at
    a time."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = options.scaling if options.scaling is not None else q.shape[-1] ** -0.5
    scores = (q @ k.transpose(2, 3)) * scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        )
    if options.sinks is not None:
        # A sink is one more score a head may spend its attention on; it has no value, so its column
        # is dropped after.
        sink = (
            options.sinks.to(scores.dtype)
            .reshape(1, -1, 1, 1)
            .expand(scores.shape[0], -1, scores.shape[2], 1)
        )
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype)
    if options.sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, options.dropout, training=options.dropout > 0) @ v


def _kernel_layout(tensor: Tensor) -> Tensor:
    """[1, H, T, D] to [T, H, D], in 16 bits: under autocast the projections come in float32 after
    rotary embedding."""
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        tensor = tensor.to(torch.get_autocast_dtype("cuda"))
    return tensor[0].transpose(0, 1)


def _varlen_kernel(
    tensors: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    scale: float | None,
    window: tuple[int, int],
) -> Tensor:
    """torch's kernel. tensors: q [T, H, D], k and v [T, kv heads, D]; bounds, longest: of queries,
    of keys -> [T, H, D]."""
    from torch.nn.attention import varlen

    q, k, v = tensors
    if q.shape[1] != k.shape[1]:
        # Heads are repeated here: enable_gqa came to this function after the function itself.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    out = varlen.varlen_attn(q, k, v, *bounds, *longest, scale=scale, window_size=window)
    assert isinstance(out, Tensor)
    return out

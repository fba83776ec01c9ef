"""Attention within each sequence of a packed row: `sft_varlen`, `torch_varlen`.

`sft_varlen` calls scaled_dot_product_attention (SDPA) once per sequence, on any device. Its cost is
the sum of the squared sequence lengths, and no mask of the row is built. `torch_varlen` calls
torch's own kernel (CUDA, 16 bits). Both have the signature of transformers' attention functions;
after `register()` a model is set to them by name. Both are tested against a loop over heads and
queries (`attend_slow` in tests/sfttrain/test_attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def register() -> None:
    """Register `sft_varlen` and `torch_varlen` with transformers; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, function in (("sft_varlen", sft_varlen), ("torch_varlen", torch_varlen)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, make_padding_mask)


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
    """Compute causal attention within each sequence of a row through SDPA.

    Grouped-query heads, sliding windows, softcapping, attention sinks, and values of another width
    than the keys are supported.

    Args:
        query: [1, heads, T, D].
        key: [1, kv heads, T, D].
        value: [1, kv heads, T, Dv].
        attention_mask: Applied if there are neither `cu_seq_lens_q` nor `seq_lens`: the rows are
            then ordinary ones (generation, padded batches), as in `sdpa`.
        scaling: The factor of the scores; None for D ** -0.5.
        is_causal: None for the attribute `is_causal` of the layer.
        sliding_window: The number of keys that a query sees, including its own; None for all.
        softcap: The limit of the scores; None for no limit.
        s_aux: Scores of the attention sinks, [heads]; None without sinks.
        cu_seq_lens_q: Offsets of the sequences, int32 [S + 1].
        seq_lens: Their lengths as Python integers, which are preferred: reading `cu_seq_lens_q`
            waits for the device.

    Returns:
        The output, [1, T, heads, Dv], and None for the attention weights.

    Raises:
        NotImplementedError: If there is a position bias, which is defined for complete rows.
    """
    if position_bias is not None:
        raise NotImplementedError("sft_varlen does not support a position bias")
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    options = _Options(dropout, scaling, causal, sliding_window, softcap, s_aux)
    if seq_lens is None and cu_seq_lens_q is None:
        output = _attend(query, key, value, attention_mask, options)
        return output.transpose(1, 2).contiguous(), None
    if seq_lens is None:
        assert cu_seq_lens_q is not None
        seq_lens = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    lengths = list(seq_lens)
    pieces = zip(*(torch.split(t, lengths, 2) for t in (query, key, value)), strict=True)
    # The outputs are joined in the layout of the result, which is the layout that the kernel of
    # the CPU writes, so that joining is the only copy.
    outputs = [_attend(q, k, v, None, options).transpose(1, 2) for q, k, v in pieces]
    return torch.cat(outputs, 1), None


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
    """Compute attention within each sequence through torch's `varlen_attn`.

    The kernel runs on CUDA in 16 bits. Arguments and result are those of `sft_varlen`, which also
    computes rows without offsets. Offsets and the longest length of keys default to those of the
    queries.

    Raises:
        NotImplementedError: For softcapping, sinks, dropout, a position bias, and attention that
            is not causal, which the kernel does not support.
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
    has_extras = any(option is not None for option in (softcap, s_aux, position_bias))
    if has_extras or dropout or not causal:
        raise NotImplementedError(
            "torch_varlen does not support softcap, sinks, dropout, a position bias, or attention"
            " that is not causal"
        )
    q, k, v = (_to_kernel_layout(t) for t in (query, key, value))
    # The kernel counts the keys before and after the query, without the query itself.
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    offsets = (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
    longest = (max_length_q, max_length_q if max_length_k is None else max_length_k)
    out = _call_varlen_kernel((q, k, v), offsets, longest, scale=scaling, window=window)
    return out[None].to(query.dtype), None


def make_padding_mask(
    *args: Any, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """Return the mask: None for packed rows, SDPA's for padded batches.

    Packed rows are separated by their offsets. Without the mask of padded batches, a trained model
    that is still set to `sft_varlen` would attend to the padding when it generates for a batch.
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
    """Options of attention, equal for all sequences of a row; see `sft_varlen`."""

    dropout: float  # probability
    scaling: float | None  # factor of the scores
    causal: bool
    window: int | None  # keys that a query sees, including its own
    softcap: float | None  # limit of the scores
    sinks: Tensor | None  # scores of the sinks, [heads]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
    """Return the attention of a sequence or padded batch: [B, heads, n, Dv].

    The mask is None for one sequence.
    """
    n, m = q.shape[2], k.shape[2]
    # SDPA's own causal mask aligns the first query with the first key, which is wrong for a window
    # and for queries that continue cached keys (1 < n < m).
    windowed = options.window is not None and m > options.window
    if mask is None and options.causal and (windowed or 1 < n < m):
        mask = _band_mask(n, m, options.window, q.device)
    causal = mask is None and options.causal and n > 1
    if options.softcap is not None or options.sinks is not None:
        mask = _band_mask(n, m, None, q.device) if causal else mask
        return _attend_explicitly(q, k, v, mask, options)
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


def _band_mask(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """Return the causal mask of the last n of m positions, bool [n, m].

    It is True where a key is seen.

    Example:
        n = 2, m = 3, window = 2  ->  [[True, True, False], [False, True, True]]
    """
    back = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return (back >= 0) & (back < window) if window is not None else back >= 0


def _attend_explicitly(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: _Options
) -> Tensor:
    """Compute attention with softcapping or sinks; SDPA does not support them.

    All scores of one sequence are in memory at once.
    """
    # Repeat the heads of keys and values for grouped queries.
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
        # A sink is one more score in the softmax of a head. It has no value, so its column is
        # removed afterwards.
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


def _to_kernel_layout(tensor: Tensor) -> Tensor:
    """Return [1, H, T, D] as [T, H, D] in 16 bits."""
    # Under autocast, the rotary embedding returns queries and keys in float32.
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        tensor = tensor.to(torch.get_autocast_dtype("cuda"))
    return tensor[0].transpose(0, 1)


def _call_varlen_kernel(
    tensors: tuple[Tensor, Tensor, Tensor],
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    scale: float | None,
    window: tuple[int, int],
) -> Tensor:
    """Return the output of torch's kernel, [T, H, D].

    Args:
        tensors: Queries [T, H, D], keys and values [T, kv heads, D].
        offsets: Offsets of the sequences for queries and for keys.
        longest: Length of the longest sequence for queries and for keys.
        scale: The factor of the scores; None for the default.
        window: The keys before and after a query that it sees; -1 for all.
    """
    from torch.nn.attention import varlen

    q, k, v = tensors
    if q.shape[1] != k.shape[1]:
        # The first versions of the function have no enable_gqa, so heads are repeated here.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    out = varlen.varlen_attn(q, k, v, *offsets, *longest, scale=scale, window_size=window)
    assert isinstance(out, Tensor)
    return out

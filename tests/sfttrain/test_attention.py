"""Attention functions against a slow reference; rejection of unavailable implementations."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sftprep.errors import AttentionError
from sfttrain.config import SFTConfig
from sfttrain.config.attention_names import CHOICES, reject_mixing
from sfttrain.packed import attention, varlen
from sfttrain.packed.attention import explain_unavailable, resolve_attention
from sfttrain.packed.forward import ForwardMode
from sfttrain.packed.isolation_check import IsolationGuard
from tests.sfttrain.tiny import VOCABULARY, tiny_model

MODULE = nn.Module()


def attend_slow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return attention of one head, one query at a time: [n, Dv].

    q, k: [n, D]; v: [n, Dv]; sinks: scalar or None.
    """
    rows = []
    for i in range(len(q)):
        first = 0 if window is None else max(0, i - window + 1)
        scores = (k[first : i + 1] @ q[i]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = torch.exp(scores)
        below = weights.sum() + (torch.exp(sinks) if sinks is not None else 0)
        rows.append((weights / below) @ v[first : i + 1])
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    heads=st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    value_width=st.sampled_from([4, 6]),
    window=st.one_of(st.none(), st.integers(1, 10)),
    softcap=st.one_of(st.none(), st.just(1.5)),
    with_sinks=st.booleans(),
    scaling=st.one_of(st.none(), st.just(0.7)),
    ints=st.booleans(),
)
def test_each_sequence_attends_to_itself_only(
    lengths: list[int],
    heads: tuple[int, int],
    value_width: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    scaling: float | None,
    ints: bool,
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens, (query_heads, key_heads) = sum(lengths), heads
    q = torch.randn(1, query_heads, tokens, 4, generator=generator)
    k = torch.randn(1, key_heads, tokens, 4, generator=generator)
    v = torch.randn(1, key_heads, tokens, value_width, generator=generator)
    sinks = torch.randn(query_heads, generator=generator) if with_sinks else None
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    offsets_argument: dict[str, Any] = (
        {"seq_lens": tuple(lengths)} if ints else {"cu_seq_lens_q": bounds}
    )
    out, _ = varlen.sft_varlen(
        MODULE,
        q,
        k,
        v,
        None,
        scaling=scaling,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks,
        **offsets_argument,
    )
    assert out.shape == (1, tokens, query_heads, value_width)
    for head in range(query_heads):
        group = head // (query_heads // key_heads)
        pieces = [
            attend_slow(
                q[0, head, a:b],
                k[0, group, a:b],
                v[0, group, a:b],
                scaling or 1 / math.sqrt(4),
                window,
                softcap,
                None if sinks is None else sinks[head],
            )
            for a, b in pairwise(bounds.tolist())
        ]
        torch.testing.assert_close(out[0, :, head], torch.cat(pieces), rtol=1e-5, atol=1e-5)


def reference_varlen_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    window_size: Any,
) -> Tensor:
    """Return the result of torch's CUDA kernel on a CPU; q, k, v: [T, H, D]."""
    assert longest_q == longest_k == int((bounds_q[1:] - bounds_q[:-1]).max())
    window = None if window_size[0] < 0 else window_size[0] + 1
    heads = [
        torch.cat(
            [
                attend_slow(q[a:b, h], k[a:b, h], v[a:b, h], scale, window, None, None)
                for a, b in pairwise(bounds_q.tolist())
            ]
        )
        for h in range(q.shape[1])
    ]
    return torch.stack(heads, 1).to(q.dtype)


@pytest.mark.parametrize("window", [None, 3])
def test_torch_varlen_passes_its_arguments_to_torchs_kernel(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    from torch.nn.attention import varlen as torchs

    monkeypatch.setattr(torchs, "varlen_attn", reference_varlen_attn)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, 14, 4, generator=generator, dtype=torch.bfloat16) for h in (4, 2, 2)
    )
    bounds = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    common: dict[str, Any] = {"scaling": 0.5, "sliding_window": window, "cu_seq_lens_q": bounds}
    found, _ = varlen.torch_varlen(
        MODULE, q, k, v, None, cu_seq_lens_k=bounds, max_length_q=8, max_length_k=8, **common
    )
    wanted, _ = varlen.sft_varlen(MODULE, q, k, v, None, **common)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    with pytest.raises(NotImplementedError):
        varlen.torch_varlen(MODULE, q, k, v, None, softcap=1.0, max_length_q=8, **common)


def checked_flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Check the arguments of flash attention and compute it with `sft_varlen`.

    A kernel without offsets attends to the complete row.
    """
    if cu_seq_lens_q is not None:
        assert attention_mask is None
        assert cu_seq_lens_q.dtype == torch.int32
        assert cu_seq_lens_k is not None
        assert type(max_length_q) is int
        assert type(max_length_k) is int
    options.pop("seq_lens", None)
    return varlen.sft_varlen(
        module, query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, **options
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma3_text", "gpt2", "gpt_oss"])
def test_flash_attention_gets_the_offsets_from_transformers(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """transformers' own registry and masks of flash attention are used; the kernel is replaced."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model(kind)
    guard = IsolationGuard(model, VOCABULARY)
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", checked_flash_attention
    )
    model.config._attn_implementation_internal = "flash_attention_2"
    mode = ForwardMode.from_model(model, "flash_attention_2")
    verdict = guard.check(mode)
    assert verdict.is_isolated, str(verdict)


def test_a_padded_batch_keeps_its_padding_mask() -> None:
    """A generation has no offsets, and the padding must be masked nevertheless."""
    model = tiny_model("llama")
    ids = torch.arange(3, 15).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    wanted = model(input_ids=ids, attention_mask=mask).logits
    resolve_attention(model, "sft_varlen", longest=8)
    found = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-5, atol=1e-5)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("sdpa")
    assert torch.equal(
        generated, model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    )


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_attention_that_would_mix_sequences_is_refused(name: str, tmp_path: Any) -> None:
    with pytest.raises(AttentionError, match="attend to each other") as caught:
        reject_mixing(name)
    assert 'attn="auto"' in caught.value.remedy
    with pytest.raises(AttentionError):
        SFTConfig(output_dir=str(tmp_path), attn=name)
    with pytest.raises(AttentionError):
        resolve_attention(tiny_model("llama"), name, longest=8)


@pytest.mark.parametrize("name", [c for c in CHOICES if "flash" in c or c == "torch_varlen"])
def test_an_unavailable_implementation_is_reported(name: str) -> None:
    assert "CUDA" in explain_unavailable(name, torch.device("cpu"))
    with pytest.raises(AttentionError, match=f"{name}.*CUDA"):
        resolve_attention(tiny_model("llama"), name, longest=8)


@pytest.mark.parametrize(
    ("before", "first"), [("sdpa", "flash_attention_4"), ("flash_attention_2", "flash_attention_2")]
)
def test_the_order_of_candidates_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, before: str, first: str
) -> None:
    monkeypatch.setattr(attention, "explain_unavailable", lambda name, device: "")
    half, full = (
        SimpleNamespace(dtype=d, device=torch.device("cuda"))
        for d in (torch.bfloat16, torch.float32)
    )
    order = list(attention._list_candidates("auto", before, half, None))  # type: ignore[arg-type]
    assert order[0] == first
    assert sorted(order) == sorted(CHOICES[1:6])
    assert order[-1] == "sft_varlen"
    # Those kernels are for 16 bits; float32 without mixed precision uses sft_varlen.
    assert list(attention._list_candidates("auto", before, full, None)) == ["sft_varlen"]  # type: ignore[arg-type]
    assert list(attention._list_candidates("auto", before, full, torch.bfloat16)) == order  # type: ignore[arg-type]

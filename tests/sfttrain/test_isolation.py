"""A pack gives the logits and gradients of its sequences run alone, in every architecture."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from sftprep.errors import AttentionError
from sfttrain.data.batching import collate_packs
from sfttrain.losses.fused_cross_entropy import loss_from_logits, plan_loss
from sfttrain.packed.attention import resolve_attention
from sfttrain.packed.forward import ForwardMode, scored_outputs
from sfttrain.packed.isolation_check import IsolationGuard
from sfttrain.packed.padded_fallback import group_by_length
from tests.sfttrain.packs import make_pack, split
from tests.sfttrain.tiny import VOCABULARY, tiny_model

# Longer than the windows and chunks of the tiny models, of one token, and not in order of length.
LENGTHS = (7, 1, 13, 24, 3)

# fmt: off
PACKED = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "gpt_bigcode", "starcoder2", "olmo",
    "olmo2", "olmo3", "smollm3", "cohere", "cohere2", "deepseek_v3", "glm", "glm4", "granite",
    "exaone4", "ernie4_5", "seed_oss", "hunyuan_v1_dense", "persimmon", "gpt_oss", "afmoe",
    "opt", "biogpt", "helium", "arcee", "olmoe",
)
UNPACKED = (
    "gpt_neo", "gptj", "codegen", "stablelm", "xglm", "bloom", "mpt", "falcon", "mamba",
    "mamba2", "falcon_mamba", "rwkv", "jamba", "recurrent_gemma", "qwen3_next", "olmo_hybrid",
    "minimax", "xlstm", "llama4_text", "nemotron",
)
# fmt: on


def alone(model: Any, lengths: tuple[int, ...], ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of each sequence run alone by transformers, concatenated: [tokens, V]."""
    return torch.cat(
        [
            model(input_ids=piece[None], use_cache=False).logits[0]
            for piece in ids.split(list(lengths))
        ]
    )


def row_of(pack: Any) -> Any:
    """Return a row in which every position is scored, with its own index as target."""
    batch = collate_packs([pack])
    positions = torch.arange(batch["input_ids"].shape[1])
    batch["scored"], batch["targets"] = positions, positions
    return batch


def weighted_sum(logits: torch.Tensor) -> torch.Tensor:
    """Return a scalar that depends on every logit with a different weight."""
    return (
        logits * torch.sin(torch.arange(logits.numel()).reshape(logits.shape) * 0.1)
    ).sum() / logits.shape[0]


@pytest.mark.parametrize("kind", PACKED + UNPACKED)
def test_logits_and_gradients_equal_those_of_the_sequences_alone(kind: str) -> None:
    model, pack = tiny_model(kind), make_pack(LENGTHS)
    ids = torch.from_numpy(pack.input_ids.astype(np.int64))
    expected = alone(model, LENGTHS, ids)
    weighted_sum(expected).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    mode = resolve_attention(model, "auto", longest=max(LENGTHS))
    logits, positions, _ = scored_outputs(model, row_of(pack), mode)
    logits = logits[positions.argsort()]
    weighted_sum(logits).backward()

    assert mode.unpack == (kind in UNPACKED)
    # Some architectures amplify rounding (state spaces, scores of experts). These two must meet an
    # absolute tolerance.
    absolute = kind in ("llama", "qwen2")
    for name, found, wanted in [
        ("logits", logits, expected),
        *((n, p.grad, gradients[n]) for n, p in model.named_parameters()),
    ]:
        if wanted is not None:
            tolerance = 1e-5 if absolute else 4e-5 * max(1.0, wanted.detach().abs().max().item())
            torch.testing.assert_close(
                found, wanted, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_first_token_of_a_neighbour_does_not_reach_a_sequence(kind: str) -> None:
    model = tiny_model(kind)
    mode = resolve_attention(model, "auto", longest=max(LENGTHS))
    pack, other = make_pack(LENGTHS), make_pack(LENGTHS)
    other.input_ids[: LENGTHS[0]] = other.input_ids[: LENGTHS[0]][::-1]
    with torch.no_grad():
        before, after = (scored_outputs(model, row_of(p), mode)[0] for p in (pack, other))
    assert not torch.equal(before[: LENGTHS[0]], after[: LENGTHS[0]])
    assert torch.equal(before[LENGTHS[0] :], after[LENGTHS[0] :])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gpt2", "opt", "falcon", "mamba"])
@pytest.mark.parametrize("loss_impl", ["logits", "fused"])
def test_loss_and_gradients_of_a_pack_equal_those_of_its_sequences(
    kind: str, loss_impl: str
) -> None:
    model, pack = tiny_model(kind), make_pack(LENGTHS)
    tokens, expected = 0, torch.zeros(())
    for piece in split(pack):
        labels = torch.from_numpy(
            np.where(piece.completion_mask, piece.input_ids, -100).astype(np.int64)
        )
        logits = model(
            input_ids=torch.from_numpy(piece.input_ids.astype(np.int64))[None], use_cache=False
        ).logits[0]
        expected = expected + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        tokens += int((labels[1:] != -100).sum())
    (expected / tokens).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    mode = resolve_attention(model, "auto", longest=max(LENGTHS))
    plan = plan_loss(model, loss_impl, "nll")
    with plan.outputs_are_hidden():
        scored = scored_outputs(model, collate_packs([pack]), mode)
    sums = plan.sums(*scored)
    (sums.loss / sums.tokens).backward()

    assert int(sums.tokens) == tokens
    torch.testing.assert_close(sums.loss / tokens, expected / tokens, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        if gradients[name] is not None:
            torch.testing.assert_close(
                parameter.grad,
                gradients[name],
                rtol=1e-4,
                atol=1e-6,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("gpt_oss", "eager"), ("opt", "sdpa"), ("mamba", "eager"), ("stablelm", "sft_varlen")],
)
def test_the_guard_detects_a_leak(kind: str, attention: str) -> None:
    model = tiny_model(kind)
    resolve_attention(tiny_model("llama"), "auto", longest=8)  # registers sft_varlen
    guard = IsolationGuard(model, VOCABULARY)
    model.set_attn_implementation(attention)
    verdict = guard.check(ForwardMode.from_model(model, attention))
    assert not verdict.is_isolated
    assert verdict.leak > 0.1


def test_the_guard_detects_an_isolated_but_different_attention() -> None:
    """Attention without the softcap of the model isolates sequences, but changes the logits."""
    model = tiny_model("gemma2", attn_logit_softcapping=0.1)
    guard = IsolationGuard(model, VOCABULARY)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    resolve_attention(model, "sft_varlen", longest=8, guard=False)
    verdict = guard.check(ForwardMode.from_model(model, "sft_varlen"))
    assert verdict.leak == 0
    assert not verdict.is_isolated


def test_a_fallback_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sfttrain.packed.attention"):
        assert resolve_attention(tiny_model("mamba"), "auto", longest=30).unpack
        assert not resolve_attention(tiny_model("llama"), "auto", longest=30).unpack
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "MambaForCausalLM" in caplog.text
    assert "sigma" in caplog.text


@pytest.mark.parametrize("kind", ["mamba", "bloom", "llama4_text"])
def test_a_requested_attention_is_never_replaced(kind: str) -> None:
    with pytest.raises(AttentionError, match='attn="sft_varlen"'):
        resolve_attention(tiny_model(kind), "sft_varlen", longest=30)


def test_unpacking_can_be_requested() -> None:
    mode = resolve_attention(tiny_model("llama"), "unpack", longest=30)
    assert mode.unpack
    assert mode.attention == "sdpa"


@pytest.mark.parametrize(
    "lengths", [(1,), (5, 5, 5), (1, 2, 3, 40), (64, 32, 31, 16, 0, 1), tuple(range(1, 30))]
)
def test_groups_have_every_token_once_and_padding_at_most_doubles_them(
    lengths: tuple[int, ...],
) -> None:
    groups = list(group_by_length(lengths))
    assert sorted(torch.cat([g.index[g.real] for g in groups]).tolist()) == list(
        range(sum(lengths))
    )
    assert sum(g.index.numel() for g in groups) <= 2 * sum(lengths)
    for group in groups:
        rows = [row[real] for row, real in zip(group.index, group.real, strict=True)]
        assert all(
            torch.equal(row, torch.arange(int(row[0]), int(row[0]) + len(row))) for row in rows
        )


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_a_row_without_a_trained_token_has_loss_and_gradients_of_zero(kind: str) -> None:
    model, pack = tiny_model(kind), make_pack(LENGTHS, trained=0.0)
    mode = resolve_attention(model, "auto", longest=max(LENGTHS))
    outputs, targets, _ = scored_outputs(model, collate_packs([pack]), mode)
    sums = loss_from_logits(outputs, targets)
    sums.loss.backward()
    assert (sums.loss.item(), int(sums.tokens), int(sums.correct)) == (0.0, 0, 0)
    assert all(
        p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad
    )

"""Loss from logits against its definition, and the fused loss against the loss from logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sftprep.errors import ConfigError
from sfttrain.losses import fused_cross_entropy
from sfttrain.losses.fused_cross_entropy import fused_loss, loss_from_logits, plan_loss
from tests.sfttrain.tiny import tiny_model


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    bias=st.booleans(),
    kind=st.sampled_from(["nll", "dft"]),
    frozen=st.booleans(),
    chunk=st.integers(1, 64),
    weighted=st.booleans(),
)
def test_the_fused_loss_equals_the_loss_from_logits(
    n: int, masked: float, bias: bool, kind: Any, frozen: bool, chunk: int, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, 8, generator=generator, dtype=torch.float64)
    head = nn.Linear(8, 21, bias=bias, dtype=torch.float64)
    head.requires_grad_(not frozen)
    targets = torch.randint(0, 21, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < masked] = -100
    weights = torch.rand(n, generator=generator) * 2 if weighted else None
    found, wanted = [], []
    before = fused_cross_entropy._CHUNK_BYTES
    fused_cross_entropy._CHUNK_BYTES = 4 * 21 * chunk
    try:
        for fused, results in ((True, found), (False, wanted)):
            h = hidden.clone().requires_grad_()
            head.zero_grad(set_to_none=True)
            sums = (
                fused_loss(h, head.weight, head.bias, targets, kind, weights)
                if fused
                else loss_from_logits(head(h), targets, kind, weights)
            )
            (sums.loss * 0.3).backward()
            results.extend(
                [
                    sums.loss.detach(),
                    sums.nll,
                    sums.correct,
                    sums.tokens,
                    sums.weight,
                    h.grad,
                    head.weight.grad,
                ]
            )
            results.append(head.bias.grad if bias else None)
    finally:
        fused_cross_entropy._CHUNK_BYTES = before
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_sums_equal_those_of_cross_entropy_and_argmax() -> None:
    logits, targets = torch.randn(9, 5), torch.tensor([0, 1, -100, 3, 4, -100, 2, 2, 1])
    logits[0, 0] = 50.0
    sums = loss_from_logits(logits, targets)
    torch.testing.assert_close(
        sums.loss, F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    )
    assert int(sums.tokens) == 7
    assert int(sums.correct) == sum(
        int(row.argmax()) == int(t) for row, t in zip(logits, targets, strict=True)
    )


def test_weights_multiply_the_loss_and_sum_to_its_divisor() -> None:
    logits, targets = torch.randn(5, 7), torch.tensor([1, -100, 3, 4, 0])
    weights = torch.tensor([0.5, 9.0, 2.0, 1.0, 0.25])
    sums = loss_from_logits(logits, targets, "nll", weights)
    nlls = [
        -float(torch.log_softmax(row.double(), -1)[t])
        for row, t in zip(logits, targets, strict=True)
        if t != -100
    ]
    assert sums.loss.item() == pytest.approx(
        0.5 * nlls[0] + 2 * nlls[1] + nlls[2] + 0.25 * nlls[3], rel=1e-6
    )
    assert sums.nll.item() == pytest.approx(sum(nlls), rel=1e-6)
    assert (sums.weight.item(), int(sums.tokens)) == (3.75, 4)
    assert loss_from_logits(logits, targets).weight.item() == 4


def test_dft_multiplies_a_token_by_its_constant_probability() -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    logp = torch.log_softmax(logits, -1)[torch.arange(6), targets]
    (wanted,) = torch.autograd.grad(-(logp * logp.exp().detach()).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad(loss_from_logits(logits, targets, "dft").loss, logits)
    torch.testing.assert_close(found, wanted)


def test_no_gradients_are_computed_under_no_grad() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.no_grad():
        assert not fused_loss(hidden, weight, None, torch.tensor([1, 2, 3, 4])).loss.requires_grad


def test_the_fused_loss_under_autocast_is_near_the_loss_from_logits() -> None:
    head, hidden, targets = (
        nn.Linear(16, 33, bias=False),
        torch.randn(20, 16),
        torch.randint(0, 33, (20,)),
    )
    losses = []
    for fused in (True, False):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            sums = (
                fused_loss(hidden, head.weight, None, targets)
                if fused
                else loss_from_logits(head(hidden), targets)
            )
        sums.loss.backward()
        losses.append((sums.loss.item(), head.weight.grad.clone()))  # type: ignore[union-attr]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt", "gemma", "mamba"])
def test_plain_heads_are_fused_on_a_cpu(kind: str) -> None:
    model = tiny_model(kind)
    assert plan_loss(model, "auto", "nll").head is model.get_output_embeddings()
    assert plan_loss(model, "logits", "nll").head is None


def test_heads_with_softcapping_are_not_fused() -> None:
    model = tiny_model("gemma2", final_logit_softcapping=3.0)
    assert plan_loss(model, "auto", "nll").head is None
    with pytest.raises(ConfigError, match="after the head"):
        plan_loss(model, "fused", "nll")


@pytest.mark.parametrize(
    ("kind", "changes"), [("cohere", {"logit_scale": 0.1}), ("granite", {"logits_scaling": 5.0})]
)
def test_heads_with_a_scale_of_the_logits_are_fused(kind: str, changes: dict[str, Any]) -> None:
    model = tiny_model(kind, **changes)
    ids, targets = torch.arange(12)[None], torch.arange(1, 13)
    results = []
    for requested in ("fused", "logits"):
        model.zero_grad()
        plan = plan_loss(model, requested, "nll")
        with plan.outputs_are_hidden():
            outputs = model(input_ids=ids).logits[0]
        plan.sums(outputs, targets).loss.backward()
        results.append([outputs.shape[-1], *(p.grad.clone() for p in model.parameters())])
    assert (results[0][0], results[1][0]) == (32, 128)
    for fused, logits in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(fused, logits, rtol=1e-4, atol=1e-5)


def test_heads_with_an_adapter_are_not_fused() -> None:
    from peft import LoraConfig, get_peft_model

    for options in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", **options))
        assert plan_loss(model, "auto", "nll").head is None
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    assert plan_loss(model, "auto", "nll").head is not None


def test_the_check_of_a_head_does_not_change_the_model() -> None:
    model = tiny_model("llama")
    ids = torch.arange(5)[None]
    before = model(input_ids=ids).logits
    plan = plan_loss(model, "fused", "nll")
    with plan.outputs_are_hidden():
        assert model(input_ids=ids).logits.shape[-1] == model.config.hidden_size
    assert torch.equal(model(input_ids=ids).logits, before)
    assert "forward" not in vars(model.get_output_embeddings())

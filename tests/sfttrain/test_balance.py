"""The auxiliary loss of experts: its weight in a step, and its absence in evaluation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from sftprep.errors import ConfigError
from sfttrain.data.batching import collate_packs
from tests.sfttrain.packs import MemoryPacks, make_pack
from tests.sfttrain.tiny import tiny_model
from tests.sfttrain.trainer_factory import losses, make_sft_trainer

PACKS = MemoryPacks([make_pack([9], seed=1, trained=1.0), make_pack([12], seed=2, trained=1.0)])


def step_reference(model: Any, weight: float, rate: float) -> dict[str, torch.Tensor]:
    """Return the parameters after one step, from separate forwards of both packs.

    The loss is the mean over all tokens plus the weighted mean of the auxiliary losses.
    """
    tokens = sum(len(pack.input_ids) - 1 for pack in PACKS.packs)
    total: Any = 0.0
    for pack in PACKS.packs:
        ids = collate_packs([pack])["input_ids"]
        out = model(input_ids=ids, output_router_logits=True, use_cache=False)
        total = (
            total
            + functional.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="sum") / tokens
        )
        total = total + weight * out.aux_loss / len(PACKS)
    total.backward()
    return {
        name: value.detach() - rate * value.grad
        for name, value in model.named_parameters()
        if value.grad is not None
    }


@pytest.mark.parametrize("requested", [None, 0.0, 0.5])
@pytest.mark.parametrize("loss_impl", ["fused", "logits"])
def test_a_step_adds_the_weighted_auxiliary_loss(
    tmp_path: Path, requested: float | None, loss_impl: str
) -> None:
    model = tiny_model("qwen3_moe", router_aux_loss_coef=0.25)
    wanted = step_reference(copy.deepcopy(model), 0.25 if requested is None else requested, 0.1)
    trainer = make_sft_trainer(
        model,
        tmp_path,
        PACKS,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        router_aux_loss_coef=requested,
        loss_impl=loss_impl,
    )
    trainer.train()
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(
            value, wanted.get(name, value), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any("aux_loss" in entry for entry in trainer.state.log_history) == (requested != 0.0)
    assert len(losses(trainer)) == 1
    assert not trainer.model.config.output_router_logits


def test_a_weight_is_rejected_for_a_model_without_experts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no experts"):
        make_sft_trainer(tiny_model("llama"), tmp_path, PACKS, router_aux_loss_coef=0.1)
    assert make_sft_trainer(tiny_model("llama"), tmp_path, PACKS, router_aux_loss_coef=0.0)

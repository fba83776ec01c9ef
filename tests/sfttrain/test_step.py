"""One step of training: no waiting for the device, bfloat16 on a CPU, and no trained token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.sfttrain.packs import MemoryPack, MemoryPacks, make_pack, make_packs
from tests.sfttrain.test_trainer import losses, trainer_for, weights
from tests.sfttrain.test_weights import weigh
from tests.sfttrain.tiny import tiny_model

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class Waits(TorchDispatchMode):
    """Recorder of operations whose result is read on the host, which wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        by_mask = name.startswith("index") and any(
            t is not None and t.dtype == torch.bool for t in indices
        )
        if name in WAITING or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_recorder_detects_operations_that_wait() -> None:
    with Waits() as waits:
        some = torch.arange(4)
        some[some > 1].sum().item()
        bool((some == 1).any())
    assert len(waits.seen) == 3


@pytest.mark.parametrize(
    ("loss_impl", "weighted", "settings"),
    [
        ("logits", False, {}),
        ("fused", False, {}),
        ("logits", True, {}),
        ("fused", True, {"loss_type": "dft"}),
        ("fused", False, {"neftune_noise_alpha": 5.0}),
    ],
)
def test_a_micro_step_does_not_wait_for_the_device(
    tmp_path: Path, loss_impl: str, weighted: bool, settings: dict[str, Any]
) -> None:
    packs = [
        weigh(make_pack([5, 9, 4], seed=n)) if weighted else make_pack([5, 9, 4], seed=n)
        for n in range(4)
    ]
    trainer = trainer_for(
        tmp_path, packs=MemoryPacks(packs), loss_impl=loss_impl, max_steps=2, **settings
    )
    step, counts = trainer.training_step, []

    def watched(*args: Any, **options: Any) -> Any:
        with Waits() as waits:
            found = step(*args, **options)
        counts.append(waits.seen)
        return found

    trainer.training_step = watched
    trainer.train()
    assert counts == [[], []]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_bfloat16_on_a_cpu_is_near_float32(tmp_path: Path, kind: str) -> None:
    runs = []
    for bf16 in (False, True):
        trainer = trainer_for(tmp_path, model=tiny_model(kind), bf16=bf16, learning_rate=2e-3)
        trainer.train()
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        runs.append(losses(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=2e-2)
    assert runs[1] != runs[0]
    assert runs[1][-1] < runs[1][0]


@pytest.mark.parametrize(
    ("nothing", "settings"),
    [
        ("masked", {"loss_impl": "logits"}),
        ("masked", {"loss_impl": "fused"}),
        ("masked", {"attn": "unpack"}),
        ("weight 0", {"loss_impl": "fused", "loss_type": "dft"}),
        ("one token each", {"loss_impl": "logits"}),
    ],
)
def test_a_step_without_a_trained_token_has_loss_0_and_changes_no_weight(
    tmp_path: Path, nothing: str, settings: dict[str, Any]
) -> None:
    pack = make_pack(
        [1] * 9 if nothing == "one token each" else [4, 5],
        trained=0.0 if nothing == "masked" else 1.0,
    )
    if nothing == "weight 0":
        pack = MemoryPack(
            pack.input_ids, pack.completion_mask, pack.seq_lengths, np.zeros(9, np.float32)
        )
    trainer = trainer_for(
        tmp_path,
        packs=MemoryPacks([pack] * 4),
        max_steps=2,
        eval_dataset=MemoryPacks([pack]),
        **settings,
    )
    before = weights(trainer.model)
    trainer.train()
    assert losses(trainer) == [0.0, 0.0]
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer.model).items())
    assert trainer.evaluate()["eval_loss"] == 0.0


def test_a_micro_batch_without_a_trained_token_does_not_change_a_step(tmp_path: Path) -> None:
    empty = make_pack([4, 5], trained=0.0)
    some = make_packs(3, seed=3).packs
    with_empty, without = (
        trainer_for(
            tmp_path,
            packs=MemoryPacks(p),
            optim="sgd",
            max_steps=1,
            train_sampling_strategy="sequential",
            **settings,
        )
        for p, settings in (
            ([*some, empty], {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
            (some, {"per_device_train_batch_size": 3}),
        )
    )
    with_empty.train()
    without.train()
    assert losses(with_empty) == pytest.approx(losses(without), rel=1e-6)
    theirs = weights(without.model)
    for name, value in weights(with_empty.model).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)

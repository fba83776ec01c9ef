"""A run stops at the step at which its loss, gradient or weights are not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from sftprep import build
from sftprep.errors import TrainingDiverged
from sfttrain.cli import main
from sfttrain.finite import FiniteGuard
from tests.train.face import COMPLETIONS, face, model_folder
from tests.train.packs import MemoryPacks, make_pack
from tests.train.test_trainer import PACKS, trainer_for
from tests.train.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), tokenizer_dir)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in COMPLETIONS * 10))
    build(data, tokenizer=model, output=folder / "o", max_length=64)
    return folder / "o"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("rate", "more"),
    [
        ("1e30", []),
        ("1e30", ["--use_peft"]),
        ("1e38", ["--save_steps", "1"]),
        ("1e38", ["--max_steps", "1"]),
    ],
)
def test_a_learning_rate_that_destroys_the_model_ends_the_command(
    shards: Path, model: Path, tmp_path: Path, capsys: Any, rate: str, more: list[str]
) -> None:
    code = main(
        [
            *("run", str(shards), "--model", str(model), "--output_dir", str(tmp_path / "o")),
            *("--use_cpu", "--max_steps", "5", "--learning_rate", rate, "--optim", "sgd"),
            *("--lr_scheduler_type", "constant", "--max_grad_norm", "0", *more),
        ]
    )
    error = capsys.readouterr().err
    assert code == 1, error
    assert "error: " in error
    assert "--learning_rate" in error
    assert files(tmp_path) == []
    if rate == "1e30":
        # The weights are destroyed by the first step, and the second one has a loss of NaN.
        assert "at step 2, trained on" in error
        assert "data.jsonl:" in error
    else:
        assert "weights are not finite after step 1" in error


class Poisoned(torch.nn.Module):
    """A hook that makes the gradient or the loss of some steps infinite, or not a number."""

    def __init__(self, value: float, after: int) -> None:
        super().__init__()
        self.value, self.left = value, after

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        return gradient if self.left >= 0 else gradient * self.value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_used(
    tmp_path: Path, value: float, max_grad_norm: float
) -> None:
    trainer = trainer_for(
        tmp_path,
        max_grad_norm=max_grad_norm,
        save_strategy="steps",
        save_steps=1,
        logging_steps=100,
    )
    trainer.model.model.norm.weight.register_hook(Poisoned(value, after=3))
    with pytest.raises(TrainingDiverged, match=r"the gradient norm is (nan|inf) at step 4"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (1, 2, 3)]


def test_the_rows_of_the_device_batch_at_fault_are_named(shards: Path, model: Path) -> None:
    """Of a step of four packs, those whose loss is not finite: their files and lines."""
    from sftprep import open_shards

    packs = open_shards(shards)
    trainer = trainer_for(
        shards.parent / "out", model=tiny_model("llama", vocab_size=600), packs=packs,
        per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=1,
        max_steps=-1,
    )  # fmt: skip
    order = trainer.step_plan().order(0)
    marked = packs[int(order[6])]  # in the second step
    token = int(marked.input_ids[5])
    others = [packs[int(k)] for k in order[:8] if k != order[6]]
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *given: Any, **options: Any) -> Any:
        loss = compute(model, inputs, *given, **options)
        same = inputs["input_ids"].shape[1] == len(marked.input_ids)
        return loss * math.nan if same and bool(inputs["input_ids"][0, 5] == token) and (
            inputs["input_ids"][0].tolist() == marked.input_ids.tolist()
        ) else loss  # fmt: skip

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    with pytest.raises(TrainingDiverged, match="the loss is nan at step 2") as caught:
        trainer.train()
    named = {packs.manifest.locate(int(origin))[1] for origin in marked.origin}
    lines = [int(part.split(",")[0].split()[0]) for part in caught.value.message.split(":")[1:]]
    assert set(lines) <= named
    assert len(lines) == min(10, len(named))
    assert others


def test_rows_of_a_dataset_are_named_by_their_numbers(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{k} tea?", "completion": " red" * (3 + k)} for k in range(6)]
    trainer = face(model, tmp_path, rows, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(TrainingDiverged, match=r"trained on train_dataset:\d"):
        trainer.train()


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_a_step_that_the_scaler_skips_is_not_a_fault(tmp_path: Path, optim: str) -> None:
    """Gradients that overflow in fp16 are how its scaler finds a scale."""
    trainer = trainer_for(tmp_path, max_steps=4, gradient_accumulation_steps=2, optim=optim)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.create_optimizer()
    trainer.accelerator.scaler = scaler
    trainer.accelerator.native_amp = True
    hook = Poisoned(math.inf, after=0)
    trainer.model.model.norm.weight.register_hook(
        lambda gradient: hook(gradient) if trainer.state.global_step == 1 else gradient
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert scaler.get_scale() < 4.0
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


class ManyRanks:
    """What `FiniteGuard` uses of an accelerator. others: what the other ranks report."""

    scaler = None

    def __init__(self, others: float) -> None:
        self.others = others

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return value + self.others


def test_every_rank_stops_where_one_has_a_fault() -> None:
    guard = FiniteGuard(ManyRanks(1.0), lambda origin: f"a:{origin}")
    guard.add_batch(torch.tensor(1.0), [7, -1])
    with pytest.raises(TrainingDiverged, match="not finite in another process at step 3"):
        guard.check_gradient(1.0, 3)
    with pytest.raises(TrainingDiverged, match="weights are not finite after step 3, so"):
        guard.check_weights(torch.nn.Linear(2, 2), 3)


def test_a_scaler_that_skips_every_step_ends_the_run() -> None:
    class Halving:
        scale = 65536.0

        def get_scale(self) -> float:
            self.scale /= 2
            return self.scale

    accelerator = ManyRanks(0.0)
    accelerator.scaler = Halving()  # type: ignore[assignment]
    guard = FiniteGuard(accelerator, str)
    for step in range(50):
        guard.add_batch(torch.tensor(math.inf), [])
        guard.check_gradient(math.inf, step)
        if step < 49:
            guard.check_step(step)
    with pytest.raises(TrainingDiverged, match="last 50 steps were skipped"):
        guard.check_step(49)


def test_weights_are_checked_before_each_save(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.train()
    with torch.no_grad():
        trainer.model.model.norm.weight[3] = math.nan
    with pytest.raises(TrainingDiverged, match=r"not finite after step 1 \(model\.norm\.weight\)"):
        trainer.save_model()
    with pytest.raises(TrainingDiverged):
        trainer._save_checkpoint(trainer.model, None)
    assert files(tmp_path) == []


def test_frozen_weights_are_not_checked(tmp_path: Path) -> None:
    """What a base has from the start is not of this run."""
    trainer = trainer_for(tmp_path, max_steps=1)
    parameter = trainer.model.lm_head.weight
    parameter.requires_grad = False
    with torch.no_grad():
        parameter[5] = math.inf
    trainer.save_model()
    assert (tmp_path / "model.safetensors").exists()


def test_the_methods_that_are_extended_still_exist() -> None:
    """They are transformers' own; without them, nothing would be checked."""
    for name in ("training_step", "_get_grad_norm", "_maybe_log_save_evaluate", "_save_checkpoint"):
        assert callable(getattr(Trainer, name))


def test_packs_without_origins_are_named_by_nothing(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, packs=MemoryPacks([make_pack([5, 9], seed=n) for n in range(4)])
    )
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.nan
    with pytest.raises(TrainingDiverged, match=r"^the loss is nan at step 1\n"):
        trainer.train()
    assert len(PACKS) > 0
    assert np.isfinite(trainer.state.global_step)

"""A run stops at the step at which its loss, gradient or weights are not finite."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer

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
        assert "the step was trained on" in error
        assert "data.jsonl:" in error


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
    device = torch.device("cpu")

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
    for check in (guard.check_weights, guard.check_all):
        with pytest.raises(
            TrainingDiverged,
            match=r"weights are not finite after step 3, so.*; the step was trained on a:7",
        ):
            check(torch.nn.Linear(2, 2), 3)


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


@pytest.mark.parametrize("where", ["frozen", "buffer"])
def test_all_tensors_are_checked_before_the_final_save(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those that are not trained; a checkpoint needs the trained ones only."""
    trainer = trainer_for(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    if where == "frozen":
        layer = torch.nn.Linear(2, 2)
        layer.weight.requires_grad = False
        trainer.model.extra = layer
        tensor, name = layer.weight, r"extra\.weight"
    else:
        trainer.model.register_buffer("extra", torch.zeros(3))
        tensor, name = trainer.model.extra, "extra"
    with torch.no_grad():
        tensor.view(-1)[1] = math.inf
    trainer.train()
    assert "the model is not finite before training (extra" in caplog.text
    assert (tmp_path / "checkpoint-1").exists()
    with pytest.raises(TrainingDiverged, match=rf"not finite after step 1 \({name}\)"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


def test_buffers_that_are_not_saved_are_not_checked(tmp_path: Path) -> None:
    """Such as a mask, which is made of infinities."""
    trainer = trainer_for(tmp_path)
    trainer.model.register_buffer("mask", torch.full((3,), -math.inf), persistent=False)
    trainer.save_model()
    assert (tmp_path / "model.safetensors").exists()


def test_the_base_of_an_adapter_is_not_checked_with_it(tmp_path: Path) -> None:
    """It is not saved."""
    trainer = trainer_for(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight[5] = math.inf
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_merged_model_that_is_not_finite_is_not_saved(
    tmp_path: Path, model: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value of the base that no row touches shows up in the merged model only."""
    base = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        base.model.embed_tokens.weight[599] = math.nan
    base.config.tie_word_embeddings = False
    base.save_pretrained(tmp_path / "base")
    for file in model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    code = main(
        [
            *("run", str(shards), "--model", str(tmp_path / "base"), "--use_cpu"),
            *("--output_dir", str(tmp_path / "o"), "--max_steps", "1", "--use_peft", "--merge"),
            *("--lora_target_modules", "q_proj"),
        ]
    )
    error = capsys.readouterr().err
    assert code == 1, error
    assert "the merged model is not finite (model.embed_tokens.weight)" in error
    assert (tmp_path / "o" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "o" / "merged").exists()


def test_weights_are_checked_before_they_are_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pushed(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Trainer, "push_to_hub", pushed)
    trainer = trainer_for(tmp_path)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.nan
    with pytest.raises(TrainingDiverged, match="so they are not saved"):
        trainer.push_to_hub()
    assert files(tmp_path) == []


def test_a_training_step_of_ones_own_is_checked_by_its_gradient(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)

    def training_step(model: Any, inputs: Any, items: Any = None) -> torch.Tensor:
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=items) * math.nan
        trainer.accelerator.backward(loss)
        return loss.detach()

    trainer.training_step = training_step  # type: ignore[method-assign]
    with pytest.raises(TrainingDiverged, match="the gradient norm is nan at step 1"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("greater", [True, False])
def test_an_evaluation_that_is_not_finite_is_never_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, greater: bool
) -> None:
    trainer = trainer_for(
        tmp_path, metric_for_best_model="loss", greater_is_better=greater, eval_dataset=PACKS
    )
    for value in (math.nan, math.inf, -math.inf):
        assert not trainer._determine_best_metric({"eval_loss": value}, None)
    assert trainer._determine_best_metric({"eval_loss": 2.0}, None)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.nan
    trainer.evaluate()
    assert "eval_loss is nan at step 0" in caplog.text


def test_the_methods_that_are_extended_still_exist() -> None:
    """They are transformers' own; without them, nothing would be checked."""
    names = ["training_step", "_get_grad_norm", "_maybe_log_save_evaluate", "_save_checkpoint"]
    names += ["get_batch_samples", "push_to_hub", "_determine_best_metric", "_save_rng_state"]
    for name in names:
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

"""A run stops at the step at which its loss, gradient or weights are not finite."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from sftprep import build
from sftprep.errors import TrainingDiverged
from sfttrain.cli.main import main
from sfttrain.finite import FiniteGuard, names_not_finite
from tests.sfttrain.packs import MemoryPacks, make_pack
from tests.sfttrain.test_trainer import PACKS, trainer_for
from tests.sfttrain.tiny import tiny_model
from tests.sfttrain.trainer_factory import COMPLETIONS, make_sft_trainer


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
    """The error names the files and lines of only those of four packs whose loss is not finite."""
    from sftprep import open_shards

    packs = open_shards(shards)
    trainer = trainer_for(
        shards.parent / "out", model=tiny_model("llama", vocab_size=600), packs=packs,
        per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=1,
        max_steps=-1,
    )  # fmt: skip
    order = trainer.step_plan().order(0)
    contents = [packs[int(number)].input_ids.tolist() for number in order[:8]]
    # In the second step, and equal to no pack of the first one.
    marked = packs[int(order[next(k for k in range(4, 8) if contents[k] not in contents[:4])])]
    token = int(marked.input_ids[5])
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


def test_rows_of_a_dataset_are_named_by_their_numbers(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{k} tea?", "completion": " red" * (3 + k)} for k in range(6)]
    trainer = make_sft_trainer(model, tmp_path, rows, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(TrainingDiverged, match=r"trained on train_dataset:\d"):
        trainer.train()


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_a_step_that_the_scaler_skips_is_not_a_fault(tmp_path: Path, optim: str) -> None:
    """The scaler of fp16 finds its scale by gradients that overflow."""
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
    """The part of an accelerator that `FiniteGuard` uses; `others` is the sum of other ranks."""

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
    with pytest.raises(
        TrainingDiverged,
        match=r"weights are not finite after step 3, so.*; the step was trained on a:7",
    ):
        guard.check_saved(torch.nn.Linear(2, 2), 3)


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


def with_extra_tensor(trainer: Any, where: str) -> torch.Tensor:
    """A tensor of the model that no step changes."""
    if where == "frozen":
        trainer.model.extra = torch.nn.Linear(2, 2)
        trainer.model.extra.weight.requires_grad = False
        return trainer.model.extra.weight
    trainer.model.register_buffer("extra", torch.zeros(3))
    return trainer.model.extra


class Poisoning(TrainerCallback):
    """Calls a function when a step has ended, or before its update."""

    def __init__(
        self, poison: Callable[[], Any], step: int, *, before_update: bool = False
    ) -> None:
        self.poison, self.step, self.before_update = poison, step, before_update

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.before_update and state.global_step == self.step:
            self.poison()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.before_update and state.global_step + 1 == self.step:
            self.poison()


@pytest.mark.parametrize("where", ["frozen", "buffer"])
def test_tensors_that_are_not_trained_are_checked_before_each_save(
    tmp_path: Path, where: str
) -> None:
    """Callbacks can change them, so one check is not enough."""
    trainer = trainer_for(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    tensor = with_extra_tensor(trainer, where)
    trainer.add_callback(Poisoning(lambda: tensor.view(-1)[1].fill_(math.inf), 2))
    with pytest.raises(TrainingDiverged, match=r"not finite after step 2 \(extra"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]
    with pytest.raises(TrainingDiverged, match=r"not finite after step 2 \(extra"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("where", ["frozen", "buffer"])
def test_a_model_that_could_never_be_saved_is_not_trained(tmp_path: Path, where: str) -> None:
    trainer = trainer_for(tmp_path)
    with torch.no_grad():
        with_extra_tensor(trainer, where).view(-1)[1] = math.nan
    with pytest.raises(TrainingDiverged, match=r"not finite before training \(extra"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_states_of_the_optimizer_are_checked_before_a_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, optim="adamw_torch", max_steps=2, save_strategy="steps", save_steps=1
    )
    norm = trainer.model.model.norm.weight

    def poison() -> None:
        trainer.optimizer.state[norm]["exp_avg_sq"][0] = math.inf

    trainer.add_callback(Poisoning(poison, 2))
    with pytest.raises(
        TrainingDiverged,
        match=r"states of the optimizer are not finite after step 2 \(exp_avg_sq of model\.norm",
    ):
        trainer.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]


@pytest.mark.parametrize("key", ["lr", "betas", "weight_decay"])
def test_settings_of_the_optimizer_are_checked_before_a_checkpoint(
    tmp_path: Path, key: str
) -> None:
    trainer = trainer_for(
        tmp_path, optim="adamw_torch", max_steps=2, save_strategy="steps", save_steps=1
    )

    def poison() -> None:
        group = trainer.optimizer.param_groups[1]
        group[key] = (0.9, math.nan) if key == "betas" else math.nan

    trainer.add_callback(Poisoning(poison, 2))
    with pytest.raises(TrainingDiverged, match=rf"not finite after step 2 \({key} of group 1\)"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]


@pytest.mark.parametrize("place", ["embedding", "other adapter", "modules_to_save"])
def test_every_tensor_that_peft_saves_is_checked(tmp_path: Path, place: str) -> None:
    """This includes frozen tensors: fully saved embeddings and other adapters."""
    model = tiny_model("llama", tie_word_embeddings=False)
    layers = ["q_proj", "embed_tokens"] if place == "embedding" else ["q_proj"]
    modules = ["norm"] if place == "modules_to_save" else None
    adapted = get_peft_model(model, LoraConfig(target_modules=layers, modules_to_save=modules))
    if place == "other adapter":
        adapted.add_adapter("other", LoraConfig(target_modules=layers))
        adapted.set_adapter("default")
    part = {"embedding": "embed_tokens.base_layer", "other adapter": "lora_B.other"}.get(
        place, "norm.modules_to_save"
    )
    tensor = next(p for name, p in adapted.named_parameters() if part in name)
    trainer = trainer_for(tmp_path, model=adapted, max_steps=1)
    trainer.add_callback(Poisoning(lambda: tensor.data.view(-1)[-1].fill_(math.nan), 1))
    trainer.train()
    for save in (trainer.save_model, lambda: trainer._save_checkpoint(trainer.model, None)):
        with pytest.raises(TrainingDiverged, match="weights are not finite after step 1"):
            save()
    assert files(tmp_path) == []


@pytest.mark.parametrize("guard", [True, False])
def test_a_model_file_that_is_not_finite_is_named_as_such(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], guard: bool
) -> None:
    """Without this check, the isolation guard would blame packing."""
    bad = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        bad.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    bad.save_pretrained(tmp_path / "bad")
    for file in model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "bad")
    arguments = ["run", str(shards), "--model", str(tmp_path / "bad"), "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path / "o"), "--max_steps", "1"]
    code = main([*arguments, *([] if guard else ["--no_isolation_guard"])])
    error = capsys.readouterr().err
    assert code == 2, error
    assert "the model has non-finite weights: model.layers.1.mlp.up_proj.weight" in error


@pytest.mark.parametrize("how", ["gradient", "weights"])
def test_weights_that_an_update_destroys_are_blamed_on_its_step(tmp_path: Path, how: str) -> None:
    trainer = trainer_for(tmp_path, max_steps=4)
    norm = trainer.model.model.norm.weight
    trainer._row_name = lambda origin: f"data:{origin}"  # type: ignore[method-assign]
    trainer._finite._locate = trainer._row_name
    rows: list[list[int]] = []
    add = trainer._finite.add_batch

    def add_batch(loss: torch.Tensor, origins: Any) -> None:
        rows.append([7 + len(rows)])
        add(loss, rows[-1])

    trainer._finite.add_batch = add_batch  # type: ignore[method-assign]

    def poison() -> None:
        target = norm.grad if how == "gradient" else norm.data
        assert target is not None
        target[0] = math.nan

    trainer.add_callback(Poisoning(poison, 2, before_update=how == "gradient"))
    with pytest.raises(
        TrainingDiverged,
        match=r"non-finite in step 2 or before \(model\..*\); the rows of step 2: data:8\n",
    ):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("saved", [True, False])
def test_the_step_of_a_fault_is_named_as_known_only_after_a_check_before_it(
    tmp_path: Path, saved: bool
) -> None:
    """Not every step reads all weights; each save does."""
    strategy = {"save_strategy": "steps", "save_steps": 2} if saved else {}
    trainer = trainer_for(tmp_path, max_steps=5, **strategy)
    norm = trainer.model.model.norm.weight
    trainer.add_callback(Poisoning(lambda: norm.data[0].fill_(math.nan), 3))
    step = "in step 3" if saved else "in step 3 or before"
    with pytest.raises(TrainingDiverged, match=rf"weights became non-finite {step} \(model"):
        trainer.train()


def test_the_remedy_of_a_divergence_is_not_to_resume_with_another_rate(tmp_path: Path) -> None:
    """A resume keeps the learning rate of its checkpoint."""
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.train()
    with torch.no_grad():
        trainer.model.model.norm.weight[3] = math.nan
    with pytest.raises(TrainingDiverged) as caught:
        trainer.save_model()
    assert "start a new run with a lower learning_rate" in caught.value.remedy
    assert 'model="OUTPUT_DIR/checkpoint-N"' in caught.value.remedy


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_value_that_is_not_finite_is_found(kind: torch.dtype) -> None:
    """A sum that overflows although all values are finite is not a fault."""
    large = torch.full((1000,), torch.finfo(kind).max, dtype=kind)
    assert names_not_finite({"a": large, "b": -large}) == []
    for value in (math.nan, math.inf, -math.inf):
        for place in (0, 517, 999):
            bad = large.clone()
            bad[place] = value
            bad[(place + 1) % 1000] = -value
            assert names_not_finite({"a": large, "b": bad}) == ["b"]


def test_buffers_that_are_not_saved_are_not_checked(tmp_path: Path) -> None:
    """A mask is such a buffer, and has infinite values."""
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
    """A value of the base that no row uses has an effect only in the merged model."""
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


def test_an_overridden_training_step_is_checked_by_its_gradient(tmp_path: Path) -> None:
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
    """They are methods of transformers; if they were renamed, nothing would be checked."""
    names = ["training_step", "_get_grad_norm", "_maybe_log_save_evaluate", "_save_checkpoint"]
    names += ["get_batch_samples", "push_to_hub", "_determine_best_metric", "_finalize_training"]
    names += ["_load_from_checkpoint", "_load_best_model", "_load_optimizer_and_scheduler"]
    names += ["_load_rng_state", "_load_scaler", "_run_epoch", "init_hf_repo"]
    names += ["_push_from_checkpoint", "_finish_current_push"]
    for name in names:
        assert callable(getattr(Trainer, name))


def test_packs_without_origins_are_named_by_nothing(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, packs=MemoryPacks([make_pack([5, 9], seed=n) for n in range(4)])
    )
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *given, **options: compute(*given, **options) * math.nan  # type: ignore[method-assign]
    with pytest.raises(TrainingDiverged, match=r"^the loss is nan at step 1\n"):
        trainer.train()
    assert len(PACKS) > 0
    assert np.isfinite(trainer.state.global_step)

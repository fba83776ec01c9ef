"""A run resumes from a checkpoint without a seal only if its files belong together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from sftprep.errors import ConfigError, MismatchError
from sfttrain.checkpoints.seal import SEAL_NAME, STATE_NAME, seal_checkpoint
from sfttrain.checkpoints.select import find_checkpoint
from tests.sfttrain.test_trainer import PACKS, assert_same_run, trainer_for
from tests.sfttrain.tiny import tiny_model
from tests.support import at_most

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    settings = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    trainer_for(folder, max_steps=4, **settings).train()
    return folder


@pytest.fixture
def newest(run: Path, tmp_path: Path) -> Path:
    """The newest checkpoint of a copy of the run, without its seal."""
    folder = Path(shutil.copytree(run, tmp_path / "run")) / "checkpoint-4"
    (folder / SEAL_NAME).unlink()
    return folder


def chosen(newest: Path, **settings: Any) -> str:
    trainer = trainer_for(newest.parent, optim="adamw_torch", max_steps=5, **settings)
    trainer.train(resume_from_checkpoint=True)
    return Path(str(trainer.resumed_from)).name


def from_older(name: str) -> Change:
    return lambda newest: shutil.copy(newest.parent / "checkpoint-2" / name, newest / name)


def without_recorded_steps(newest: Path) -> None:
    """Rewrite the state as older versions did."""
    state = json.loads((newest / STATE_NAME).read_text())
    del state["steps"], state["settings"]
    (newest / STATE_NAME).write_text(json.dumps(state))


def swapped(newest: Path) -> None:
    content = (newest / "optimizer.pt").read_bytes()
    shutil.copy(newest / "scheduler.pt", newest / "optimizer.pt")
    (newest / "scheduler.pt").write_bytes(content)


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def write(newest: Path) -> None:
        tensors = load_file(newest / "model.safetensors")
        change(tensors)
        save_file(tensors, newest / "model.safetensors", metadata={"format": "pt"})

    return write


def with_infinite_state(newest: Path) -> None:
    content = torch.load(newest / "optimizer.pt", weights_only=True)
    content["state"][3]["exp_avg"].view(-1)[0] = float("inf")
    torch.save(content, newest / "optimizer.pt")


NORM = "model.norm.weight"


def test_a_complete_checkpoint_is_chosen(newest: Path) -> None:
    assert chosen(newest) == "checkpoint-4"
    without_recorded_steps(newest)
    assert chosen(newest) == "checkpoint-4"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (from_older("optimizer.pt"), "optimizer.pt is of step 2, not of 4"),
        (from_older("scheduler.pt"), "scheduler.pt is of step 2, not of 4"),
        (from_older("trainer_state.json"), "trainer_state.json is of step 2"),
        (from_older(STATE_NAME), "its files are of the steps 2 and 4"),
        (swapped, "optimizer.pt holds no optimizer"),
        (
            lambda f: shutil.copy(f / "optimizer.pt", f / "scheduler.pt"),
            "scheduler.pt holds no schedule",
        ),
        (
            lambda f: shutil.copy(f / "training_args.bin", f / "rng_state.pth"),
            "rng_state.pth holds no random states",
        ),
        (with_infinite_state, "optimizer.pt is not finite (exp_avg of parameter 3)"),
        (
            with_tensors(lambda t: t.pop(NORM)),
            f"model.safetensors has no tensor {NORM}, which the model has",
        ),
        (
            with_tensors(lambda t: t.update(x=torch.ones(2))),
            "model.safetensors has a tensor x, which the model does not",
        ),
        (
            with_tensors(lambda t: t.update({NORM: torch.ones(5)})),
            f"model.safetensors has {NORM} as [5], not [32]",
        ),
        (
            with_tensors(lambda t: t[NORM].fill_(float("nan"))),
            f"model.safetensors is not finite ({NORM})",
        ),
    ],
)
def test_a_checkpoint_with_contradicting_files_is_skipped(
    newest: Path, caplog: pytest.LogCaptureFixture, change: Change, why: str
) -> None:
    change(newest)
    assert chosen(newest) == "checkpoint-2"
    assert f"not complete: checkpoint-4 ({why}" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_steps_that_were_not_recorded_are_compared_with_the_folder(newest: Path, name: str) -> None:
    without_recorded_steps(newest)
    from_older(name)(newest)
    assert chosen(newest) == "checkpoint-2"


def test_the_scaler_of_fp16_may_have_skipped_steps(newest: Path) -> None:
    without_recorded_steps(newest)
    from_older("optimizer.pt")(newest)
    torch.save({}, newest / "scaler.pt")
    assert find_checkpoint("latest", str(newest.parent)).endswith("checkpoint-4")
    with pytest.raises(MismatchError, match=r"scaler of .*checkpoint-4 does not fit this run"):
        chosen(newest)  # which is not in fp16


def test_a_sealed_copy_under_another_step_is_skipped(newest: Path) -> None:
    shutil.rmtree(newest)
    shutil.copytree(newest.parent / "checkpoint-2", newest)
    assert chosen(newest) == "checkpoint-2"


def test_the_tensors_of_an_adapter_are_those_of_its_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trainer(**options: Any) -> Any:
        layers = LoraConfig(target_modules=["q_proj"], r=options.pop("r", 4))
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        return trainer_for(tmp_path, peft_config=layers, **settings, **options)

    trainer().train()
    (tmp_path / "checkpoint-4" / SEAL_NAME).unlink()
    good = trainer()
    good.train(resume_from_checkpoint=True)
    assert str(good.resumed_from).endswith("checkpoint-4")
    (tmp_path / "checkpoint-4" / SEAL_NAME).unlink(missing_ok=True)
    # A LoRA of another rank: the files of the sealed checkpoint are intact, but do not fit.
    with pytest.raises(MismatchError, match=r"weights of .*checkpoint-2 do not fit this run"):
        trainer(r=2).train(resume_from_checkpoint=True)
    assert "lora_A.weight as [4, 32], not [2, 32]" in caplog.text


def test_tied_heads_may_be_missing(tmp_path: Path) -> None:
    def trainer(steps: int) -> Any:
        model = tiny_model("llama", tie_word_embeddings=True)
        settings = {"save_strategy": "steps", "save_steps": 2}
        return trainer_for(tmp_path, model=model, max_steps=steps, **settings)

    trainer(4).train()
    (tmp_path / "checkpoint-4" / SEAL_NAME).unlink()
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=True)
    assert str(resumed.resumed_from).endswith("checkpoint-4")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("sealed", [True, False])
def test_experts_are_resumed_although_their_names_in_files_differ(
    tmp_path: Path, kind: str, sealed: bool
) -> None:
    """Trainer loads tensors by their names, so without our code the experts keep their values."""
    settings = {"optim": "sgd", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_for(tmp_path, model=tiny_model(kind), **settings)
    whole.train()
    if not sealed:
        (tmp_path / "checkpoint-2" / SEAL_NAME).unlink()
    resumed = trainer_for(tmp_path, model=tiny_model(kind), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(whole, resumed)


def test_the_best_model_has_its_experts(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        model=tiny_model("qwen3_moe"),
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        eval_dataset=PACKS,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    trainer._load_best_model()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=name)


def test_a_best_checkpoint_that_was_deleted_is_an_error(tmp_path: Path) -> None:
    """The last weights are not saved in its place."""
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ConfigError, match="no final model is saved"):
        trainer._load_best_model()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_states_that_do_not_fit_raise_a_mismatch_error(newest: Path, name: str) -> None:
    """They do so even if a seal confirms that the files have the content that was written."""
    from sfttrain.checkpoints.seal import seal_checkpoint

    torch.save({"other": 1}, newest / name)
    seal_checkpoint(newest)
    trainer = trainer_for(newest.parent, optim="adamw_torch", max_steps=5)
    with pytest.raises(MismatchError, match=r"of .*checkpoint-4 do not fit this run"):
        trainer.train(resume_from_checkpoint=str(newest))


@pytest.mark.parametrize("is_sealed", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "notes.json", SEAL_NAME])
def test_a_pipe_or_a_device_in_a_checkpoint_does_not_block_the_resume(
    run: Path, tmp_path: Path, name: str, is_sealed: bool
) -> None:
    newest = Path(shutil.copytree(run, tmp_path / "run")) / "checkpoint-4"
    seal = newest / SEAL_NAME
    if is_sealed and name != SEAL_NAME:
        content = json.loads(seal.read_text())
        content["files"][name] = {"bytes": 0, "xxh3": "0" * 32}
        seal.write_text(json.dumps(content))
    else:
        seal.unlink()
    os.mkfifo(newest / name)
    with at_most(60):
        assert chosen(newest, save_strategy="no") == "checkpoint-2"
        if name != SEAL_NAME:
            seal_checkpoint(newest)


def test_a_torn_checkpoint_is_written_again(run: Path, tmp_path: Path) -> None:
    newest = Path(shutil.copytree(run, tmp_path / "run")) / "checkpoint-4"
    path = newest / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    assert chosen(newest, save_strategy="steps", save_steps=2) == "checkpoint-2"
    assert path.stat().st_size == size

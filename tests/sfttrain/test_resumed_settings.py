"""A resume logs which settings of optimizer and schedule apply, and refuses other optimizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sftprep.errors import MismatchError
from sfttrain.checkpoints.seal import SEAL_NAME, STATE_NAME
from sfttrain.checkpoints.select import RunState
from tests.sfttrain.test_trainer import trainer_for, weights

FIRST: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer_for(folder, **FIRST, save_strategy="steps", save_steps=2).train()
    return folder


def resumed(run: Path, **changes: Any) -> Any:
    trainer = trainer_for(run, **{**FIRST, **changes})
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    return trainer


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 5e-3}, "learning_rate is 0.001, not 0.005"),
        ({"weight_decay": 0.5}, "weight_decay is 0.0, not 0.5"),
        ({"adam_beta2": 0.5}, "adam_beta1 and adam_beta2 is (0.9, 0.999), not (0.9, 0.5)"),
    ],
)
def test_optimizer_settings_of_the_checkpoint_apply(
    run: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], said: str
) -> None:
    same = resumed(run)
    assert "goes on" not in caplog.text
    other = resumed(run, **changes)
    assert caplog.text.count("the optimizer continues with the settings of the checkpoint") == 1
    assert said in caplog.text
    for name, value in weights(other.model).items():
        assert value.equal(weights(same.model)[name])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_scheduler_type": "constant"}, "lr_scheduler_type is constant, was linear"),
        ({"warmup_steps": 4}, "warmup_steps is 4, was 0"),
    ],
)
def test_the_shape_of_the_schedule_is_that_of_this_run(
    run: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], said: str
) -> None:
    other = resumed(run, **changes)
    assert caplog.text.count("continues as specified for this run") == 1
    assert said in caplog.text
    rates = [entry["learning_rate"] for entry in other.state.log_history if "loss" in entry]
    assert rates[-1] == pytest.approx(1e-3 if "lr_scheduler_type" in changes else 7.5e-4)


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
@pytest.mark.parametrize("older", [True, False])
def test_another_kind_of_optimizer_is_refused(
    run: Path, tmp_path: Path, optim: str, older: bool
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    if older:  # which did not record its settings
        (copy / "checkpoint-2" / SEAL_NAME).unlink()
        state = json.loads((copy / "checkpoint-2" / STATE_NAME).read_text())
        del state["settings"], state["steps"]
        (copy / "checkpoint-2" / STATE_NAME).write_text(json.dumps(state))
    with pytest.raises(MismatchError, match=f'this run has optim="{optim}"') as caught:
        resumed(copy, optim=optim)
    assert caught.value.exit_code == 2
    # The same optimizer, computed in another way.
    assert resumed(copy, optim="adamw_torch_fused").state.global_step == 4


def test_the_steps_and_settings_are_recorded(run: Path) -> None:
    state = RunState.load(run / "checkpoint-2")
    assert state.steps == {"trainer": 2, "optimizer": 2, "schedule": 2}
    assert state.settings["optim"] == "adamw_torch"
    assert state.settings["lr_scheduler_type"] == "linear"

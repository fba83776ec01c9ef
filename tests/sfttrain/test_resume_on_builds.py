"""A run on a build resumes in the order of its shard lanes, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sftprep import open_shards
from sftprep.errors import MismatchError
from sfttrain import SFTTrainer
from sfttrain.checkpoints.seal import SEAL_NAME, STATE_NAME
from sfttrain.checkpoints.select import RunState
from tests.sfttrain.builds import write_build
from tests.sfttrain.packs import make_packs
from tests.sfttrain.test_trainer import losses, trainer_for, weights

TOKENIZER = {"name": "", "fingerprint": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a build in `packs`, and a run on it in `run`: 14 packs, 4 in a step."""
    folder = tmp_path_factory.mktemp("lanes")
    write_build(folder / "packs", make_packs(14), tokenizer=TOKENIZER, shard_packs=3)
    run = trainer_on(folder / "packs", folder / "run", save_strategy="steps", save_steps=3)
    run.train()
    (folder / "losses.json").write_text(json.dumps(losses(run)))
    return folder


def trainer_on(build: Path, output: Path, **settings: Any) -> SFTTrainer:
    steps = {"gradient_accumulation_steps": 2, "max_steps": 7, **settings}
    return trainer_for(output, packs=str(build), **steps)


def copy_run(folder: Path, target: Path, **changes: Any) -> str:
    """Copy the run with other values in the state of its first checkpoint; None removes one."""
    checkpoint = shutil.copytree(folder / "run", target / "run") / "checkpoint-3"
    state = {**json.loads((checkpoint / STATE_NAME).read_text()), **changes}
    left = {name: value for name, value in state.items() if value is not None}
    (checkpoint / STATE_NAME).write_text(json.dumps(left))
    (checkpoint / SEAL_NAME).unlink()
    return str(checkpoint)


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, tmp_path: Path, step: int) -> None:
    """Step 3 is in the first epoch, which has 4 steps; step 6 is in the second."""
    wanted = json.loads((folder / "losses.json").read_text())
    resumed = trainer_on(folder / "packs", tmp_path / "out")
    resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{step}"))
    assert losses(resumed) == wanted
    straight = trainer_on(folder / "packs", tmp_path / "straight")
    straight.train()
    for name, value in weights(straight.model).items():
        assert torch.equal(value, weights(resumed.model)[name])


def test_a_checkpoint_has_the_position_in_the_order(folder: Path) -> None:
    digest = open_shards(folder / "packs").manifest.data_digest
    for step, epoch, position in ((3, 0, 12), (6, 1, 8)):
        state = RunState.load(folder / "run" / f"checkpoint-{step}")
        assert (state.data, state.seed, state.lanes) == (digest, 42, 4)
        assert (state.epoch, state.position) == (epoch, position)
        assert state.build == str(folder / "packs")


def test_a_resume_keeps_the_number_of_lanes(folder: Path, tmp_path: Path) -> None:
    checkpoint = copy_run(folder, tmp_path, lanes=2)
    trainer = trainer_on(folder / "packs", tmp_path / "out")
    assert trainer.step_plan().state(0)["lanes"] == 4
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.step_plan().state(0)["lanes"] == 2


def test_another_build_is_refused_and_both_are_named(folder: Path, tmp_path: Path) -> None:
    other = write_build(
        tmp_path / "other", make_packs(14, seed=1), tokenizer=TOKENIZER, shard_packs=3
    )
    trainer = trainer_on(other, tmp_path / "out")
    with pytest.raises(MismatchError) as caught:
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    for build in (folder / "packs", other):
        digest = open_shards(build).manifest.data_digest[:16]
        assert f"{build} with the digest {digest}" in caught.value.message


def test_the_build_may_be_elsewhere(folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(folder / "packs", tmp_path / "moved"))
    trainer = trainer_on(moved, tmp_path / "out")
    trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-6"))
    assert trainer.state.global_step == 7


def test_a_checkpoint_without_lanes_is_refused(folder: Path, tmp_path: Path) -> None:
    """Earlier versions trained on a permutation of all packs."""
    fields = ("lanes", "epoch", "position", "build")
    checkpoint = copy_run(folder, tmp_path, **dict.fromkeys(fields))
    trainer = trainer_on(folder / "packs", tmp_path / "out")
    with pytest.raises(MismatchError, match=r"another order .* or by an earlier version") as caught:
        trainer.train(resume_from_checkpoint=checkpoint)
    assert 'train_sampling_strategy="sequential"' in caught.value.remedy
    assert f'model="{checkpoint}"' in caught.value.remedy
    # In the order of the build, earlier versions trained on the same packs.
    sequential = trainer_on(
        folder / "packs", tmp_path / "out", train_sampling_strategy="sequential"
    )
    sequential.train(resume_from_checkpoint=checkpoint)
    assert sequential.state.global_step == 7


@pytest.mark.parametrize(
    ("changes", "message", "remedy"),
    [
        (
            {"train_sampling_strategy": "sequential"},
            "another order",
            'use train_sampling_strategy="random"',
        ),
        ({"data_seed": 3}, "seed 42, but this run has 3", "seed=42"),
        (
            {"dataloader_drop_last": True},
            "pack 12 of epoch 0; in this run, its step is at pack 0 of epoch 1",
            "dataloader_drop_last",
        ),
    ],
)
def test_another_order_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str, remedy: str
) -> None:
    trainer = trainer_on(folder / "packs", tmp_path / "out", **changes)
    with pytest.raises(MismatchError, match=message) as caught:
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    assert remedy in caught.value.remedy

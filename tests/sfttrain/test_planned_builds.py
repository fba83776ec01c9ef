"""Training on packs that are planned while they are read, with any length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftprep import Shards, open_shards
from sftprep.errors import MismatchError
from sfttrain import SFTConfig, SFTTrainer
from sfttrain.checkpoints.select import RunState
from sfttrain.cli.datasets import open_data
from sfttrain.data.shard_lanes import MOST_PLANNED_LANES
from sfttrain.data.step_plan import BuildOrder, StepPlan
from tests.sfttrain.test_trainer import losses, trainer_for
from tests.shards.layouts import build_layout, write_tokens


@pytest.fixture(scope="module")
def folder(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both layouts of one group, and `groups`, one of several groups."""
    folder = tmp_path_factory.mktemp("layouts")
    draw = np.random.default_rng(0)
    source = write_tokens(folder / "a.jsonl", [(int(n), 0.5) for n in draw.integers(2, 90, 400)])
    for layout in ("packs", "sequences"):
        build_layout(layout, folder, source, tokenizer=tokenizer_dir)
    more = {"group_bytes": 1 << 16, "output": folder / "groups"}
    build_layout("sequences", folder, source, tokenizer=tokenizer_dir, **more)
    return folder


def trainer_on(build: Path, output: Path, **more: Any) -> SFTTrainer:
    steps = {"max_steps": 3, "gradient_accumulation_steps": 2, "allow_mismatch": ["tokenizer"]}
    return trainer_for(output, packs=str(build), **{**steps, **more})


def test_a_run_is_that_on_stored_packs(folder: Path, tmp_path: Path) -> None:
    found = []
    for layout in ("packs", "sequences"):
        trainer = trainer_on(folder / layout, tmp_path / layout)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]


def test_the_requested_length_is_that_of_the_packs(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_on(folder / "sequences", tmp_path, max_length=32)
    assert isinstance(trainer.train_dataset, Shards)
    assert trainer.train_dataset.manifest.max_length == 32
    assert trainer_on(folder / "sequences", tmp_path).train_dataset.manifest.max_length == 64
    # Stored packs keep theirs.
    assert (
        trainer_on(folder / "packs", tmp_path, max_length=32).train_dataset.manifest.max_length
        == 64
    )
    assert open_data(str(folder / "sequences"), 48).manifest.max_length == 48
    assert SFTConfig(output_dir=str(tmp_path)).requested_length is None
    assert SFTConfig(output_dir=str(tmp_path), max_length=1024).requested_length == 1024
    assert SFTConfig(output_dir=str(tmp_path), max_length=None).requested_length is None


def test_a_resume_needs_the_same_packs(folder: Path, tmp_path: Path) -> None:
    trainer_on(folder / "sequences", tmp_path / "run", save_steps=2, save_strategy="steps").train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert RunState.load(checkpoint).packing["max_length"] == 64
    resumed = trainer_on(folder / "sequences", tmp_path / "out", max_length=64)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    other = trainer_on(folder / "sequences", tmp_path / "other", max_length=32)
    with pytest.raises(
        MismatchError, match="max_length=64, but this run has max_length=32"
    ) as caught:
        other.train(resume_from_checkpoint=str(checkpoint))
    assert "use max_length=64" in str(caught.value)
    seed = trainer_for(
        tmp_path / "seed", packs=open_shards(folder / "sequences", seed=1), max_steps=3
    )
    with pytest.raises(MismatchError, match="seed=0, but this run has seed=1"):
        seed.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(MismatchError, match="digest"):
        trainer_on(folder / "packs", tmp_path / "packs").train(
            resume_from_checkpoint=str(checkpoint)
        )


def test_an_epoch_reads_group_by_group_and_has_every_pack_once(folder: Path) -> None:
    shards = open_shards(folder / "groups")
    groups = len(shards.manifest.groups)
    assert groups >= 3
    order = BuildOrder.of(shards, 1, None)
    assert order.lanes.lanes <= min(groups, MOST_PLANNED_LANES)
    assert order.lanes.window == 1
    plan = StepPlan(packs=len(shards), rows=2, world=2, seed=3, build=order)
    epoch = plan.order(0)
    taken = [
        pack
        for step in range(-(-len(shards) // 4))
        for rank in range(2)
        for batch in plan.batches_of_rank(epoch, step, rank)
        for pack in batch.tolist()
    ]
    assert sorted(taken) == list(range(len(shards)))
    # At a time, each lane is in one group.
    ends = np.cumsum([sum(entry.packs) for entry in shards.manifest.groups])
    number = np.searchsorted(ends, epoch[:], side="right")
    lanes = order.lanes.lanes
    for lane in range(lanes):
        of_lane = number[lane::lanes]
        assert np.count_nonzero(np.diff(of_lane)) == len(set(of_lane.tolist())) - 1
    assert json.dumps(shards.plan_settings)

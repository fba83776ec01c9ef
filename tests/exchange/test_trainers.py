"""TRL and transformers train on exports with the losses of sfttrain on the build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict, load_dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sftprep
from tests.sfttrain.trainer_factory import losses, make_sft_trainer, model_folder

trl = pytest.importorskip("trl", reason="compares with TRL")

RUN: dict[str, Any] = {
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
}
"""Each step is a whole epoch, so that the order of the packs does not matter."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), tokenizer_dir)


@pytest.fixture(scope="module")
def packs(build: Path) -> int:
    return len(sftprep.open_shards(build))


@pytest.fixture(scope="module")
def our_losses(
    build: Path, model: Path, packs: int, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    trainer = make_sft_trainer(
        model,
        tmp_path_factory.mktemp("ours"),
        str(build),
        **{**RUN, "per_device_train_batch_size": packs},
    )
    trainer.train()
    return losses(trainer)


@pytest.fixture(scope="module")
def data(build: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetDict:
    folder = tmp_path_factory.mktemp("trl")
    sftprep.export(build, to="trl", output=folder / "out")
    return load_dataset(str(folder / "out"), cache_dir=str(folder / "cache"))


PRINTED: dict[str, Any] = {
    "packing": False,
    "padding_free": True,
    "max_length": None,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}
"""The settings that the export prints."""


def train_with_trl(
    model: Path, data: DatasetDict, packs: int, folder: Path, **settings: Any
) -> Any:
    trainer = trl.SFTTrainer(
        str(model),
        args=trl.SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=packs,
            model_init_kwargs={"attn_implementation": "sdpa"},
            **{**RUN, **settings},
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
    )
    trainer.train()
    return trainer


def test_trl_has_the_losses_of_sfttrain(
    model: Path, data: DatasetDict, packs: int, our_losses: list[float], tmp_path: Path
) -> None:
    trainer = train_with_trl(model, data, packs, tmp_path, **PRINTED)
    assert trainer.train_dataset.column_names == ["input_ids", "labels", "seq_lengths"]
    assert losses(trainer) == pytest.approx(our_losses, rel=1e-5)
    assert our_losses[0] != pytest.approx(our_losses[2], rel=1e-4)  # the model has changed
    assert "eval_loss" in trainer.evaluate()


def test_the_script_has_these_settings(build: Path, tmp_path: Path) -> None:
    script = sftprep.export(build, to="trl", output=tmp_path / "out").script
    for name, value in PRINTED.items():
        shown = str(value).replace("'", '"')
        assert f"    {name}={shown}," in script


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "max_length": 128, "padding_free": False, "dataset_kwargs": None},
        {"padding_free": False},
    ],
    ids=["packed again", "not padding-free"],
)
def test_with_other_settings_trl_has_other_losses(
    settings: dict[str, Any],
    model: Path,
    data: DatasetDict,
    packs: int,
    our_losses: list[float],
    tmp_path: Path,
) -> None:
    """TRL packs the packs again and forgets their sequences, or does not use seq_lengths."""
    trainer = train_with_trl(model, data, packs, tmp_path, **{**PRINTED, **settings})
    assert losses(trainer)[0] != pytest.approx(our_losses[0], rel=1e-5)
    if settings.get("packing"):
        repacked = [length for row in trainer.train_dataset for length in row["seq_lengths"]]
        originally = [length for row in data["train"] for length in row["seq_lengths"]]
        assert len(repacked) < len(originally)


def test_transformers_has_the_losses_of_sfttrain(
    build: Path, model: Path, packs: int, our_losses: list[float], tmp_path: Path
) -> None:
    sftprep.export(build, to="hf", output=tmp_path / "out")
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa"),
        TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=packs,
            **RUN,
        ),
        train_dataset=data["train"],
    )
    torch.manual_seed(0)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(our_losses, rel=1e-5)

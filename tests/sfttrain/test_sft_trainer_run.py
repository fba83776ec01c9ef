"""`sfttrain run` on raw records, and with a YAML file for TRL's command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftprep.errors import ConfigError, InputNotFound
from sfttrain.cli.arguments import RunConfig, read_arguments
from sfttrain.cli.datasets import load_run_datasets, open_data
from sfttrain.cli.main import main
from tests.sfttrain.trainer_factory import CHATS, COMPLETIONS, TEXTS, write_lines


def summary(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["run", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_raw_records_are_prepared_and_trained(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, held_out = (
        write_lines(tmp_path / "a.jsonl", COMPLETIONS),
        write_lines(tmp_path / "b.jsonl", TEXTS),
    )
    where = [
        data,
        "--model",
        str(model),
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
        "--dataset_cache_dir",
        str(tmp_path / "p"),
    ]
    told = summary(
        capsys,
        *where,
        "--eval_data",
        held_out,
        "--packing",
        "--max_length",
        "64",
        "--max_steps",
        "2",
    )
    assert (told["steps"], told["kind"]) == (2, "model")
    assert told["evaluation"]["eval_loss"] > 0
    adapter = summary(
        capsys, *where, "--use_peft", "--lora_r", "4", "--max_steps", "2", "--no_isolation_guard"
    )
    assert adapter["kind"] == "adapter"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_yaml_file_of_trl_is_accepted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = f"""
model_name_or_path: {model}
torch_dtype: float32
dataset_name: {write_lines(tmp_path / "chats.jsonl", CHATS)}
output_dir: {tmp_path / "out"}
dataset_cache_dir: {tmp_path / "p"}
max_length: 128
packing: true
eval_packing: false
assistant_only_loss: true
dataset_num_proc: 1
learning_rate: 2.0e-4
warmup_ratio: 0.1
gradient_checkpointing: true
gradient_checkpointing_kwargs: {{use_reentrant: false}}
use_peft: true
lora_r: 4
lora_target_modules: [q_proj, v_proj]
model_init_kwargs:
max_steps: 2
use_cpu: true
"""
    (tmp_path / "sft.yaml").write_text(settings)
    told = summary(capsys, "--config", str(tmp_path / "sft.yaml"))
    assert (told["kind"], told["steps"]) == ("adapter", 2)
    (tmp_path / "sft.yaml").write_text(settings + "dataset_nam: x\n")
    with pytest.raises(ConfigError, match="unknown setting 'dataset_nam'"):
        read_arguments(["--config", str(tmp_path / "sft.yaml")])


def test_data_are_found_by_path_pattern_or_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert open_data(path) == path
    assert open_data(str(tmp_path)) == str(tmp_path)
    assert open_data(str(tmp_path / "*.jsonl")) == str(tmp_path / "*.jsonl")
    with pytest.raises(InputNotFound, match=r"the file or folder .* does not exist"):
        open_data(str(tmp_path / "nothing"))
    assert load_run_datasets(RunConfig(data=path, dataset_name=path), evaluating=True) == (
        path,
        None,
    )
    with pytest.raises(InputNotFound, match="no/such-dataset cannot be loaded"):
        load_run_datasets(
            RunConfig(data="no/such-dataset", dataset_name="no/such-dataset"), evaluating=False
        )
    monkeypatch.setattr(
        "datasets.load_dataset", lambda path, **_: {"train": TEXTS, "test": COMPLETIONS}
    )
    named = RunConfig(data="a/b", dataset_name="a/b")
    assert load_run_datasets(named, evaluating=True) == (TEXTS, COMPLETIONS)
    assert load_run_datasets(named, evaluating=False) == (TEXTS, None)
    with pytest.raises(ConfigError, match="has no split valid; it has train, test"):
        load_run_datasets(
            RunConfig(data="a/b", dataset_name="a/b", dataset_train_split="valid"), evaluating=False
        )

"""Training on a build on the Hub, and pushes of the model, with a Hub on loopback."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers.utils import hub as transformers_hub

from sftprep import build, push
from sfttrain.cli.main import main
from tests.sources.hub_server import Repo
from tests.sources.hub_writer import WritableHub
from tests.stores.builds import example_lines, small_settings
from tests.stores.loopback_hub import loopback_hub

NAME = "org/model"


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    # transformers keeps an object with the address.
    with loopback_hub() as found, patch.object(transformers_hub, "_hf_api", None):
        yield found


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("packs")
    (root / "rows.jsonl").write_bytes(example_lines(0, 12))
    settings = small_settings(tokenizer_dir, max_length=64, overlong="truncate")
    build(str(root / "rows.jsonl"), output=str(root / "o"), **settings)
    return root / "o"


def command(data: object, model: Path, output: Path, *more: str) -> list[str]:
    options = ["--use_cpu", "--max_steps", "2", "--logging_steps", "1", "--json"]
    return [
        *("run", str(data), "--model", str(model), "--output_dir", str(output)),
        *("--save_strategy", "no", *options, *more),
    ]


def pushing(data: object, model: Path, output: Path, *more: str) -> list[str]:
    return command(data, model, output, "--push_to_hub", "--hub_model_id", NAME, *more)


def test_a_build_on_the_hub_is_trained_on_like_a_local_one(
    hub: WritableHub, packs: Path, model: Path, tmp_path: Path, capsys: Any
) -> None:
    push(packs, "org/data")
    losses = []
    for data in (packs, "hf://datasets/org/data", "hf://datasets/org/data@main"):
        output = tmp_path / str(len(losses))
        assert main(command(data, model, output)) == 0, capsys.readouterr().err
        losses.append(json.loads(capsys.readouterr().out)["last_loss"])
    assert losses[0] == losses[1] == losses[2]


def test_records_on_the_hub_are_trained_on(
    hub: WritableHub, model: Path, tmp_path: Path, capsys: Any
) -> None:
    hub.repos["datasets", "org/raw"] = Repo({"main": {"train.jsonl": example_lines(0, 8)}})
    assert main(command("hf://datasets/org/raw", model, tmp_path)) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_a_missing_data_set_is_an_error(
    hub: WritableHub, model: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(command("hf://datasets/org/none", model, tmp_path / "o")) == 2
    error = capsys.readouterr().err
    assert "org/none on the Hub does not exist" in error
    assert "hf auth login" in error


def test_the_model_is_pushed(
    hub: WritableHub, packs: Path, model: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(pushing(packs, model, tmp_path)) == 0, capsys.readouterr().err
    found = hub.repos["models", NAME].find("main")
    assert found is not None
    assert found[1]["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("status", "remedy"), [(401, "hf auth login"), (503, "network")])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_push_that_fails_names_the_hub_and_not_the_disk(
    hub: WritableHub, packs: Path, model: Path, tmp_path: Path, capsys: Any,
    status: int, remedy: str, is_late: bool,
) -> None:  # fmt: skip
    """It fails when the repository is created, before training, or when the model is uploaded."""
    hub.status, hub.fails_from = status, 1 if is_late else 0
    assert main(pushing(packs, model, tmp_path)) == 3
    error = capsys.readouterr().err
    assert "error: the Hub: cannot " in error
    assert NAME in error
    assert remedy in error
    assert "disk" not in error
    assert "Traceback" not in error
    assert (tmp_path / "model.safetensors").exists() is is_late


def test_a_failed_push_of_a_checkpoint_is_logged(
    hub: WritableHub, packs: Path, model: Path, tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    hub.status, hub.fails_from, hub.fails_once = 403, 1, True
    more = ["--save_strategy", "steps", "--save_steps", "2", "--hub_strategy", "every_save"]
    with caplog.at_level(logging.WARNING):
        code = main(pushing(packs, model, tmp_path, *more))
    assert code == 0, capsys.readouterr().err
    assert f"a checkpoint was not pushed to {NAME} on the Hub" in caplog.text
    assert "HTTP 403" in caplog.text


def test_no_pushed_file_has_the_token(
    hub: WritableHub, packs: Path, model: Path, tmp_path: Path, capsys: Any
) -> None:
    hub.token = "hf_secret"
    more = ["--save_strategy", "steps", "--save_steps", "1", "--hub_strategy", "all_checkpoints"]
    code = main(pushing(packs, model, tmp_path, *more, "--hub_token", "hf_secret"))
    assert code == 0, capsys.readouterr().err
    found = hub.repos["models", NAME].find("main")
    assert found is not None
    assert "checkpoint-1/training_args.bin" in found[1]
    assert not [
        name
        for files in hub.repos["models", NAME].commits.values()
        for name, data in files.items()
        if b"hf_secret" in data
    ]

"""A checkpoint that is not complete is never resumed from where a complete one exists."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from sftprep.errors import ConfigError, InputNotFound, MismatchError
from sfttrain.cli import main
from sfttrain.resume import SEAL_NAME, STATE_NAME, find_checkpoint, seal_checkpoint
from tests.train.builds import write_build
from tests.train.packs import make_packs
from tests.train.test_trainer import losses, trainer_for
from tests.train.tiny import tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    trainer_for(folder, max_steps=4, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def files_of(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoint-4").iterdir())


def test_a_checkpoint_is_sealed_with_a_digest_of_each_file(run: Path) -> None:
    sealed = json.loads((run / "checkpoint-4" / SEAL_NAME).read_text())["files"]
    assert sorted(sealed) == [name for name in files_of(run) if name != SEAL_NAME]
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", STATE_NAME} < set(sealed)
    assert find_checkpoint("latest", str(run)).endswith("checkpoint-4")


@pytest.mark.parametrize("how", ["truncate", "empty", "flip", "remove"])
def test_any_file_that_is_torn_is_noticed(copy: Path, how: str) -> None:
    good = copy / "good"
    for name in files_of(copy):
        path = copy / "checkpoint-4" / name
        if name == SEAL_NAME:
            continue
        shutil.copy(path, good)
        content = path.read_bytes()
        if how == "remove":
            path.unlink()
        elif how == "flip":
            middle = len(content) // 2
            path.write_bytes(
                content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            )
        else:
            os.truncate(path, len(content) * 2 // 3 if how == "truncate" else 0)
        assert find_checkpoint("latest", str(copy)).endswith("checkpoint-2"), name
        with pytest.raises(
            ConfigError, match=rf"checkpoint-4 is not a complete checkpoint: {name}"
        ):
            find_checkpoint(str(copy / "checkpoint-4"), str(copy))
        shutil.copy(good, path)
    assert find_checkpoint("latest", str(copy)).endswith("checkpoint-4")


@pytest.mark.parametrize("how", ["truncate", "empty", "remove"])
def test_without_digests_all_files_are_read(copy: Path, how: str) -> None:
    """As of a run that was killed before its seal, or of an older version."""
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / SEAL_NAME).unlink()
    assert find_checkpoint("latest", str(copy)).endswith("checkpoint-4")
    good = copy / "good"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", STATE_NAME):
        path = copy / "checkpoint-4" / name
        if how == "remove" and name in ("rng_state.pth", "model.safetensors"):
            continue  # nobody knows that it was there
        shutil.copy(path, good)
        if how == "remove":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size * 2 // 3 if how == "truncate" else 0)
        assert find_checkpoint("latest", str(copy)).endswith("checkpoint-2"), name
        shutil.copy(good, path)


def test_reading_a_checkpoint_without_digests_is_logged(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copy / "checkpoint-4" / SEAL_NAME).unlink()
    with caplog.at_level(logging.WARNING):
        find_checkpoint("latest", str(copy))
    assert f"has no {SEAL_NAME}" in caplog.text
    assert "reading all of its files" in caplog.text
    caplog.clear()
    os.truncate(copy / "checkpoint-4" / "optimizer.pt", 100)
    find_checkpoint("latest", str(copy))
    assert "resuming from checkpoint-2; not complete: checkpoint-4 (optimizer.pt" in caplog.text


def test_a_checkpoint_that_transformers_marks_as_incomplete_is_skipped(copy: Path) -> None:
    (copy / "checkpoint-4" / "checkpoint-is-incomplete.txt").touch()
    assert find_checkpoint("latest", str(copy)).endswith("checkpoint-2")
    # The marker is there while a checkpoint is sealed, and gone afterwards.
    seal_checkpoint(copy / "checkpoint-4")
    (copy / "checkpoint-4" / "checkpoint-is-incomplete.txt").unlink()
    assert find_checkpoint("latest", str(copy)).endswith("checkpoint-4")


def test_without_the_state_of_the_data_a_resume_is_refused(copy: Path) -> None:
    """Otherwise nothing would notice that the run goes on with other data."""
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / STATE_NAME).unlink()
        (copy / f"checkpoint-{step}" / SEAL_NAME).unlink()
    trainer = trainer_for(copy, max_steps=6)
    with pytest.raises(InputNotFound, match=rf"checkpoint-4 \({STATE_NAME} is missing"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match=f"{STATE_NAME} is missing"):
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    (copy / "checkpoint-4" / STATE_NAME).write_text("[]")
    with pytest.raises(MismatchError, match="it is not known which data"):
        trainer.train(resume_from_checkpoint=True)


def test_the_run_goes_on_from_the_older_checkpoint(copy: Path) -> None:
    os.truncate(copy / "checkpoint-4" / "optimizer.pt", 100)
    resumed = trainer_for(copy, max_steps=6)
    resumed.train(resume_from_checkpoint="latest")
    assert resumed.resumed_from == str(copy / "checkpoint-2")
    assert len(losses(resumed)) == resumed.state.global_step == 6


def test_a_resumed_run_may_delete_the_checkpoint_that_it_resumed_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With save_total_limit; the final model is saved all the same."""
    write_build(tmp_path / "packs", make_packs(8), tokenizer={"name": "", "fingerprint": ""})
    tiny_model("llama").save_pretrained(tmp_path / "model")
    arguments = [
        *("run", str(tmp_path / "packs"), "--model", str(tmp_path / "model"), "--use_cpu"),
        *("--output_dir", str(tmp_path / "o"), "--save_steps", "1", "--save_total_limit", "1"),
        *("--json", "--resume_from_checkpoint"),
    ]
    assert main([*arguments, "false", "--max_steps", "2"]) == 0
    (tmp_path / "o" / "model.safetensors").unlink()
    capsys.readouterr()
    assert main([*arguments, "latest", "--max_steps", "4"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 2
    assert summary["resumed_from"].endswith("checkpoint-2")
    assert not (tmp_path / "o" / "checkpoint-2").exists()
    assert (tmp_path / "o" / "model.safetensors").exists()


def test_a_checkpoint_is_complete_only_when_its_last_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed at any moment of a save resumes from the checkpoint before."""
    from sfttrain import trainer as trainer_module

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    trainer = trainer_for(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    real = trainer_module.seal_checkpoint
    calls: list[str] = []

    def second_is_killed(folder: str) -> None:
        calls.append(folder)
        if len(calls) == 2:
            os.truncate(Path(folder) / "optimizer.pt", 1000)
            killed()
        real(folder)

    monkeypatch.setattr(trainer_module, "seal_checkpoint", second_is_killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert find_checkpoint("latest", str(tmp_path)).endswith("checkpoint-2")


def test_pickles_of_a_checkpoint_are_not_loaded_to_check_it(copy: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(copy / "executed"),))

    (copy / "checkpoint-4" / SEAL_NAME).unlink()
    torch.save({"x": Evil()}, copy / "checkpoint-4" / "extra.pt")
    find_checkpoint("latest", str(copy))
    assert not (copy / "executed").exists()

"""A run never resumes from an incomplete checkpoint if a complete one exists."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from sftprep.errors import ConfigError, InputNotFound, MismatchError
from sfttrain.checkpoints.seal import SEAL_NAME, STATE_NAME, Needs, seal_checkpoint
from sfttrain.checkpoints.select import RunState, find_checkpoint
from sfttrain.cli.main import main
from tests.sfttrain.builds import write_build
from tests.sfttrain.packs import make_packs
from tests.sfttrain.test_trainer import PACKS, losses, trainer_for
from tests.sfttrain.tiny import tiny_model


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
def test_any_damaged_file_is_noticed(copy: Path, how: str) -> None:
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
    """The checkpoint is from a run that was killed before its seal, or from an older version."""
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / SEAL_NAME).unlink()
    assert find_checkpoint("latest", str(copy)).endswith("checkpoint-4")
    good = copy / "good"
    needed = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")
    for name in (*needed, STATE_NAME, "trainer_state.json"):
        path = copy / "checkpoint-4" / name
        shutil.copy(path, good)
        if how == "remove":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size * 2 // 3 if how == "truncate" else 0)
        assert find_checkpoint("latest", str(copy)).endswith("checkpoint-2"), name
        shutil.copy(good, path)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        (STATE_NAME, "[]", "is empty or cut short"),
        (STATE_NAME, "{}", "is empty or cut short"),
        (STATE_NAME, '{"data": "x", "packs_per_step": 2}', "has no valid seed"),
        ("trainer_state.json", "{}", "is empty or cut short"),
        ("trainer_state.json", '{"global_step": "4"}', "has no valid global_step"),
    ],
)
def test_without_digests_the_fields_of_the_states_are_checked(
    copy: Path, name: str, content: str, fault: str
) -> None:
    (copy / "checkpoint-4" / SEAL_NAME).unlink()
    (copy / "checkpoint-4" / name).write_text(content)
    assert find_checkpoint("latest", str(copy)).endswith("checkpoint-2")
    with pytest.raises(ConfigError, match=f"{name} {fault}"):
        find_checkpoint(str(copy / "checkpoint-4"), str(copy))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two checkpoints without seals whose files have the right names and are empty."""
    states: dict[str, dict[str, Any]] = {
        "trainer_state.json": {"max_steps": 6, "log_history": []},
        STATE_NAME: {"data": "x", "packs_per_step": 2, "seed": 1},
    }
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        states["trainer_state.json"]["global_step"] = step
        for name, values in states.items():
            (folder / name).write_text(json.dumps(values))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"):
            (folder / name).touch()
    return tmp_path


def step_found(run: Path, **needs: Any) -> str:
    """Return the step of the newest checkpoint that has all files, whatever their content."""
    found = find_checkpoint("latest", str(run), needs=Needs(**needs), check_content=False)
    return Path(found).name.removeprefix("checkpoint-")


def test_without_digests_all_shards_of_the_weights_are_needed(two: Path) -> None:
    newest = two / "checkpoint-4"
    (newest / "model.safetensors").unlink()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (newest / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (newest / shards["a"]).touch()
    assert step_found(two) == "2"
    (newest / shards["b"]).touch()
    assert step_found(two) == "4"


def test_without_digests_the_adapter_is_needed(two: Path) -> None:
    for step, name in ((2, "adapter_model.safetensors"), (4, "adapter_config.json")):
        (two / f"checkpoint-{step}" / "model.safetensors").unlink()
        (two / f"checkpoint-{step}" / name).touch()
    assert step_found(two, adapter=True) == "2"
    (two / "checkpoint-4" / "adapter_model.safetensors").touch()
    assert step_found(two, adapter=True) == "4"


def test_without_digests_the_states_of_all_ranks_are_needed(two: Path) -> None:
    newest = two / "checkpoint-4"
    (newest / "rng_state.pth").rename(newest / "rng_state_0.pth")
    assert step_found(two) == "2"
    (newest / "rng_state_1.pth").touch()
    assert step_found(two) == "4"
    assert step_found(two, ranks=2) == "4"
    state = json.loads((newest / STATE_NAME).read_text())
    (newest / STATE_NAME).write_text(json.dumps({**state, "ranks": 3}))
    assert step_found(two) == "2"
    (newest / "rng_state_2.pth").touch()
    assert step_found(two) == "4"


def test_without_digests_the_position_of_the_stream_is_needed(two: Path) -> None:
    position = json.dumps({"ranks": 2, "state": {}})
    for step, rank in ((2, 0), (2, 1), (4, 0)):
        (two / f"checkpoint-{step}" / f"stream_state-{rank}.json").write_text(position)
    assert step_found(two, stream=True) == "2"
    assert step_found(two) == "4"
    (two / "checkpoint-4" / "stream_state-1.json").write_text(position)
    assert step_found(two, stream=True) == "4"


def test_with_save_only_model_there_is_no_optimizer(two: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (two / "checkpoint-4" / name).unlink()
    assert step_found(two) == "2"
    assert step_found(two, optimizer=False) == "4"


@pytest.mark.parametrize("target", ["/nonexistent/x", "model.safetensors"])
@pytest.mark.parametrize("name", ["model.safetensors", SEAL_NAME])
def test_a_link_that_leads_nowhere_is_a_fault_of_its_checkpoint(
    copy: Path, caplog: pytest.LogCaptureFixture, name: str, target: str
) -> None:
    path = copy / "checkpoint-4" / name
    path.unlink()
    path.symlink_to(name if target == "model.safetensors" else target)
    assert find_checkpoint("latest", str(copy)).endswith("checkpoint-2")
    assert f"checkpoint-4 ({name} " in caplog.text


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_sealed_checkpoint_without_a_required_file_is_skipped(copy: Path, name: str) -> None:
    """The file was removed together with its entry in the seal."""
    seal = copy / "checkpoint-4" / SEAL_NAME
    files = json.loads(seal.read_text())["files"]
    del files[name]
    seal.write_text(json.dumps({"files": files}))
    (copy / "checkpoint-4" / name).unlink()
    assert find_checkpoint("latest", str(copy)).endswith("checkpoint-2")
    assert find_checkpoint("latest", str(copy), check_content=False).endswith("checkpoint-2")


def test_only_folders_named_by_a_step_are_checkpoints(copy: Path) -> None:
    for name in ("checkpoint-²", "checkpoint-٣", "checkpoint-zz-4", "checkpoint-04"):
        (copy / name).mkdir()
    (copy / "checkpoint-9").touch()
    assert find_checkpoint("latest", str(copy)).endswith("checkpoint-4")


@pytest.mark.parametrize("content", ['{"files": {}}', '{"files": []}', "{}", "[]", ""])
def test_a_seal_that_names_no_files_is_not_a_seal(copy: Path, content: str) -> None:
    (copy / "checkpoint-4" / SEAL_NAME).write_text(content)
    assert find_checkpoint("latest", str(copy)).endswith("checkpoint-2")


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
    """Without it, a run that continues with other data would not be noticed."""
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / STATE_NAME).unlink()
        (copy / f"checkpoint-{step}" / SEAL_NAME).unlink()
    trainer = trainer_for(copy, max_steps=6)
    with pytest.raises(InputNotFound, match=rf"checkpoint-4 \({STATE_NAME} is missing"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match=f"{STATE_NAME} is missing"):
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    with pytest.raises(MismatchError, match="it is not known which data"):
        RunState.load(copy / "checkpoint-4")


def test_the_run_resumes_from_the_older_checkpoint(copy: Path) -> None:
    os.truncate(copy / "checkpoint-4" / "optimizer.pt", 100)
    resumed = trainer_for(copy, max_steps=6)
    resumed.train(resume_from_checkpoint="latest")
    assert resumed.resumed_from == str(copy / "checkpoint-2")
    assert len(losses(resumed)) == resumed.state.global_step == 6


def test_a_resumed_run_may_delete_the_checkpoint_that_it_resumed_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """save_total_limit deletes it; the final model is saved nevertheless."""
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
    from sfttrain import saving_trainer

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    trainer = trainer_for(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    real = saving_trainer.seal_checkpoint
    calls: list[str] = []

    def second_is_killed(folder: str) -> None:
        calls.append(folder)
        if len(calls) == 2:
            os.truncate(Path(folder) / "optimizer.pt", 1000)
            killed()
        real(folder)

    monkeypatch.setattr(saving_trainer, "seal_checkpoint", second_is_killed)
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


def test_a_best_checkpoint_that_is_damaged_is_not_loaded(tmp_path: Path) -> None:
    """No final model is saved either."""
    trainer = trainer_for(
        tmp_path,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_dataset=PACKS,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )

    class Damaging(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                path = Path(state.best_model_checkpoint) / "model.safetensors"
                content = bytearray(path.read_bytes())
                content[-3] ^= 1
                path.write_bytes(content)

    trainer.add_callback(Damaging())
    with pytest.raises(
        ConfigError, match=r"best checkpoint, .*checkpoint-\d, is not complete: model\.safetensors"
    ):
        trainer.train()
    assert not (tmp_path / "model.safetensors").exists()

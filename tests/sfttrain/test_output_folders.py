"""A run replaces and deletes only its own folders."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, TrainerCallback

from sftprep.errors import ConfigError, OutputExists, StorageError
from sfttrain.checkpoints.output_folders import rotate_checkpoints, save_errors
from sfttrain.checkpoints.seal import INCOMPLETE_NAME, SEAL_NAME, STATE_NAME
from sfttrain.checkpoints.select import find_checkpoint
from sfttrain.cli.main import main
from tests.preloaded_python import run_python
from tests.sfttrain.builds import write_build
from tests.sfttrain.packs import make_packs
from tests.sfttrain.test_trainer import PACKS, trainer_for
from tests.sfttrain.tiny import tiny_model

USERS = ("checkpoint-7", "checkpoint-notes", "checkpoint-1-best", "checkpoint-000")


def saving(folder: Path, **settings: Any) -> Any:
    return trainer_for(
        folder, **{"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **settings}
    )


def folders_of_users(output: Path, elsewhere: Path) -> list[str]:
    """Create folders of the user that look like newer checkpoints, and a link to another one."""
    for name in USERS:
        (output / name).mkdir(parents=True)
        (output / name / "notes.txt").write_text("mine")
        os.utime(output / name, (time.time() + 9999,) * 2)
    elsewhere.mkdir()
    (elsewhere / SEAL_NAME).write_text('{"files": {}}')
    (output / "checkpoint-5").symlink_to(elsewhere)
    return sorted([*USERS, "checkpoint-5"])


def checkpoints(output: Path) -> list[str]:
    return sorted(p.name for p in output.iterdir())


def test_rotation_deletes_only_checkpoints_of_ours(tmp_path: Path) -> None:
    output = tmp_path / "o"
    theirs = folders_of_users(output, tmp_path / "elsewhere")
    saving(output, save_total_limit=1).train()
    assert checkpoints(output) == sorted([*theirs, "checkpoint-3"])
    assert all((output / name / "notes.txt").read_text() == "mine" for name in USERS)
    assert (tmp_path / "elsewhere" / SEAL_NAME).exists()


def test_rotation_keeps_the_best_checkpoint_and_the_newest(tmp_path: Path) -> None:
    """transformers does so too, and keeps only the best one at the end of training."""

    class FirstIsBest(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            metrics["eval_loss"] = float(state.global_step)

    for limit, left in ((2, ["checkpoint-1", "checkpoint-4"]), (1, ["checkpoint-1"])):
        output = tmp_path / str(limit)
        theirs = folders_of_users(output, tmp_path / f"elsewhere-{limit}")
        trainer = saving(
            output,
            max_steps=4,
            save_total_limit=limit,
            eval_dataset=PACKS,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=False,
        )
        trainer.add_callback(FirstIsBest())
        trainer.train()
        assert trainer.args.save_total_limit == limit
        assert checkpoints(output) == sorted([*theirs, *left])


def test_rotation_goes_by_steps_and_not_by_times(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / SEAL_NAME).touch()
        os.utime(folder, (1000 - step,) * 2)
    rotate_checkpoints(tmp_path, 2, protected={"checkpoint-10"})
    assert checkpoints(tmp_path) == ["checkpoint-10", "checkpoint-4"]
    # Those of an earlier run go before those of this one, whatever their steps.
    rotate_checkpoints(tmp_path, 1, protected=(), own_names={"checkpoint-4"})
    assert checkpoints(tmp_path) == ["checkpoint-4"]


@pytest.mark.parametrize("kind", ["link", "folder", "file", "link in a checkpoint", "dangling"])
@pytest.mark.parametrize("known", [True, False])
def test_a_checkpoint_is_not_written_over_files_of_others(
    tmp_path: Path, kind: str, known: bool
) -> None:
    """If the step is known in advance, the run is refused before training."""
    output, elsewhere = tmp_path / "o", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("mine")
    path = output / "checkpoint-2"
    output.mkdir()
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "trainer_state.json").write_text("mine")
    if kind == "link in a checkpoint":
        (path / STATE_NAME).touch()
        (path / "config.json").symlink_to(elsewhere / "config.json")
    trainer = saving(output)
    if not known:
        trainer._check_checkpoint_folders = lambda: None
    with pytest.raises(OutputExists, match="checkpoint-2"):
        trainer.train()
    assert trainer.state.global_step == (0 if known else 2)
    assert (elsewhere / "config.json").read_text() == "mine"
    assert len(list(elsewhere.iterdir())) == 1
    assert not (tmp_path / "nowhere").exists()
    if kind == "folder":
        assert [p.name for p in path.iterdir()] == ["trainer_state.json"]


def test_an_incomplete_checkpoint_of_ours_is_replaced(tmp_path: Path) -> None:
    """The run was killed right after the first file, or before the last one."""
    saving(tmp_path).train()
    for name in [p.name for p in (tmp_path / "checkpoint-2").iterdir() if p.name != STATE_NAME]:
        (tmp_path / "checkpoint-2" / name).unlink()
    (tmp_path / "checkpoint-3" / SEAL_NAME).unlink()
    os.truncate(tmp_path / "checkpoint-3" / "optimizer.pt", 10)
    resumed = saving(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert str(resumed.resumed_from).endswith("checkpoint-1")
    assert find_checkpoint(str(tmp_path / "checkpoint-2"), "").endswith("checkpoint-2")
    assert find_checkpoint("latest", str(tmp_path)).endswith("checkpoint-3")


class Killed(BaseException):
    """An exception like kill -9: no code of ours catches it."""


@pytest.mark.parametrize("after", ["the model", "the optimizer", "all files"])
def test_a_killed_save_over_an_older_checkpoint_leaves_an_incomplete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Remaining files of the older one are never mixed with files of the new one."""
    from sfttrain import saving_trainer

    saving(tmp_path).train()
    (tmp_path / "checkpoint-3" / "notes.txt").write_text("mine")
    second = saving(tmp_path, learning_rate=0.5)
    name = {"the model": "_save_optimizer_and_scheduler", "the optimizer": "_save_rng_state"}

    def kill(folder: Any) -> None:
        if str(folder).endswith("checkpoint-3"):
            raise Killed

    if after == "all files":
        real = saving_trainer.seal_checkpoint
        monkeypatch.setattr(
            saving_trainer, "seal_checkpoint", lambda folder: (kill(folder), real(folder))
        )
    else:
        save = getattr(second, name[after])
        monkeypatch.setattr(second, name[after], lambda folder: (kill(folder), save(folder)))
    with pytest.raises(Killed):
        second.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    assert find_checkpoint("latest", str(tmp_path)).endswith("checkpoint-2")
    with pytest.raises(ConfigError, match=f"ended while it was being saved \\({INCOMPLETE_NAME}"):
        find_checkpoint(str(tmp_path / "checkpoint-3"), "")
    monkeypatch.undo()
    saving(tmp_path).train(resume_from_checkpoint=True)
    assert find_checkpoint("latest", str(tmp_path)).endswith("checkpoint-3")
    assert not (tmp_path / "checkpoint-3" / INCOMPLETE_NAME).exists()
    # A file of the user's is neither deleted nor sealed.
    assert (tmp_path / "checkpoint-3" / "notes.txt").read_text() == "mine"
    assert "notes.txt" not in (tmp_path / "checkpoint-3" / SEAL_NAME).read_text()


def test_rotation_keeps_files_that_were_added_to_a_checkpoint(tmp_path: Path) -> None:
    saving(tmp_path, max_steps=2).train()
    for name in ("notes.txt", "more/notes.txt"):
        path = tmp_path / "checkpoint-1" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    rotate_checkpoints(tmp_path, 1, protected=["checkpoint-2"])
    assert checkpoints(tmp_path / "checkpoint-1") == ["more", "notes.txt", INCOMPLETE_NAME]
    assert (tmp_path / "checkpoint-1" / "more" / "notes.txt").read_text() == "mine"
    assert find_checkpoint("latest", str(tmp_path)).endswith("checkpoint-2")


def test_rotation_deletes_the_folders_of_sharded_checkpoints(tmp_path: Path) -> None:
    """The checkpoint has no seal, and this run has written it."""
    folder = tmp_path / "checkpoint-1"
    for name in ("pytorch_model_fsdp_0/__0_0.distcp", "global_step1/a/b.pt", "optimizer.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    rotate_checkpoints(tmp_path, 0, protected=(), own_names={"checkpoint-1"})
    assert checkpoints(tmp_path) == []


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    write_build(tmp_path / "packs", make_packs(8), tokenizer={"name": "", "fingerprint": ""})
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return [
        *("run", str(tmp_path / "packs"), "--model", str(tmp_path / "model"), "--use_cpu"),
        *("--output_dir", str(tmp_path / "o"), "--max_steps", "1"),
    ]


def test_a_merged_folder_that_is_not_ours_is_not_replaced(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "o" / "merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("mine")
    command += ["--use_peft", "--merge"]
    assert main(command) == 2
    assert (
        f"{merged} would be replaced, but has files that sfttrain did not write"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "o" / "adapter_model.safetensors").exists()  # nothing was trained
    assert (merged / "config.json").read_text() == "mine"
    (merged / "config.json").unlink()
    for _ in range(2):  # an empty one is fine, and so is that of an earlier run
        assert main(command) == 0, capsys.readouterr().err
    assert json.loads((merged / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("limit", [20_000, 100_000, 400_000])
def test_a_disk_that_is_full_is_a_storage_error(
    tmp_path: Path, command: list[str], limit: int
) -> None:
    """A limit on file sizes makes the same writes fail as a full disk."""
    done = run_python(
        *("-P", "-m", "sfttrain", *command, "--save_steps", "1"), file_size_limit=limit
    )
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    if limit > 3 * size:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 3, done.stderr
    assert f"error: cannot write {tmp_path / 'o' / 'checkpoint-1'}" in done.stderr
    assert "resume with --resume_from_checkpoint latest" in done.stderr


@pytest.mark.parametrize(
    "text", ["[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"]
)
def test_failed_writes_of_torch_are_storage_errors(tmp_path: Path, text: str) -> None:
    with pytest.raises(StorageError, match="cannot write"), save_errors(tmp_path):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="other"), save_errors(tmp_path):
        raise RuntimeError("other")
    with pytest.raises(ConnectionError), save_errors(tmp_path):
        raise ConnectionError(1, "of a push")


TOP_NAMES = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "model-00001-of-00003.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "trainer_state.json", "training_args.bin", "README.md",
    "adapter_config.json", "adapter_model.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder"])
def test_the_final_model_is_not_saved_over_files_of_the_user(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The same applies to a link. The command and the trainer refuse it before training."""
    output, elsewhere = tmp_path / "o", tmp_path / "elsewhere"
    for name in TOP_NAMES if kind in ("file", "link") else TOP_NAMES[:1]:
        output.mkdir()
        elsewhere.write_text("mine")
        path = output / name
        if kind == "file":
            path.write_text("mine")
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(elsewhere if kind == "link" else tmp_path / "nowhere")
        assert main(command) == 2
        assert str(path) in capsys.readouterr().err
        trainer = saving(output)
        for act in (trainer.train, trainer.save_model, trainer.save_state, trainer.push_to_hub):
            with pytest.raises(OutputExists, match=name):
                act()
        assert trainer.state.global_step == 0
        assert checkpoints(output) == [name]
        assert elsewhere.read_text() == "mine"
        assert not (tmp_path / "nowhere").exists()
        path.rmdir() if kind == "folder" else path.unlink()
        output.rmdir()


def test_a_link_is_refused_in_an_output_folder_of_ours_too(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0, capsys.readouterr().err
    (tmp_path / "o" / "config.json").rename(tmp_path / "config.json")
    (tmp_path / "o" / "config.json").symlink_to(tmp_path / "config.json")
    assert main(command) == 2
    assert "config.json is a link, which is not followed" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_the_output_folder_of_an_earlier_run_is_used_again(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    """With or without checkpoints, alongside other files, and after other calls of the trainer."""
    output = tmp_path / "o"
    (output / "runs").mkdir(parents=True)
    (output / "log.txt").write_text("mine")
    for _ in range(2):
        assert main([*command, "--save_strategy", strategy]) == 0, capsys.readouterr().err
    assert not (output / INCOMPLETE_NAME).exists()
    sealed = json.loads((output / SEAL_NAME).read_text())["files"]
    assert {"config.json", "model.safetensors", "trainer_state.json"} <= set(sealed)
    assert "log.txt" not in sealed
    trainer = saving(output, save_strategy=strategy)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    saving(output).train()


@pytest.mark.parametrize("is_sealed", [False, True])
def test_a_model_of_the_user_alongside_our_checkpoints_is_not_replaced(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], is_sealed: bool
) -> None:
    """The user has replaced the model of a run; the checkpoints of the run are still there."""
    output = tmp_path / "o"
    assert main([*command, "--save_strategy", "steps"]) == 0, capsys.readouterr().err
    model = output / "model.safetensors"
    model.write_bytes(b"mine")
    if not is_sealed:
        (output / SEAL_NAME).unlink()
    assert main(command) == 2
    assert "but sfttrain did not write" in capsys.readouterr().err
    assert model.read_bytes() == b"mine"


def test_a_model_is_not_saved_to_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = saving(tmp_path / "o")
    with pytest.raises(ConfigError, match="URLs are not supported"):
        trainer.save_model("s3://bucket/model")
    assert not (tmp_path / "s3:").exists()


def test_a_model_card_does_not_replace_files_of_the_user(tmp_path: Path) -> None:
    output, other = tmp_path / "o", tmp_path / "other.md"
    output.mkdir()
    other.write_text("mine")
    (output / "README.md").symlink_to(other)
    (output / "model.safetensors").write_text("mine too")
    trainer = saving(output)
    with pytest.raises(OutputExists):
        trainer.create_model_card()
    assert (other.read_text(), not (output / SEAL_NAME).exists()) == ("mine", True)
    (output / "README.md").unlink()
    (output / "model.safetensors").unlink()
    trainer.create_model_card()
    assert (output / "README.md").is_file()


def test_a_model_card_of_the_user_is_not_rewritten(tmp_path: Path) -> None:
    """peft extends an existing model card."""
    output = tmp_path / "o"
    saving(output).train()
    (output / "README.md").write_text("mine")
    with pytest.raises(OutputExists, match=r"README\.md would be replaced"):
        saving(output).train()
    (output / "README.md").unlink()
    card = output / "checkpoint-3" / "README.md"
    card.write_text("mine too")
    with pytest.raises(OutputExists, match=r"README\.md would be replaced"):
        saving(output).train()
    assert card.read_text() == "mine too"


def test_a_rotated_checkpoint_with_a_file_of_the_user_can_be_written_again(tmp_path: Path) -> None:
    saving(tmp_path, max_steps=3, save_steps=1).train()
    mine = tmp_path / "checkpoint-2" / "eval_results.json"
    mine.write_text("mine")
    saving(tmp_path, max_steps=3, save_steps=1, save_total_limit=1).train()
    assert mine.read_text() == "mine"
    assert find_checkpoint(True, str(tmp_path)).endswith("checkpoint-3")


def test_a_file_that_was_added_after_a_run_is_not_replaced(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command += ["--save_strategy", "no"]
    assert main(command) == 0, capsys.readouterr().err
    (tmp_path / "o" / "README.md").write_text("mine")
    assert main(command) == 2
    assert "README.md would be replaced" in capsys.readouterr().err


def test_a_final_save_that_is_killed_leaves_a_folder_of_ours(tmp_path: Path) -> None:
    trainer = saving(tmp_path, save_strategy="no")
    trainer.train()

    def killed(*_: Any) -> None:
        raise Killed

    trainer._save = killed
    with pytest.raises(Killed):
        trainer.save_model()
    (tmp_path / "config.json").write_text("half")
    saving(tmp_path, save_strategy="no").train()


@pytest.mark.parametrize("how", ["same", "link", "inside", "checkpoint", "earlier run", "merged"])
def test_a_run_does_not_replace_the_model_that_it_is_started_from(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], how: str
) -> None:
    model, output = tmp_path / "model", tmp_path / "o"
    if how in ("same", "inside"):
        output = model if how == "same" else model / "o"
    elif how == "link":
        output.symlink_to(model)
    else:
        assert main(command) == 0, capsys.readouterr().err
        part = {"earlier run": "", "checkpoint": "checkpoint-1", "merged": "merged"}[how]
        model = output / part
        if how == "merged":
            (tmp_path / "model").rename(model)
    command[3], command[6] = str(model), str(output)
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "the run starts from" in error
    assert "choose another --output_dir" in error
    trainer = saving(output, model=AutoModelForCausalLM.from_pretrained(model))
    with pytest.raises(OutputExists, match="the run starts from"):
        trainer.train()
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


def test_a_model_may_be_elsewhere_in_the_output_folder(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "model").rename(tmp_path / "o" / "base")
    command[3] = str(tmp_path / "o" / "base")
    assert main(command) == 0, capsys.readouterr().err
    # And a resume from a checkpoint there is no start from it.
    command[-1] = "2"
    assert main([*command, "--resume_from_checkpoint", "latest"]) == 0, capsys.readouterr().err


def test_a_backup_of_hard_links_is_not_changed_by_another_run(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`cp -al out backup` is a common way to keep a finished run."""
    output, backup = tmp_path / "o", tmp_path / "backup"
    command += ["--use_peft", "--save_steps", "1"]
    assert main([*command, "--lora_r", "2"]) == 0, capsys.readouterr().err
    files = [path for path in output.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    for path in files:
        link = backup / path.relative_to(output)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, link)
    assert main([*command, "--lora_r", "4", "--seed", "7"]) == 0, capsys.readouterr().err
    changed = [p for p in files if (backup / p.relative_to(output)).read_bytes() != before[p]]
    assert changed == []
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 4


def test_single_saves_do_not_change_a_backup_of_hard_links(tmp_path: Path) -> None:
    output, backup = tmp_path / "o", tmp_path / "backup"
    trainer = saving(output)
    trainer.train()
    backup.mkdir()
    for save, name in (
        (trainer.save_state, "trainer_state.json"),
        (trainer.create_model_card, "README.md"),
    ):
        save()
        os.link(output / name, backup / name)
        (output / name).write_text("before")
        save()
        assert (backup / name).read_text() == "before", name


@pytest.mark.parametrize("has_checkpoints", [True, False])
@pytest.mark.parametrize("name", [SEAL_NAME, INCOMPLETE_NAME])
@pytest.mark.parametrize("content", ["mine", "[]", '{"files": 7}', '{"mine": {}}'])
def test_a_file_of_the_user_with_the_name_of_a_mark_is_not_replaced(
    tmp_path: Path, has_checkpoints: bool, name: str, content: str
) -> None:
    if has_checkpoints:
        (tmp_path / "checkpoint-9").mkdir()
        (tmp_path / "checkpoint-9" / STATE_NAME).touch()
    (tmp_path / name).write_text(content)
    trainer = saving(tmp_path)
    for act in (trainer.train, trainer.save_model, trainer.save_state):
        with pytest.raises(OutputExists, match=name):
            act()
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("marker", ["lists them", "of an older version"])
def test_files_that_the_marker_lists_as_the_users_are_kept(tmp_path: Path, marker: str) -> None:
    """They may have names that our files have."""
    saving(tmp_path, max_steps=2).train()
    folder = tmp_path / "checkpoint-3"
    mine = [folder / "latest", folder / "global_step1" / "thesis.txt", folder / "optimizer_0.bin"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    listed = {path.relative_to(folder).as_posix(): [0, 0] for path in mine}
    (folder / INCOMPLETE_NAME).write_text(
        json.dumps({"others": listed}) if marker == "lists them" else "{}"
    )
    saving(tmp_path).train(resume_from_checkpoint=True)
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert find_checkpoint("latest", str(tmp_path)).endswith("checkpoint-3")


def test_a_rotated_checkpoint_keeps_files_of_the_user_with_names_of_ours(tmp_path: Path) -> None:
    saving(tmp_path, max_steps=2).train()
    mine = [tmp_path / "checkpoint-1" / name for name in ("latest", "README.md")]
    for path in mine:
        path.write_text("mine")
    rotate_checkpoints(tmp_path, 1, protected=["checkpoint-2"])
    with pytest.raises(OutputExists, match=r"README\.md would be replaced"):
        saving(tmp_path, max_steps=2).train()
    assert [path.read_text() for path in mine] == ["mine", "mine"]

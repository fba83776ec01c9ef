"""A build removes and replaces only files that builds wrote, even if a user has files of the same
name."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from sftprep import build, read_manifest, verify
from sftprep.core.atomic_write import is_temporary_name, storage_errors, temporary_name
from sftprep.errors import OutputBusy, OutputExists, StorageError
from sftprep.pipeline import build as build_module
from sftprep.pipeline import workers as workers_module
from sftprep.pipeline.output import folder as output_module
from sftprep.pipeline.passes import tokenize_pass as tokenize_pass_module
from sftprep.shards import layout as layout_module
from sftprep.shards import locks as locks_module
from sftprep.shards.layout import is_work_folder_created
from sftprep.shards.locks import exclusive
from sftprep.shards.ownership import commit_bytes
from tests.faults.test_paths import snapshot
from tests.support import rejected_file

SHARD = "shard-00000-0123456789abcdef.arrow"


@pytest.fixture
def make(records, tokenizer_dir, tmp_path):
    """Build into tmp_path / "o", with another seed each time, so that no build is up to date."""
    rows, seeds = records([{"text": f"a {k}"} for k in range(20)]), count()

    def run(**settings):
        settings = {"output": tmp_path / "o", "overwrite": True, "max_length": 64, **settings}
        settings.setdefault("seed", next(seeds))
        return build(rows, tokenizer=tokenizer_dir, **settings)

    return run


@pytest.mark.parametrize("kept", [True, False])
def test_a_hard_link_with_the_name_of_the_lock_is_not_written_to(make, tmp_path, kept):
    if kept:
        make(keep_spill=True)
    (tmp_path / "o" / "spill").mkdir(parents=True, exist_ok=True)
    (tmp_path / "mine.txt").write_text("precious")
    os.link(tmp_path / "mine.txt", tmp_path / "o" / "spill" / "lock")
    before = snapshot(tmp_path)
    with pytest.raises(OutputExists, match="lock"):
        make()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "lock",
        "commit.json",
        "manifest.json",
        "eval/manifest.json",
        "rejected/0123456789abcdef-0123456789abcdef.jsonl",
        "groups/0123456789abcdef-0123456789abcdef.json",
        "duplicates-00000.npy",
        "recipe-0123456789abcdef.jsonl",
        f"{'0' * 40}.arrow",
        f"shards/{SHARD}",
        "shards/shard-00000",
    ],
)
@pytest.mark.parametrize("content", ["mine", '{"mine": 1}\n', '["rejected.jsonl"]'])
def test_user_files_with_our_names_among_kept_spills_are_kept(make, tmp_path, name, content):
    make(keep_spill=True)
    path = tmp_path / "o" / "spill" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    before = snapshot(tmp_path / "o")
    with pytest.raises(OutputExists, match=rf"spill/{name}"):
        make()
    assert snapshot(tmp_path / "o") == before


def test_only_our_temporary_files_are_removed(make, tmp_path):
    make(keep_spill=True)
    mine = tmp_path / "o" / "spill" / ".build.json.0123456789abcdef01234567.tmp"
    ours = tmp_path / "o" / "spill" / temporary_name("build.json")
    for path in (mine, ours):
        path.write_text("x")
    make()
    assert mine.exists()
    assert not ours.exists()
    assert not is_temporary_name(mine.name)


def test_an_empty_spill_folder_of_a_user_is_kept(make, tmp_path):
    (tmp_path / "o" / "spill").mkdir(parents=True)
    make()
    assert (tmp_path / "o" / "spill").is_dir()
    make(keep_spill=True)
    make()
    assert list((tmp_path / "o" / "spill").iterdir()) == []
    make(output=tmp_path / "other")
    assert not (tmp_path / "other" / "spill").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_fails_without_usable_work_leaves_nothing(
    records, tokenizer_dir, tmp_path, workers
):
    rows = records([{"text": "a b c " * 20}] * 2000)
    (tmp_path / "user" / "spill").mkdir(parents=True)
    for output in ("new/a/b", "user"):
        command = 'ulimit -f 300; exec "$@"'
        arguments = [sys.executable, "-P", "-m", "sftprep", "build", rows]
        arguments += ["--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / output)]
        arguments += ["--workers", str(workers)]
        done = subprocess.run(
            ["bash", "-c", command, "bash", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 3, done.stderr
        assert "ulimit" in done.stderr
    assert not (tmp_path / "new").exists()
    # The empty folder of a user is kept.
    assert list((tmp_path / "user").rglob("*")) == [tmp_path / "user" / "spill"]


@pytest.mark.parametrize("name", ["build.json", "lock", "recipe", "spill"])
def test_a_full_disk_leaves_no_unmarked_folder(make, tmp_path, monkeypatch, name):
    """The next build removes everything that is left."""

    def fail(*_arguments, **_settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(path, *arguments, **settings):
        with storage_errors(path):
            fail()

    if name == "build.json":
        monkeypatch.setattr(layout_module, "write_bytes", refuse)
    elif name == "lock":
        monkeypatch.setattr(locks_module.platform, "node", fail)
    elif name == "recipe":
        monkeypatch.setattr(workers_module, "recipe_file", refuse)
    else:
        monkeypatch.setattr(tokenize_pass_module, "write_spill", refuse)
    with pytest.raises(StorageError):
        make()
    monkeypatch.undo()
    work = tmp_path / "o" / "spill"
    assert not work.exists() or is_work_folder_created(work)
    if name != "lock":
        assert not (tmp_path / "o").exists()
    make()
    assert not work.exists()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "name", ["shards", "eval", "rejected.jsonl", "manifest.json", "notes.txt", "spill/notes.txt"]
)
@pytest.mark.parametrize("as_link", [True, False])
def test_files_that_appear_while_a_build_runs_are_kept(
    make, records, tmp_path, monkeypatch, name, before, as_link
):
    output, mine = tmp_path / "o", tmp_path / "mine"
    if before:
        make()
    mine.mkdir()
    (mine / "file").write_text("precious")
    seen = {}

    def plant(setup):
        path = output / name
        if path.is_dir():
            shutil.move(path, tmp_path / "moved")
        path.unlink(missing_ok=True)
        if as_link:
            path.symlink_to(mine if name in ("shards", "eval") else mine / "file")
        elif name in ("shards", "eval"):
            path.mkdir()
            (path / "mine.txt").write_text("precious")
        else:
            path.write_text("precious")
        seen.update({p: c for p, c in snapshot(tmp_path).items() if not p.startswith("o/spill/")})

    monkeypatch.setattr(build_module, "check_unchanged", plant)
    with pytest.raises(OutputExists, match=name):
        make(seed=1)
    after = snapshot(tmp_path)
    assert seen.items() <= after.items()


@pytest.mark.parametrize("folder", ["", "shards", "eval", "eval/shards"])
def test_a_folder_that_may_not_be_written_is_found_before_the_first_move(
    make, tmp_path, monkeypatch, folder
):
    make(eval_fraction=0.3)
    before = {p: c for p, c in snapshot(tmp_path / "o").items() if not p.startswith("spill")}
    locked, access = tmp_path / "o" / folder, os.access
    monkeypatch.setattr(
        output_module.os,
        "access",
        lambda path, mode: Path(path) != locked and access(path, mode),
    )
    with pytest.raises(StorageError, match=f"cannot write {locked}: {os.strerror(errno.EACCES)}"):
        make(eval_fraction=0.3, seed=7, eval_seed=3)
    monkeypatch.undo()
    assert before.items() <= snapshot(tmp_path / "o").items()
    assert verify(tmp_path / "o").ok
    assert verify(tmp_path / "o" / "eval").ok


def test_a_lock_that_is_removed_while_it_is_taken_is_taken_again(tmp_path, monkeypatch):
    path, flock, raced = tmp_path / "lock", fcntl.flock, []

    def remove_first(file, flags):
        if not raced:
            raced.append(path.unlink())
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with exclusive(path, "another build", tmp_path, remedy=""):
        assert path.exists()
        with (
            pytest.raises(OutputBusy, match=f"process {os.getpid()}"),
            exclusive(path, "another build", tmp_path, remedy=""),
        ):
            pass
    assert not path.exists()


def test_a_lock_of_another_process_is_not_removed(tmp_path):
    path = tmp_path / "lock"
    with exclusive(path, "another build", tmp_path, remedy=""):
        path.unlink()
        path.write_text("of another process")
    assert path.read_text() == "of another process"


@pytest.mark.parametrize("created", [True, False])
def test_the_lock_is_held_until_the_marker_is_gone(make, tmp_path, monkeypatch, created):
    """Otherwise a build that starts at that moment would lose its marker and lock."""
    work = tmp_path / "o" / "spill"
    if not created:
        work.mkdir(parents=True)
    unlink, rename, removed = Path.unlink, os.rename, []

    def watch_unlink(path, **options):
        if path.parent == work and path.name in ("lock", "build.json"):
            removed.append((path.name, (path.parent / "lock").exists()))
        unlink(path, **options)

    def watch_rename(source, target):
        if source == work:
            removed.append((source.name, (source / "lock").exists()))
        rename(source, target)

    monkeypatch.setattr(Path, "unlink", watch_unlink)
    monkeypatch.setattr(output_module.os, "rename", watch_rename)
    make()
    assert removed == ([("spill", True)] if created else [("build.json", True), ("lock", True)])


REJECTED_FILE = "rejected/0123456789abcdef-0123456789abcdef.jsonl"
REJECTED = json.dumps(
    dict.fromkeys(("file", "line", "column", "reason", "message", "excerpt"), "text")
)


@pytest.fixture
def interrupted(make, tmp_path):
    """A folder as a kill leaves it between the writing of `commit.json` and the first move."""

    def leave(names, **settings):
        make(keep_spill=True, **settings)
        output = tmp_path / "o"
        for path in list(output.iterdir()):
            if path.name != "spill":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (output / "spill" / "commit.json").write_bytes(commit_bytes(names))
        return output

    return leave


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "my own notes"),
        ("manifest.json", "{}"),
        ("eval/manifest.json", '{"mine": 1}'),
        (f"shards/{SHARD}", "mine"),
        (REJECTED_FILE, "mine"),
        (REJECTED_FILE, ""),
        (REJECTED_FILE, '{"file": "a", "line": 1, "reason": "mine"}\n'),
        (REJECTED_FILE, f"{REJECTED}\nmine\n"),
        ("groups/0123456789abcdef-0123456789abcdef.json", "mine"),
    ],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_user_files_that_commit_json_names_are_kept(
    make, interrupted, tmp_path, name, content, overwrite
):
    output = interrupted([name, "manifest.json", REJECTED_FILE])
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text(content)
    before = snapshot(output)
    with pytest.raises(OutputExists, match=rf": {name}") as raised:
        make(overwrite=overwrite)
    assert raised.value.exit_code == 2
    assert snapshot(output) == before


def test_own_files_that_commit_json_names_are_replaced(make, interrupted, tmp_path):
    output = interrupted([REJECTED_FILE])
    (output / REJECTED_FILE).parent.mkdir()
    (output / REJECTED_FILE).write_text(f"{REJECTED}\n" * 2)
    make(overwrite=False)
    assert not (output / "rejected").exists()


def test_a_user_file_that_replaced_the_rejected_records_of_a_build_is_kept(
    records, tokenizer_dir, tmp_path
):
    rows = records([{"text": "a b c"}, {"text": 5}] * 5)
    settings = {"on_bad_record": "quarantine", "max_rejected": "100%", "max_length": 64}
    settings |= {"output": tmp_path / "o", "overwrite": True, "tokenizer": tokenizer_dir}
    build(rows, **settings)
    build(rows, **settings)
    path = rejected_file(tmp_path / "o")
    path.write_text("mine")
    with pytest.raises(OutputExists, match=r": rejected/[0-9a-f]{16}-[0-9a-f]{16}\.jsonl"):
        build(rows, **settings)
    assert path.read_text() == "mine"


def test_a_build_whose_group_file_is_damaged_is_replaced(make, tmp_path):
    """The names of its other files are not known, so they are found by the key of the group."""
    make(seed=1, eval_fraction=0.3)
    for folder in ("o", "o/eval"):
        (path,) = (tmp_path / folder / "groups").glob("*.json")
        path.write_text("{}")
    make(seed=2)
    assert verify(tmp_path / "o").ok
    assert len(list((tmp_path / "o" / "groups").iterdir())) == 2
    assert not (tmp_path / "o" / "eval").exists()


def test_a_file_of_a_user_alongside_a_damaged_group_file_is_kept(make, tmp_path):
    make()
    (path,) = (tmp_path / "o" / "groups").glob("*.json")
    path.write_text("{}")
    path.with_name(f"{path.stem}-mine.json").write_text("mine")
    before = snapshot(tmp_path / "o")
    with pytest.raises(OutputExists, match=r"-mine\.json"):
        make()
    assert snapshot(tmp_path / "o") == before


def test_a_lock_left_without_its_marker_does_not_stop_the_next_build(make, tmp_path):
    (tmp_path / "o" / "spill").mkdir(parents=True)
    (tmp_path / "o" / "spill" / "lock").write_text(json.dumps({"pid": 1, "host": "h"}))
    make()
    assert not (tmp_path / "o" / "spill").exists()


@pytest.mark.parametrize("inside", ["new", "shards/new", "spill", "eval", ".hidden/new"])
@pytest.mark.parametrize("finished", [True, False])
def test_an_output_inside_another_build_is_refused(make, tmp_path, inside, finished):
    make(keep_spill=True)
    if not finished:
        (tmp_path / "o" / "manifest.json").unlink()
    before = snapshot(tmp_path / "o")
    with pytest.raises(OutputExists, match=r"is inside .*, which holds a build"):
        make(output=tmp_path / "o" / inside)
    assert snapshot(tmp_path / "o") == before


@pytest.mark.parametrize("folder", ["shards", "eval/shards"])
def test_verify_names_shards_that_no_manifest_lists(make, tmp_path, folder):
    make(eval_fraction=0.3)
    assert verify(tmp_path / "o").ok
    info = read_manifest(tmp_path / "o").shards[0]
    shutil.copy(tmp_path / "o" / "shards" / info.name, tmp_path / "o" / folder / SHARD)
    command = [sys.executable, "-m", "sftprep", "verify", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{folder} holds files that no manifest lists: {SHARD}" in done.stderr

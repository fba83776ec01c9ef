"""The same command on its finished build does nothing, and any other one is no such command."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftprep import build, read_manifest, verify
from sftprep.cli import main
from sftprep.errors import ManifestError, OutputExists
from sftprep.pipeline.executors import base
from sftprep.shards.layout import COMMIT_NAME, MARKER_NAME
from tests.pipeline.builds import content
from tests.pipeline.group_inputs import GROUP_BYTES, texts_of, write
from tests.support import rejected_entries


def state(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return the content, the time and the inode of every file."""
    found = {}
    for name, data in content(folder).items():
        status = os.stat(folder / name)
        found[name] = (data, status.st_mtime_ns, status.st_ino)
    return found


@pytest.fixture
def run(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """A function that builds tmp_path/a.jsonl into tmp_path/o."""
    path = write(tmp_path / "a.jsonl", [*texts_of(700), "{", "[]"])
    settings = {
        "tokenizer": tokenizer_dir,
        "output": tmp_path / "o",
        "max_length": 128,
        "workers": 1,
        "group_bytes": GROUP_BYTES,
        "eval_fraction": 0.1,
        "on_bad_record": "quarantine",
    }

    def run_build(inputs: Any = path, **more: Any) -> Any:
        return build(inputs, **settings | more)

    return run_build


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_same_command_touches_no_file(run: Any, tmp_path: Path, overwrite: bool) -> None:
    first = run()
    assert not first.is_up_to_date
    assert rejected_entries(tmp_path / "o")
    before = state(tmp_path / "o")
    again = run(overwrite=overwrite, workers=2, keep_spill=True)
    assert again.is_up_to_date
    assert state(tmp_path / "o") == before
    assert again.manifest.digest == first.manifest.digest
    assert again.evaluation.digest == first.evaluation.digest


def test_the_manifest_does_not_depend_on_the_times_of_the_inputs(run: Any, tmp_path: Path) -> None:
    first = run()
    os.utime(tmp_path / "a.jsonl", (1, 1))
    second = run(output=tmp_path / "p")
    assert second.manifest.digest == first.manifest.digest
    assert verify(tmp_path / "p").ok


CHANGES: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 64},
    "seed": {"seed": 1},
    "eval_fraction": {"eval_fraction": 0.2},
    "on_bad_record": {"max_rejected": 7},
    "layout": {"layout": "sequences"},
    "train_on": {"train_on": "all"},
    "group_bytes": {"group_bytes": 1 << 30},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_command_needs_overwrite(run: Any, change: str) -> None:
    run()
    with pytest.raises(OutputExists, match=r"holds a finished build .* not known to have the"):
        run(**CHANGES[change])
    assert not run(**CHANGES[change], overwrite=True).is_up_to_date
    assert run(**CHANGES[change]).is_up_to_date
    with pytest.raises(OutputExists):
        run()


def test_changed_inputs_need_overwrite(run: Any, tmp_path: Path) -> None:
    run()
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write(other, texts_of(3))
    stat = os.stat(path)
    for inputs in ([str(path), str(other)], str(other)):
        with pytest.raises(OutputExists):
            run(inputs)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(OutputExists):
        run()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run().is_up_to_date
    with path.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(OutputExists):
        run()


def test_other_versions_of_the_packages_need_overwrite(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftprep.pipeline.output import part_identity

    run()
    versions = {**base.find_versions(), "tokenizers": "0"}
    monkeypatch.setattr(part_identity, "find_versions", lambda: versions)
    with pytest.raises(OutputExists):
        run()


KINDS = ["shards/*/*.arrow", "groups/*.json", "groups/*.index", "manifest*.json"]
DAMAGES = [
    *(
        (part + kind, is_cut)
        for part in ("", "eval/")
        for kind in KINDS
        for is_cut in (False, True)
    ),
    # The size of such a file is not known, as with `verify --quick`.
    ("rejected/*", False),
]


@pytest.mark.parametrize(("kind", "is_cut"), DAMAGES)
def test_a_damaged_build_is_not_up_to_date(
    run: Any, tmp_path: Path, kind: str, is_cut: bool
) -> None:
    folder = tmp_path / "o"
    run()
    paths = [*folder.glob(kind)]
    assert paths
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1]) if is_cut else path.unlink()
    with pytest.raises((OutputExists, ManifestError)) as caught:
        run()
    if kind != "manifest*.json":  # the error names what is damaged, and not only the build
        named = [folder / "eval" if "manifest" in kind else path for path in paths]
        assert any(str(path) in str(caught.value) for path in named)
    try:
        report = run(overwrite=True)
    except OutputExists:  # without a manifest, the files belong to nobody
        assert kind.endswith("manifest*.json")
        return
    assert not report.is_up_to_date
    assert verify(folder).ok
    assert verify(folder / "eval").ok
    assert run().is_up_to_date


def test_an_interrupted_commit_is_completed(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "o"
    run()
    (folder / "spill").mkdir()
    marker = {"sftprep": "an unfinished build works in this folder", "created": True}
    (folder / "spill" / MARKER_NAME).write_text(json.dumps(marker) + "\n")
    (folder / "spill" / COMMIT_NAME).write_text(json.dumps({"sftprep_commit": []}))
    assert not run(overwrite=True).is_up_to_date
    assert not (folder / "spill").exists()
    assert run().is_up_to_date


def test_a_readme_of_the_user_is_no_proof(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "o"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    run()
    with pytest.raises(OutputExists):
        run()
    assert not run(overwrite=True).is_up_to_date
    assert (folder / "README.md").read_text() == "mine"


def test_a_card_with_additions_of_the_user_still_counts(run: Any, tmp_path: Path) -> None:
    run()
    with (tmp_path / "o" / "README.md").open("a") as file:
        file.write("\nadded\n")
    assert run().is_up_to_date
    # A later build leaves the card as it is, and it says nothing of that build.
    run(seed=1, overwrite=True)
    with pytest.raises(OutputExists):
        run()
    with pytest.raises(OutputExists):
        run(seed=1)


def test_a_copied_or_moved_build_is_up_to_date_for_the_same_inputs(
    run: Any, tmp_path: Path
) -> None:
    run()
    (tmp_path / "o").rename(tmp_path / "moved")
    assert run(output=tmp_path / "moved").is_up_to_date


def test_data_in_memory_and_functions_without_a_digest_are_never_up_to_date(
    run: Any, tmp_path: Path
) -> None:
    rows = texts_of(50)
    run(rows, eval_fraction=0)
    with pytest.raises(OutputExists):
        run(rows, eval_fraction=0)
    assert not run(rows, eval_fraction=0, overwrite=True).is_up_to_date
    counter = iter(range(10_000))
    more = {"transform": lambda row: {**row, "text": f"{row['text']} {next(counter)}"}}
    more |= {"output": tmp_path / "functions", "on_bad_record": "quarantine"}
    assert not run(**more).is_up_to_date
    assert not run(**more, overwrite=True).is_up_to_date


def test_a_function_in_a_file_has_to_be_the_same(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def change(row):\n    return {'text': row['text'] + '!'}\n")
    run(transform=f"{path}:change")
    assert run(transform=f"{path}:change").is_up_to_date
    path.write_text("def change(row):\n    return {'text': row['text'] + '?'}\n")
    with pytest.raises(OutputExists):
        run(transform=f"{path}:change")


def test_a_part_of_a_finished_build_is_up_to_date(run: Any, tmp_path: Path) -> None:
    for part in ("1/2", "2/2"):
        assert not run(part=part).is_up_to_date
    run()
    before = state(tmp_path / "o")
    report = run(part="1/2", overwrite=True)
    assert report.is_up_to_date
    assert report.groups_done == report.groups_total == len(read_manifest(tmp_path / "o").groups)
    assert state(tmp_path / "o") == before
    with pytest.raises(OutputExists):
        run(part="1/2", seed=3)


def test_the_command_says_so(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(20))
    command = ["build", path, "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "o")]

    def printed(*more: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*command, *more])
        assert caught.value.code == code
        return capsys.readouterr().out

    assert json.loads(printed("--json"))["status"] == "built"
    assert printed("--overwrite").startswith(f"up to date: {tmp_path / 'o'} has the finished build")
    values = json.loads(printed("--json"))
    assert values["status"] == "up_to_date"
    assert values["accounting"]["records"] == 20
    assert "up to date" in printed("--part", "1/3")
    part = json.loads(printed("--part", "1/3", "--json"))
    assert (part["status"], part["next"]) == ("up_to_date", "nothing")
    assert printed("--seed", "4", code=2) == ""

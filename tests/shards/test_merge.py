"""Merged builds have the groups of all of them, and belong together."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftprep import build, merge, open_shards, read_manifest, verify
from sftprep.cli import main
from sftprep.errors import ManifestError, MismatchError, OutputExists, ShardError
from tests.pipeline.builds import check_accounting, content, texts
from tests.pipeline.group_inputs import GROUP_BYTES, texts_of, write
from tests.support import rejected_entries

Make = Callable[..., Path]


@pytest.fixture
def make(tokenizer_dir: Path, tmp_path: Path) -> Make:
    """Build a file of the given name, with a rejected record, into a folder of that name."""

    def run(name: str, count: int = 900, **more: Any) -> Path:
        rows: list[Any] = texts_of(count, ord(name[0]), name)
        rows[-10] = "{"
        fixed = {"group_bytes": GROUP_BYTES, "max_length": 128, "workers": 1}
        fixed |= {"on_bad_record": "quarantine", "tokenizer": tokenizer_dir}
        path = write(tmp_path / f"{name}.jsonl", rows)
        return build(path, output=tmp_path / name, **(fixed | more)).folder

    return run


def rejected_lines(folder: Path) -> list[tuple[str, int]]:
    return [(Path(entry["file"]).name, entry["line"]) for entry in rejected_entries(folder)]


@pytest.mark.parametrize("can_link", [True, False])
def test_a_merged_build_is_that_of_all_inputs(
    make: Make,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    can_link: bool,
) -> None:
    """Each large file is a group of its own, so the groups of both builds are those of one."""
    more: dict[str, Any] = {"eval_fraction": 0.1, "eval_packing": "none"}
    folders = [make(name, **more) for name in "ab"]
    before = [content(folder) for folder in folders]
    together = build(
        [tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
        tokenizer=tokenizer_dir,
        output=tmp_path / "together",
        group_bytes=GROUP_BYTES,
        max_length=128,
        on_bad_record="quarantine",
        **more,
    )
    if not can_link:

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "link", refuse)
    merged = merge(*folders, output=tmp_path / "c")
    assert [content(folder) for folder in folders] == before
    assert verify(tmp_path / "c").ok
    assert verify(tmp_path / "c" / "eval").ok
    check_accounting(tmp_path / "c")
    names = ("data_digest", "groups", "accounting", "lengths", "plan", "sources", "config")
    expected = read_manifest(together.folder)
    for name in names:
        assert getattr(merged, name) == getattr(expected, name), name
    assert len(read_manifest(tmp_path / "c" / "eval").groups) == 2
    assert texts(tmp_path / "c" / "eval") == texts(tmp_path / "together" / "eval")
    assert rejected_lines(tmp_path / "c") == [("a.jsonl", 891), ("b.jsonl", 891)]
    shards = open_shards(tmp_path / "c")
    assert shards.locate(0, 0)[0] == str(tmp_path / "a.jsonl")
    assert shards.locate(len(shards) - 1, 0)[0] == str(tmp_path / "b.jsonl")
    shard = next((tmp_path / "c" / "shards").rglob("*.arrow"))
    assert (shard.stat().st_nlink == 2) == can_link
    shutil.rmtree(folders[0])
    assert verify(tmp_path / "c").ok


def test_merged_builds_are_merged_again_and_into_one_of_them(make: Make, tmp_path: Path) -> None:
    a, b, c = (make(name, eval_fraction=0.1) for name in "abc")
    merge(a, b, output=tmp_path / "ab")
    merge(tmp_path / "ab", c, output=tmp_path / "abc")
    with pytest.raises(OutputExists, match="holds a finished build"):
        merge(a, b, output=a)
    merge(a, b, output=a, overwrite=True)
    assert content(a) == content(tmp_path / "ab")
    merge(a, c, output=a, overwrite=True)
    assert content(a) == content(tmp_path / "abc")
    assert verify(a).ok
    assert verify(a / "eval").ok


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        ({"max_length": 64}, "max_length is 128 and 64"),
        ({"seed": 4}, "seed is 0 and 4"),
        ({"duplicates": "drop"}, "duplicates is 'keep' and 'drop'"),
        ({"escape_special": True}, "escape_special is False and True"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_builds_with_other_settings_are_refused(
    make: Make, tmp_path: Path, more: dict[str, Any], difference: str
) -> None:
    a, b = make("a"), make("b", **more)
    with pytest.raises(MismatchError) as caught:
        merge(a, b, output=tmp_path / "c")
    assert difference in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_builds_that_do_not_belong_together_are_refused(
    make: Make, tokenizer_dir: Path, folder_with: Callable[[str], Path], tmp_path: Path
) -> None:
    a, b = make("a"), make("b")
    with pytest.raises(MismatchError, match="at least two"):
        merge(a, output=tmp_path / "c")
    with pytest.raises(MismatchError, match=r"have the same records, of .*a\.jsonl"):
        merge(a, b, a, output=tmp_path / "c")
    with pytest.raises(ManifestError, match="does not exist"):
        merge(a, tmp_path / "nothing", output=tmp_path / "c")
    other = folder_with("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(MismatchError, match="chat templates differ"):
        merge(a, make("c", tokenizer=other), output=tmp_path / "c2")
    shard = next((b / "shards").rglob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ShardError, match="bytes, not"):
        merge(a, b, output=tmp_path / "d")
    shard.unlink()
    with pytest.raises(ShardError, match="cannot read"):
        merge(a, b, output=tmp_path / "d")
    assert not (tmp_path / "d").exists() or not (tmp_path / "d" / "manifest.json").exists()


def test_a_build_of_version_1_is_refused(make: Make, tmp_path: Path) -> None:
    golden = Path(__file__).resolve().parents[1] / "golden"
    (old, *_) = (path.parent for path in sorted(golden.rglob("manifest.json")))
    assert read_manifest(old).format_version.startswith("1.")
    with pytest.raises(ManifestError, match="format version 1"):
        merge(make("a"), old, output=tmp_path / "c")


def test_the_command_merges(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make("a"), make("b")
    command = ["merge", str(a), str(b), "--output", str(tmp_path / "c")]
    for more, code in (["--json"], 0), ([], 2), (["--overwrite"], 0):
        with pytest.raises(SystemExit) as ended:
            main([*command, *more])
        assert ended.value.code == code
        shown = capsys.readouterr()
        if more == ["--json"]:
            manifest = read_manifest(tmp_path / "c")
            assert json.loads(shown.out)["data_digest"] == manifest.data_digest
    assert "merged 2 builds" in shown.out

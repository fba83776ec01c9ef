"""Verification finds damage in every file of a build, on any executor and in parts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep import build, open_shards, read_manifest, verify
from sftprep.cli import main
from sftprep.errors import ConfigError, ManifestError, WorkerError
from sftprep.pipeline.executors.local import Processes
from sftprep.shards.group import files_of_group
from sftprep.shards.layout import group_path
from tests.conftest import EXAMPLES
from tests.shards.builds import rewritten, write_build
from tests.shards.test_golden_builds import GOLDEN
from tests.support import thorough


@pytest.fixture(scope="module")
def intact(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of several groups and shards, with rejected and evaluation records."""
    folder = tmp_path_factory.mktemp("intact")
    lines = (EXAMPLES / "data" / "qa.jsonl").read_bytes()
    for name in "abc":
        text = lines.replace(b"the", name.encode()) + b'{"messages": 1}\n'
        (folder / f"{name}.jsonl").write_bytes(text * 3)
    report = build(
        [str(folder / f"{name}.jsonl") for name in "abc"],
        tokenizer=tokenizer_dir,
        encoder="tokenizers",
        output=folder / "o",
        max_length=64,
        shard_tokens=3_000,
        group_bytes=1 << 16,
        eval_fraction=0.05,
        on_bad_record="quarantine",
        max_rejected=1000,
    )
    assert len(report.manifest.groups) > 2
    assert report.manifest.num_shards > 2 * len(report.manifest.groups)
    assert verify(report.folder).ok
    return report.folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """A copy of the build, to be damaged."""
    return Path(shutil.copytree(intact, tmp_path / "o"))


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Change one bit of a file; its time changes with it."""
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)


def shard_paths(folder: Path) -> list[Path]:
    return [folder / "shards" / info.name for info in read_manifest(folder).shards]


def build_files(folder: Path) -> list[Path]:
    """Return the files of the training build, apart from its manifest."""
    names = ("shards", "groups", "rejected")
    return sorted(path for name in names for path in (folder / name).rglob("*.*"))


class Backwards:
    """An executor that runs the last spec first."""

    far = False
    capacity = 3

    def map_unordered(self, fn: Callable[[Any], Any], specs: Iterable[Any]) -> Iterator[Any]:
        return map(fn, [*specs][::-1])

    def close(self) -> None:
        raise AssertionError("the caller closes its executor")


class Elsewhere(Backwards):
    """An executor in another working directory, as that of another machine."""

    far = True

    def __init__(self, place: Path) -> None:
        self._place = place

    def map_unordered(self, fn: Callable[[Any], Any], specs: Iterable[Any]) -> Iterator[Any]:
        with chdir(self._place):
            yield from map(fn, [*specs])


# --- damage ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=thorough(200, default=30))
@given(data=st.data())
def test_any_flipped_bit_is_found_and_its_file_is_named(
    intact: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(intact, tmp_path_factory.mktemp("copy") / "o"))
    path = data.draw(st.sampled_from(build_files(folder)))
    flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(0, 7)))
    problems = verify(folder).problems
    assert problems
    assert all(path.name in problem for problem in problems)
    shutil.rmtree(folder.parent)


def test_any_missing_file_is_found_and_named(intact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(intact, tmp_path / "o"))
    for path in build_files(folder):
        content = path.read_bytes()
        path.unlink()
        for quick in (False, True):
            (problem,) = verify(folder, quick=quick).problems
            assert path.name in problem
        path.write_bytes(content)
    assert verify(folder).ok


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_flipped_bit_of_a_manifest_is_found(folder: Path, place: str) -> None:
    (evaluation,) = (folder / "eval").glob("manifest-*.json")
    for path in (evaluation, folder / "manifest.json"):
        size = path.stat().st_size
        flip(path, {"start": 1, "middle": size // 2, "end": size - 3}[place])
        if path == evaluation:
            (problem,) = verify(folder).problems
            assert "evaluation build" in problem
    with pytest.raises(ManifestError, match=r"manifest\.json "):
        verify(folder)


def test_a_file_of_a_group_and_an_index_are_read_again(folder: Path) -> None:
    """What this process read before is not what is in the file now."""
    manifest = read_manifest(folder)
    names = files_of_group(manifest.groups[1], manifest.read_group(1))[-2:]
    open_shards(folder).sizes([0, len(open_shards(folder)) - 1])
    assert verify(folder).ok
    for name in names:
        flip(folder / name, 100)
        assert any(name in problem for problem in verify(folder).problems)
        flip(folder / name, 100)


@pytest.mark.parametrize("place", ["shards", "groups", "rejected", "eval/shards", "eval/groups"])
def test_files_that_no_manifest_lists_are_named(folder: Path, place: str) -> None:
    (folder / place / "0123456789abcdef.json").touch()
    (folder / place / ".hidden").touch()
    for quick in (False, True):
        (problem,) = verify(folder, quick=quick).problems
        assert f"{place} holds files that no manifest lists: 0123456789abcdef.json;" in problem


def test_a_group_that_cannot_be_read_does_not_make_its_shards_unlisted(folder: Path) -> None:
    entry = read_manifest(folder).groups[1]
    (folder / group_path(entry.key, entry.digest)).unlink()
    found = verify(folder)
    assert len(found.problems) == 1
    assert found.groups == len(read_manifest(folder).groups) - 1


def test_totals_of_a_shard_that_differ_from_its_entry_are_found(tmp_path: Path) -> None:
    write_build(tmp_path / "b", [[4, 4], [3]])
    rewritten(tmp_path / "b", lambda m: m["shards"][0].update(tokens=12))
    for quick in (False, True):
        problems = verify(tmp_path / "b", quick=quick).problems
        assert any("it holds 11 tokens, the file of its group says 12" in p for p in problems)


# --- the order and the number of problems ---------------------------------------------------------


def test_the_result_does_not_depend_on_the_executor(folder: Path, tmp_path: Path) -> None:
    damaged = shard_paths(folder)[1::3]
    for path in damaged:
        flip(path, 2_000)
    expected = verify(folder)
    assert [path.name in text for path, text in zip(damaged, expected.problems, strict=True)] == [
        True
    ] * len(damaged)
    assert verify(folder, executor=Backwards()) == expected
    assert verify(folder, workers=2) == expected
    pool = Processes(2)
    assert verify(folder, executor=pool) == expected
    pool.close()
    with chdir(folder.parent):
        found = verify("o", executor=Elsewhere(Path("/")))
    assert (found.problems, found.tokens) == (expected.problems, expected.tokens)


def test_the_progress_ends_with_the_number_of_shards(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    verify(folder, progress=lambda done, total: calls.append((done, total)))
    total = read_manifest(folder).num_shards
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_the_number_of_named_problems_is_limited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "b"
    write_build(folder, [[1]] * 1010, shard_rows=1)
    for path in shard_paths(folder):
        path.unlink()
    found = verify(folder)
    assert (len(found.problems), found.more_problems) == (1000, 10)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(folder)])
    assert ended.value.code == 1
    output, errors = capsys.readouterr()
    assert output.startswith(f"DAMAGED: 1,010 problems in {folder}; intact: 0 shards, 0 packs")
    lines = errors.splitlines()
    assert len(lines) == 101
    assert lines[-1] == "and 910 more problems"


def test_one_shard_with_many_wrong_values_is_a_few_problems(tmp_path: Path) -> None:
    write_build(tmp_path / "b", [[4, 4]] * 640, shard_rows=640)
    rewritten(tmp_path / "b", lambda m: m["tokenizer"].update(vocab_size=1))
    problems = verify(tmp_path / "b").problems
    assert len(problems) == 6
    assert problems[-1].endswith(": 5 more problems")


# --- parts ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=thorough(100, default=15))
@given(data=st.data(), parts=st.integers(1, 5))
def test_the_parts_find_what_the_whole_finds(
    intact: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, parts: int
) -> None:
    folder = Path(shutil.copytree(intact, tmp_path_factory.mktemp("copy") / "o"))
    for path in data.draw(st.lists(st.sampled_from(build_files(folder)), unique=True, max_size=4)):
        flip(path, data.draw(st.integers(0, 5000)))
    quick = data.draw(st.booleans())
    whole = verify(folder, quick=quick)
    found = [verify(folder, part=f"{i}/{parts}", quick=quick) for i in range(1, parts + 1)]
    assert sorted(text for each in found for text in each.problems) == sorted(whole.problems)
    for name in ("groups", "shards", "rows", "tokens", "sequences", "trained_tokens", "blocks"):
        assert sum(getattr(each, name) for each in found) == getattr(whole, name)
    shutil.rmtree(folder.parent)


def test_a_part_reads_only_its_own_shards(folder: Path) -> None:
    manifest = read_manifest(folder)
    for number, entry in enumerate(manifest.groups):
        if number % 2 == 0:
            shutil.rmtree(folder / "shards" / entry.key)
    assert verify(folder, part="2/2").ok
    assert not verify(folder, part="1/2").ok
    assert verify(folder, part="9/9").ok  # it has no group


def test_the_sums_of_all_groups_are_checked_by_the_first_part(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    write_build(folder, [[4, 4], [3], [2]], group_rows=1)
    rewritten(folder, lambda m: m.update(data_digest="0"))
    assert [verify(folder, part=f"{i}/3").ok for i in (1, 2, 3)] == [False, True, True]


# --- the quick check ------------------------------------------------------------------------------


def test_the_quick_check_finds_damage_in_the_blocks_that_it_reads(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    write_build(folder, [[4, 4]] * 64 * 6 + [[2]], shard_rows=1000)
    (info,) = read_manifest(folder).shards
    (path,) = shard_paths(folder)
    start = 0
    for number, block in enumerate(info.blocks):
        for at in (start, start + block.bytes // 2, start + block.bytes - 1):
            flip(path, at)
            # Seven blocks of packs, and the end of the file.
            assert verify(folder, quick=True).ok == (number not in (0, 3, 6, 7))
            assert not verify(folder).ok
            flip(path, at)
        start += block.bytes
    found = verify(folder, quick=True)
    assert (found.blocks_read, found.blocks) == (4, 8)


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "another"])
def test_the_quick_check_finds_shards_of_another_size_or_content(folder: Path, damage: str) -> None:
    first, second = shard_paths(folder)[:2]
    content = first.read_bytes()
    first.write_bytes(
        {
            "cut": content[:-1],
            "longer": content + b"\0",
            "empty": bytes(len(content)),
            "another": second.read_bytes().ljust(len(content), b"\0")[: len(content)],
        }[damage]
    )
    (problem,) = verify(folder, quick=True).problems
    assert first.name in problem


def test_the_quick_check_has_the_totals_of_the_build(folder: Path) -> None:
    quick, whole = verify(folder, quick=True), verify(folder)
    assert quick.ok
    for name in ("groups", "shards", "rows", "tokens", "sequences", "trained_tokens", "blocks"):
        assert getattr(quick, name) == getattr(whole, name)
    assert "the other blocks of the shards" in quick.unchecked
    assert "the other blocks of the shards" not in whole.unchecked


@pytest.mark.parametrize("name", ["format-1.0", "format-1.1"])
def test_builds_before_version_2_are_checked_in_each_way(name: str) -> None:
    manifest = read_manifest(GOLDEN / name)
    ways: list[dict[str, Any]] = [{}, {"quick": True}, {"executor": Backwards()}]
    for way in ways:
        found = verify(GOLDEN / name, **way)
        assert found.problems == []
        assert (found.tokens, found.sequences) == (manifest.tokens, manifest.accounting.sequences)


# --- settings, and the command --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": "0/3"}, "is not a part"),
        ({"part": "4/3"}, "is not a part"),
        ({"workers": 0}, "workers is 0"),
        ({"executor": "dask"}, "executor is"),
        ({"executor": "ray", "workers": 2}, "is for processes on this machine"),
        ({"ray_address": "auto"}, "is without executor"),
    ],
)
def test_a_setting_that_is_invalid_is_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        verify(tmp_path, **arguments)


def test_a_worker_that_does_not_reach_the_build_is_an_error(folder: Path) -> None:
    class Unreachable(Backwards):
        far = True

        def map_unordered(self, fn: Callable[[Any], Any], specs: Iterable[Any]) -> Iterator[Any]:
            os.rename(folder, folder.with_name("moved"))
            return map(fn, specs)

    with pytest.raises(WorkerError, match="a worker cannot read the build"):
        verify(folder, executor=Unreachable())


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main(["verify", *arguments, "--json"])
    assert isinstance(ended.value.code, int)
    return ended.value.code, json.loads(capsys.readouterr().out)


def test_the_command_has_the_result_as_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = run_command(capsys, str(folder), "--part", "1/2", "--quick")
    assert code == 0
    assert (found["ok"], found["part"], found["quick"]) == (True, "1/2", True)
    assert found["folder"] == str(folder)
    first = shard_paths(folder)[0]
    first.unlink()
    code, found = run_command(capsys, str(folder))
    assert code == 1
    assert [first.name in text for text in found["problems"]] == [True]


def test_the_command_says_what_it_did_not_check(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(folder), "--quick", "--part", "2/2"])
    assert ended.value.code == 0
    first, read, unchecked = capsys.readouterr().out.splitlines()
    assert first.startswith("ok: ")
    assert first.endswith(f" in part 2/2 of {folder}")
    assert read.startswith("read ")
    assert "the values in the packs" in unchecked
    assert "eval" in unchecked

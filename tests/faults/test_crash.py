"""A build that is killed at any moment leaves the old build or the new one intact, and the same
command then produces identical bytes.

A build runs in a child process, which is killed before its first change to the output folder; the
next child is killed before its second change, and so on, until one of them completes. A writer that
puts its manifest in place first shows that the harness detects failures.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sftprep import BuildConfig, build, merge, open_shards, read_manifest, verify
from sftprep.config import SourceConfig
from sftprep.errors import ManifestError, SftprepError
from sftprep.pipeline.part import build_part
from sftprep.sources import groups
from tests.conftest import EXAMPLES
from tests.support import thorough

EVERY = thorough(1, default=3)
"""A build is killed before every change with this distance; before each one by `make test-all`."""
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def killed_before(change: int, folder: Path, action: Callable[[], None]) -> bool:
    """Run `action` in a forked child process that is killed before its n-th change to a folder.

    Args:
        change: The number of the change, from 0.
        folder: The folder.
        action: The function to run.

    Returns:
        Whether the child was killed; False if it completed first.
    """
    child = os.fork()
    if child == 0:
        left = change

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            writes = (
                event == "open"
                and isinstance(arguments[2], int)
                and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if (event in _CHANGES or writes) and str(arguments[0]).startswith(str(folder)):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        try:
            sys.addaudithook(watch)
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise AssertionError("the child failed without being killed")
    return os.WIFSIGNALED(status)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def state(folder: Path) -> str | None:
    """Return the digest of the build that a reader sees, after reading and checking all of it; None
    if there is no build."""
    try:
        digest = read_manifest(folder).digest
    except ManifestError:
        return None
    assert sum(len(pack.input_ids) for pack in open_shards(folder)) == read_manifest(folder).tokens
    # The data card is that of one build, whose files are all there.
    for name in re.findall(r"- ((?:eval/)?shards/.*)", (folder / "README.md").read_text()):
        assert (folder / name).is_file()
    # A kill between the moves of a commit leaves shards of the other build.
    assert all("no manifest lists" in problem for problem in verify(folder).problems)
    return digest


@pytest.fixture
def small(monkeypatch, tmp_path, tokenizer_dir):
    """A function that returns the settings of a build with several groups, slices and shards."""
    monkeypatch.setattr(groups, "PARTITION_BYTES", 1_200)
    lines = (EXAMPLES / "data" / "qa.jsonl").read_bytes().splitlines(keepends=True)
    sources = []
    for name, part in (("a", lines[:9]), ("b", lines[9:15])):
        # Few records: a test builds them up to a hundred times.
        sources.append(str(tmp_path / f"{name}.jsonl"))
        Path(sources[-1]).write_bytes(b"".join(part))

    def config(output: Path, **settings) -> BuildConfig:
        fixed = {
            "tokenizer": str(tokenizer_dir),
            "max_length": 256,
            "shard_tokens": 600,
            "group_bytes": 1 << 16,
            "workers": 1,
            "encoder": "tokenizers",  # the only one that needs no process of its own
        }
        return BuildConfig.of(inputs=tuple(sources), output=str(output), **{**fixed, **settings})

    return config


def kill_before_each_change(
    folder: Path,
    before: str | None,
    after: str | None,
    run: Callable[[], object],
) -> int:
    """Kill `run` before each of its changes, check that a reader sees the build `before` or
    `after`, and return the number of changes."""
    for change in range(0, 1000, EVERY):
        if not killed_before(change, folder, lambda: run() and None):
            assert state(folder) == after
            return change
        seen = state(folder)
        assert seen in {
            before,
            after,
        }, f"before change {change} a reader saw neither the old build nor the new one"
        before = seen
    raise AssertionError("the build never ended")


def test_a_first_build_that_is_killed_ends_in_the_same_bytes(small, tmp_path):
    golden_folder = tmp_path / "golden"
    after = build(small(golden_folder)).manifest.digest
    golden = content(golden_folder)
    changes = kill_before_each_change(
        tmp_path / "o", None, after, lambda: build(small(tmp_path / "o", overwrite=True))
    )
    assert changes > 5
    assert content(tmp_path / "o") == golden


def test_a_killed_replacement_leaves_the_old_build_or_the_new_one(small, tmp_path):
    after = build(small(tmp_path / "golden", seed=1)).manifest.digest
    golden = content(tmp_path / "golden")
    before = build(small(tmp_path / "o", seed=2)).manifest.digest
    assert before != after
    kill_before_each_change(
        tmp_path / "o",
        before,
        after,
        lambda: build(small(tmp_path / "o", seed=1, overwrite=True)),
    )
    assert content(tmp_path / "o") == golden


def test_a_killed_replacement_of_planned_packs_keeps_the_sequences(small, tmp_path):
    """Both builds have the same shards, and other numbers of packs."""
    settings = {"layout": "sequences", "overwrite": True}
    after = build(small(tmp_path / "golden", max_length=64, **settings)).manifest.digest
    golden = content(tmp_path / "golden")
    before = build(small(tmp_path / "o", **settings)).manifest.digest
    assert before != after
    kill_before_each_change(
        tmp_path / "o",
        before,
        after,
        lambda: build(small(tmp_path / "o", max_length=64, **settings)),
    )
    assert content(tmp_path / "o") == golden


def test_a_killed_replacement_by_the_same_records_of_another_path_damages_nothing(small, tmp_path):
    """The files of groups name the inputs, so both builds have different files of one group."""
    copies = []
    for name in "ab":
        copies.append(str(tmp_path / f"copy-{name}.jsonl"))
        Path(copies[-1]).write_bytes((tmp_path / f"{name}.jsonl").read_bytes())

    def copied(output: Path) -> BuildConfig:
        config = small(output, overwrite=True)
        return dataclasses.replace(config, source=SourceConfig(tuple(copies)))

    after = build(copied(tmp_path / "golden")).manifest
    before = build(small(tmp_path / "o")).manifest
    assert before.data_digest == after.data_digest
    kill_before_each_change(
        tmp_path / "o", before.digest, after.digest, lambda: build(copied(tmp_path / "o"))
    )
    assert content(tmp_path / "o") == content(tmp_path / "golden")


def test_a_kill_after_a_kill_at_every_moment_still_ends_in_the_same_bytes(small, tmp_path):
    build(small(tmp_path / "golden"))
    golden = content(tmp_path / "golden")
    for change in range(0, 40, 3):
        folder = tmp_path / f"o{change}"
        killed = killed_before(change, folder, lambda f=folder: build(small(f)) and None)
        if killed and state(folder) is not None:
            # Killed between the commit and the cleaning: the build is there, and a new one would be
            # refused.
            continue
        if killed:
            build(small(folder))
        assert content(folder) == golden


def test_a_build_after_a_kill_at_every_moment_leaves_no_work_folder(small, tmp_path):
    build(small(tmp_path / "golden"))
    for change in range(0, 1000, 2 * EVERY):
        folder = tmp_path / f"o{change}"
        killed = killed_before(change, folder, lambda f=folder: build(small(f)) and None)
        if killed:
            build(small(folder, overwrite=True))
        assert {path.relative_to(folder) for path in folder.rglob("*")} == {
            path.relative_to(tmp_path / "golden") for path in (tmp_path / "golden").rglob("*")
        }, f"killed before change {change}"
        if not killed:
            break
    assert change > 20


def test_a_killed_build_with_evaluation_is_never_seen_without_it(small, tmp_path):
    """If the manifest of the build exists, its evaluation build does too, and the same command
    completes both."""
    settings = {"eval_fraction": 0.3, "eval_packing": "none", "overwrite": True}
    after = build(small(tmp_path / "golden", **settings)).manifest.digest
    golden = content(tmp_path / "golden")
    kill_before_each_change(
        tmp_path / "o", None, after, lambda: build(small(tmp_path / "o", **settings))
    )
    assert content(tmp_path / "o") == golden


def test_a_build_and_its_evaluation_build_are_replaced_at_once(small, tmp_path):
    """A reader sees both of the old build, or both of the new one."""
    settings = {"eval_fraction": 0.3, "overwrite": True}
    after = build(small(tmp_path / "golden", **settings)).manifest.digest
    folder, seen = tmp_path / "o", set()
    for change in range(0, 1000, EVERY):
        if not (folder / "manifest.json").exists() or read_manifest(folder).digest == after:
            before = build(small(folder, **settings, eval_seed=5)).manifest.digest
        if not killed_before(change, folder, lambda: build(small(folder, **settings)) and None):
            break
        found = read_manifest(folder)
        assert found.digest in (before, after)
        assert read_manifest(folder / "eval").digest == found.eval["digest"]
        for part in (folder, folder / "eval"):
            assert [text for text in verify(part).problems if "no manifest lists" not in text] == []
        seen.add(found.digest == after)
    assert content(folder) == content(tmp_path / "golden")
    assert seen == {False, True}


def test_a_part_that_is_killed_is_run_again_and_the_old_build_stays_until_the_end(small, tmp_path):
    folder, settings = tmp_path / "o", {"eval_fraction": 0.3, "overwrite": True}
    before = build(small(folder, seed=2)).manifest.digest
    build_part(small(folder, part="1/2", **settings))
    changes = kill_before_each_change(
        folder, before, before, lambda: build_part(small(folder, part="2/2", **settings))
    )
    assert changes > 5
    after = build(small(tmp_path / "golden", **settings)).manifest.digest
    kill_before_each_change(folder, before, after, lambda: build(small(folder, **settings)))
    assert content(folder) == content(tmp_path / "golden")


def test_the_first_round_of_a_part_that_is_killed_is_run_again(small, tmp_path):
    folder, settings = tmp_path / "o", {"duplicates": "drop"}
    for part in ("1/2", "2/2", "1/2"):
        kill_before_each_change(
            folder, None, None, lambda part=part: build_part(small(folder, part=part, **settings))
        )
    build(small(folder, **settings))
    build(small(tmp_path / "golden", **settings))
    assert content(folder) == content(tmp_path / "golden")


def test_a_killed_merge_leaves_the_old_build_or_the_merged_one(small, tmp_path):
    settings = {"eval_fraction": 0.3}
    for name, sources in (("a", "a.jsonl"), ("b", "b.jsonl")):
        config = small(tmp_path / name, **settings)
        source = SourceConfig((str(tmp_path / sources),))
        build(dataclasses.replace(config, source=source))
    after = merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "golden").digest
    before = build(small(tmp_path / "o", **settings)).manifest.digest
    kill_before_each_change(
        tmp_path / "o",
        before,
        after,
        lambda: merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "o", overwrite=True),
    )
    assert content(tmp_path / "o") == content(tmp_path / "golden")


def test_the_harness_detects_a_manifest_that_is_written_before_its_shards(
    small, tmp_path, monkeypatch
):
    good = build(small(tmp_path / "golden", seed=1)).manifest
    build(small(tmp_path / "o", seed=2))

    def manifest_first() -> None:
        folder = tmp_path / "o"
        (folder / "manifest.json").write_bytes(good.to_json())
        for shard in good.shards:
            (folder / "shards" / shard.name).write_bytes(
                (tmp_path / "golden" / "shards" / shard.name).read_bytes()
            )

    before = read_manifest(tmp_path / "o").digest
    with pytest.raises((AssertionError, SftprepError)):
        kill_before_each_change(tmp_path / "o", before, good.digest, manifest_first)

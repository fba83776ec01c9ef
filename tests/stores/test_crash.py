"""A build in a store that is killed before any of its changes leaves the old build or the new one.

Two writers that break the rules show that the harness detects failures: one that writes its
manifest first, and one that writes it without a condition.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pytest

from sftprep import build, open_shards, read_manifest, verify
from sftprep.errors import ManifestError, OutputBusy
from sftprep.pipeline import build as build_module
from sftprep.pipeline.output.garbage import collect_garbage
from sftprep.pipeline.output.store import OutputStore
from sftprep.stores.folder import StoreFolder
from tests.stores.builds import example_lines, small_settings
from tests.stores.failures import killed_before


@pytest.fixture
def small(tmp_path, tokenizer_dir):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(example_lines(0, 8))

    def run(output: StoreFolder, **settings: Any):
        settings = small_settings(tokenizer_dir, overwrite=True, **settings)
        return build(str(path), output=str(output), **settings).manifest

    return run


@pytest.fixture(params=["memory", "s3"])
def folder(request):
    return request.getfixturevalue(request.param)


def state(folder: StoreFolder) -> str | None:
    """Return the digest of the build that a reader sees, after checking all of it; None if there is
    no build."""
    try:
        manifest = read_manifest(str(folder))
    except ManifestError:
        return None
    assert verify(str(folder)).problems == []
    if manifest.eval:
        assert verify(f"{folder}/eval").problems == []
    assert sum(len(pack.input_ids) for pack in open_shards(str(folder))) == manifest.tokens
    return manifest.digest


def kill_before_each_change(
    folder: StoreFolder, before: str | None, after: str, run: Callable[[], object]
) -> int:
    """Kill `run` before each of its changes, check that a reader sees one of two builds, and return
    the number of changes."""
    for change in range(1_000):
        if not killed_before(change, run):
            assert state(folder) == after
            return change
        seen = state(folder)
        assert seen in (before, after), f"before change {change} a reader saw neither build"
        before = seen
    raise AssertionError("the build never ended")


def test_a_first_build_that_is_killed_ends_in_the_same_files(folder, small):
    after = small(folder / "golden", eval_fraction=0.3).digest
    place = folder / "o"
    changes = kill_before_each_change(place, None, after, lambda: small(place, eval_fraction=0.3))
    assert changes > 8
    # Killed builds leave the objects by which they checked the store.
    collect_garbage(str(place), datetime.timedelta(seconds=-60))
    assert place.names() == (folder / "golden").names()


def test_a_killed_replacement_leaves_the_old_build_or_the_new_one(folder, small):
    after = small(folder / "golden", seed=1).digest
    place = folder / "o"
    before = small(place, seed=2).digest
    assert before != after
    kill_before_each_change(place, before, after, lambda: small(place, seed=1))


def test_the_harness_detects_a_manifest_that_is_written_first(memory, small, monkeypatch):
    after = small(memory / "golden", seed=1).digest
    place = memory / "o"
    before = small(place, seed=2).digest
    put = StoreFolder.put

    def put_manifest_first(self, files):
        files = list(files)
        work = next(path.parents[1] for path, name in files if name.startswith("groups/"))
        put(self, [(work / "manifest.json", "manifest.json"), *files])

    monkeypatch.setattr(StoreFolder, "put", put_manifest_first)
    with pytest.raises((AssertionError, OutputBusy)):
        kill_before_each_change(place, before, after, lambda: small(place, seed=1))


def test_the_harness_detects_a_manifest_that_is_written_without_a_condition(
    memory, small, monkeypatch, tmp_path
):
    """Of two builders, the second one must not replace what the first one has just committed."""

    def put_manifest(self, content):
        path = tmp_path / "manifest.json"
        path.write_bytes(content)
        self.root.put([(path, "manifest.json")])

    def race() -> None:
        check = build_module.check_unchanged

        def build_meanwhile(inputs):
            build_module.check_unchanged = check
            small(memory, seed=1, scratch=str(tmp_path / "scratch"))
            check(inputs)

        monkeypatch.setattr(build_module, "check_unchanged", build_meanwhile)
        with pytest.raises(OutputBusy):
            small(memory, seed=2)

    race()
    memory.remove(memory.names())
    monkeypatch.setattr(OutputStore, "_write_manifest", put_manifest)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        race()

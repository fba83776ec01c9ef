"""A build in a store is verified in parts, and quickly with ranged reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftprep import BuildReport, read_manifest, verify
from sftprep.shards.verification import sampled_shard
from sftprep.stores.folder import StoreFolder
from tests.stores.builds import group_names, put_object, read_object


def test_the_quick_check_finds_damage_and_fetches_no_shard(
    store: StoreFolder,
    small: Callable[..., BuildReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (first, *_) = small(store).manifest.shards
    name = f"shards/{first.name}"
    content = read_object(store, name)
    fetch = StoreFolder.fetch
    fetched: list[str] = []

    def fetch_and_record(folder: StoreFolder, name: str, path: Path) -> None:
        fetched.append(name)
        fetch(folder, name, path)

    monkeypatch.setattr(StoreFolder, "fetch", fetch_and_record)
    found = verify(str(store), quick=True)
    assert found.ok
    assert found.blocks_read
    assert "files that no manifest lists" in found.unchecked
    for damaged, problem in (
        (content[:-1], "bytes, not the"),
        (content[:-9] + b"?" + content[-8:], "is not what was written"),
        (content[:99] + b"?" + content[100:], "is not what was written"),
    ):
        put_object(store, name, damaged, tmp_path)
        (text,) = verify(str(store), quick=True).problems
        assert f"{store}/{name}" in text
        assert problem in text
    store.remove([name])
    (text,) = verify(str(store), quick=True).problems
    assert text == f"{store}/{name} is missing"
    assert fetched
    assert not [each for each in fetched if each.startswith("shards/")]


def test_the_quick_check_names_other_missing_and_damaged_files(
    memory: StoreFolder, small: Callable[..., BuildReport], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes((tmp_path / "rows.jsonl").read_bytes() + b"{}\n")
    settings: dict[str, Any] = {"on_bad_record": "quarantine", "max_rejected": 10}
    for name in group_names(small(memory, source=bad, **settings).manifest):
        content = read_object(memory, name)
        if not name.startswith("rejected/"):  # its content is not read
            put_object(memory, name, content[:-9] + b"?" + content[-8:], tmp_path)
            assert not verify(str(memory), quick=True).ok
        memory.remove([name])
        (problem,) = verify(str(memory), quick=True).problems
        assert f"{memory}/{name} is missing" in problem
        put_object(memory, name, content, tmp_path)
    assert verify(str(memory), quick=True).ok


def test_large_blocks_are_not_read(
    memory: StoreFolder, small: Callable[..., BuildReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    small(memory)
    (info, *_) = read_manifest(str(memory)).shards
    monkeypatch.setattr(sampled_shard, "_LARGEST_BLOCK", info.blocks[0].bytes - 1)
    assert sampled_shard.sample_shard(memory, info) == 1  # the end of the file


def test_the_parts_of_a_build_in_a_store_are_checked(
    memory: StoreFolder, small: Callable[..., BuildReport]
) -> None:
    names = [info.name for info in small(memory).manifest.shards]
    memory.remove([f"shards/{name}" for name in names[:2]])
    found = [verify(str(memory), part=f"{number}/2") for number in (1, 2)]
    assert [len(each.problems) for each in found] == [2, 0]

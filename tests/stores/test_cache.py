"""Copies of objects in the cache: checked, fetched once, and within a limit."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from sftprep import open_shards
from sftprep.config.cache_location import cache_limit
from sftprep.errors import ConfigError, ShardError
from sftprep.shards.reading import shards as reading
from sftprep.stores import StoreFolder
from sftprep.stores.cache import copy_of_input, local_file
from tests.stores.builds import example_lines, put_object, small_settings


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SFTPREP_CACHE", str(folder))
    return folder


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """The names of the objects that were fetched as a whole."""
    names: list[str] = []
    fetch = StoreFolder.fetch

    def counted(self, name, path):
        names.append(name)
        fetch(self, name, path)

    monkeypatch.setattr(StoreFolder, "fetch", counted)
    return names


def use(folder: StoreFolder, name: str, content: bytes) -> bytes:
    with local_file(folder, name, sha256(content).hexdigest(), len(content)) as path:
        return path.read_bytes()


def test_an_object_is_fetched_once(memory, tmp_path, cache, fetched):
    put_object(memory, "a", b"hello", tmp_path)
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: use(memory, "a", b"hello"), range(16))) == {b"hello"}
    assert fetched == ["a"]


def test_a_copy_is_checked_before_it_is_kept(memory, tmp_path, cache):
    put_object(memory, "a", b"hellO", tmp_path)
    with pytest.raises(ShardError, match="is damaged"):
        use(memory, "a", b"hello")
    with pytest.raises(ShardError, match="is missing"):
        use(memory, "none", b"hello")
    assert [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size] == []
    put_object(memory, "a", b"hello", tmp_path)
    assert use(memory, "a", b"hello") == b"hello"


def test_a_torn_copy_is_fetched_again(memory, tmp_path, cache, fetched):
    put_object(memory, "a", b"hello", tmp_path)
    use(memory, "a", b"hello")
    (copy,) = (path for path in cache.rglob("a") if path.is_file())
    os.truncate(copy, 2)
    assert use(memory, "a", b"hello") == b"hello"
    assert fetched == ["a", "a"]


def test_a_digest_that_is_none_names_no_path(memory, tmp_path, cache):
    put_object(memory, "a", b"hello", tmp_path)
    for digest in ("", "../../x", "0" * 40, "0" * 31 + "/", "A" * 64):
        with pytest.raises(ShardError, match="is damaged"), local_file(memory, "a", digest):
            pass
    assert [*cache.rglob("*")] == []


def test_copies_that_were_used_least_recently_are_removed(
    memory, tmp_path, cache, fetched, monkeypatch
):
    monkeypatch.setenv("SFTPREP_CACHE_GB", "0.000003")  # 3,000 bytes
    contents = {name: name.encode() * 1_000 for name in "abcd"}
    for number, (name, content) in enumerate(contents.items()):
        put_object(memory, name, content, tmp_path)
        if name != "d":
            use(memory, name, content)
            (copy,) = (path for path in cache.rglob(name) if path.is_file())
            os.utime(copy, (number, number))
    use(memory, "a", contents["a"])  # b is now the one that was used least recently
    use(memory, "d", contents["d"])
    kept = {path.name for path in cache.rglob("[abcd]") if path.is_file()}
    assert kept == {"a", "c", "d"}
    assert fetched == ["a", "b", "c", "d"]
    assert use(memory, "b", contents["b"]) == contents["b"]


def test_a_copy_that_is_being_opened_is_not_removed(memory, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("SFTPREP_CACHE_GB", "0.000001")
    for name in "ab":
        put_object(memory, name, name.encode() * 900, tmp_path)
    with local_file(memory, "a", sha256(b"a" * 900).hexdigest(), 900) as path:
        use(memory, "b", b"b" * 900)
        assert path.read_bytes() == b"a" * 900


def test_a_replaced_input_has_another_copy(memory, tmp_path, cache):
    for content in (b"one", b"two"):
        url = put_object(memory, "a.json", content, tmp_path)
        with copy_of_input(url) as path:
            assert (path.name, path.read_bytes()) == ("a.json", content)


def test_a_build_is_read_with_a_cache_smaller_than_the_build(
    memory, tmp_path, tokenizer_dir, cache, monkeypatch
):
    from sftprep import build

    (tmp_path / "rows.jsonl").write_bytes(example_lines(0, 30))
    settings = small_settings(tokenizer_dir)
    manifest = build(str(tmp_path / "rows.jsonl"), output=str(memory), **settings).manifest
    assert manifest.num_shards > 4
    monkeypatch.setattr(reading, "_MOST_MAPPED", 2)
    monkeypatch.setenv("SFTPREP_CACHE_GB", str(manifest.shard_bytes / 3e9))
    shards = open_shards(str(memory))
    for _ in range(2):
        assert sum(len(pack.input_ids) for pack in shards) == manifest.tokens
    copies = [path for path in cache.rglob("*.arrow") if path.is_file()]
    assert 0 < len(copies) < manifest.num_shards


@pytest.mark.parametrize("text", ["none", "0", "-1", "inf", "nan"])
def test_the_limit_of_the_cache_is_a_positive_number(text, monkeypatch):
    monkeypatch.setenv("SFTPREP_CACHE_GB", text)
    with pytest.raises(ConfigError, match="SFTPREP_CACHE_GB"):
        cache_limit()

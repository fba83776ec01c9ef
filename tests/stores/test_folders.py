"""The operations on folders in stores, and the stores that are refused."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sftprep import build
from sftprep.errors import ConfigError, MissingDependency, StorageError
from sftprep.stores.folder import Mark, StoreFolder, folder_of, list_files, marks_of
from sftprep.stores.range_file import open_object
from tests.stores import servers


def put(folder: StoreFolder, tmp_path: Path, **contents: bytes) -> None:
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    folder.put((tmp_path / name, name) for name in contents)


def test_objects_are_written_read_listed_and_removed(store, tmp_path):
    put(store, tmp_path, a=b"hello", b=b"")
    put(store / "sub", tmp_path, c=b"0123456789")
    (store / "sub").fetch("c", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    assert store.read_range("sub/c", 2, 5) == b"234"
    assert store.read_range("a", 3, 100) == b"lo"
    assert store.names() == {"a", "b", "sub/c"}
    listed = {file.url: file.mark for file in store.list_files()}
    assert listed[f"{store}/a"] == store.mark("a")
    assert marks_of([f"{store}/a", f"{store}/sub/c", f"{store}/none"]) == {
        url: mark for url, mark in listed.items() if not url.endswith("/b")
    }
    assert all(file.modified is not None for file in store.list_files())
    store.remove(["a", "none", "sub/c"])
    assert store.names() == {"b"}


def test_a_missing_object_is_not_found(store, tmp_path):
    for read in (
        lambda: store.mark("none"),
        lambda: store.read_range("none", 0, 10),
        lambda: store.fetch("none", tmp_path / "none"),
    ):
        with pytest.raises(FileNotFoundError):
            read()
    assert store.list_files() == []


def test_a_url_names_an_object_a_pattern_or_a_folder(store, tmp_path):
    put(store / "d", tmp_path, **{"a.jsonl": b"1", "b.jsonl": b"2", "c.txt": b"3"})
    put(store / "dd", tmp_path, **{"e.jsonl": b"4"})

    def names(url: str) -> list[str]:
        return [file.url.removeprefix(f"{store}/") for file in list_files(url)]

    assert names(f"{store}/d/a.jsonl") == ["d/a.jsonl"]
    assert names(f"{store}/d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert names(f"{store}/d") == ["d/a.jsonl", "d/b.jsonl", "d/c.txt"]
    assert names(f"{store}/**/*.jsonl") == ["d/a.jsonl", "d/b.jsonl", "dd/e.jsonl"]
    assert names(f"{store}/none") == []


def test_a_conditional_write_succeeds_only_in_the_expected_state(store):
    assert store.create("m", b"one")
    assert not store.create("m", b"two")
    first = store.mark("m")
    assert store.replace("m", b"two", first)
    assert not store.replace("m", b"three", first)
    assert not store.replace("none", b"x", Mark(1, "5"))
    assert store.read_range("m", 0, 10) == b"two"
    store.check_conditions()
    assert store.names() == {"m"}


def test_of_many_writers_exactly_one_creates_an_object(store):
    with ThreadPoolExecutor(8) as threads:
        created = list(threads.map(lambda k: store.create("m", b"%d" % k), range(8)))
    assert created.count(True) == 1
    assert store.read_range("m", 0, 10) == b"%d" % created.index(True)


def test_an_object_is_read_like_a_file_in_few_requests(memory, tmp_path, monkeypatch):
    content = b"".join(b"%06d\n" % k for k in range(50_000))
    put(memory, tmp_path, a=content)
    ranges = []
    read_range = StoreFolder.read_range

    def counted(self, name, start, end):
        ranges.append((start, end))
        return read_range(self, name, start, end)

    monkeypatch.setattr(StoreFolder, "read_range", counted)
    with open_object(f"{memory}/a", read_ahead=100_000) as file:
        assert file.read(14) == b"000000\n000001\n"
        file.seek(70_000)
        assert file.readline() == b"010000\n"
        assert len(ranges) == 1
        assert file.read() == content[70_007:]
        assert file.read(1) == b""
    assert len(ranges) < 10


def test_a_store_without_conditional_writes_is_refused_for_output(tmp_path, tokenizer_dir, records):
    """gcp-storage-emulator ignores the conditions that Google's stores decide."""
    with servers.gs_server(has_conditions=False) as url:
        rows = records([{"text": "a"}])
        with pytest.raises(ConfigError, match="does not decide conditional writes"):
            build(rows, tokenizer=tokenizer_dir, output=f"{url}/o")
        assert list_files(f"{url}/o") == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket/x", "protocol s4, which is not supported"),
        ("file:///tmp/x", "not supported"),
        ("hf://models/org/name", "is not the URL of a data set"),
        ("simplecache::s3://b/x", "not supported"),
        ("s3://", "names no folder"),
    ],
)
def test_an_unknown_protocol_is_refused_before_any_work(
    url, message, tmp_path, monkeypatch, records, tokenizer_dir
):
    rows = records([{"text": "a"}])
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(ConfigError, match=message) as caught:
        build(rows, tokenizer=tokenizer_dir, output=url)
    assert caught.value.exit_code == 2
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.parametrize(
    ("protocol", "package", "extra"),
    [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs"), ("az", "adlfs", "az")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    protocol, package, extra, monkeypatch, capsys, tmp_path
):
    from sftprep.cli import main

    monkeypatch.setitem(sys.modules, package, None)
    import fsspec

    # fsspec keeps the classes that it has imported.
    kept = sys.modules[fsspec.get_filesystem_class.__module__]._registry
    monkeypatch.delitem(kept, protocol, raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(MissingDependency):
        folder_of(f"{protocol}://bucket/x")
    with pytest.raises(SystemExit) as caught:
        main(["build", "a.jsonl", "--tokenizer", "gpt2", "--output", f"{protocol}://bucket/x"])
    assert caught.value.code == 2
    assert f'pip install "sftprep[{extra}]"' in capsys.readouterr().err
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_protocol_that_can_only_be_read_is_refused_for_output(records, tokenizer_dir):
    pytest.importorskip("aiohttp")
    rows = records([{"text": "a"}])
    with pytest.raises((ConfigError, StorageError)):
        build(rows, tokenizer=tokenizer_dir, output="http://127.0.0.1:1/x")

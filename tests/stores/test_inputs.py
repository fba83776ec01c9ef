"""Inputs at URLs: the same records as from local files, in few requests."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftprep import build, verify
from sftprep.errors import (
    FormatError,
    InputChanged,
    InputNotFound,
    InputUnreadable,
    RecordError,
    StorageError,
)
from sftprep.sources import groups
from sftprep.sources.partition import Source, cut, read_partition, source_of
from sftprep.stores.folder import StoreFolder
from tests.conftest import EXAMPLES
from tests.pipeline.group_inputs import spy_on_reads
from tests.stores.builds import example_lines, put_object, small_settings


@pytest.fixture
def requests(monkeypatch):
    """Counts the requests for ranges, by URL."""
    counts: Counter[str] = Counter()
    read_range = StoreFolder.read_range

    def counted(self, name, start, end):
        counts[f"{self}/{name}"] += 1
        return read_range(self, name, start, end)

    monkeypatch.setattr(StoreFolder, "read_range", counted)
    return counts


def test_the_slices_of_an_object_are_those_of_the_local_file(memory, tmp_path, requests):
    lines = [b'{"a": "%s"}\n' % (b"x" * (k * 37 % 400)) for k in range(300)]
    for content in (b"".join(lines), b"".join(lines)[:-1], lines[0], b"\n\n" + lines[1], b""):
        (tmp_path / "a.jsonl").write_bytes(content)
        url = put_object(memory, "a.jsonl", content, tmp_path)
        requests.clear()
        remote = [*cut([Source(url, size=len(content))], 5_000)]
        local = [*cut([source_of(str(tmp_path / "a.jsonl"))], 5_000)]
        assert [(p.start, p.end) for p in remote] == [(p.start, p.end) for p in local]
        assert [*map(read_partition, remote)] == [*map(read_partition, local)]
        assert sum(requests.values()) == len(remote)


def test_a_long_line_across_many_slices_is_read_whole(memory, tmp_path):
    content = b'{"a": 1}\n{"b": "' + b"y" * 300_000 + b'"}\n{"c": 2}\n'
    url = put_object(memory, "a.jsonl", content, tmp_path)
    parts = [read_partition(p) for p in cut([Source(url, size=len(content))], 1_000)]
    assert b"".join(parts) == content


def test_an_object_that_became_shorter_is_changed(memory, tmp_path):
    content = b'{"a": 1}\n' * 100
    url = put_object(memory, "a.jsonl", content, tmp_path)
    parts = [*cut([Source(url, size=len(content))], 500)]
    put_object(memory, "a.jsonl", content[:600], tmp_path)
    with pytest.raises(InputChanged, match="became shorter"):
        read_partition(parts[1])


def test_inputs_at_urls_give_the_shards_of_local_files(
    store, tmp_path, tokenizer_dir, monkeypatch, caplog
):
    monkeypatch.setattr(groups, "PARTITION_BYTES", 1_200)
    local = tmp_path / "in"
    local.mkdir()
    rows = [json.loads(line) for line in example_lines(20, 30).splitlines()]
    (local / "a.jsonl").write_bytes(example_lines(0, 12))
    (local / "b.jsonl.gz").write_bytes(gzip.compress(example_lines(12, 16)))
    array = [json.loads(line) for line in example_lines(16, 20).splitlines()]
    (local / "c.json").write_text(json.dumps(array))
    pq.write_table(pa.Table.from_pylist(rows), local / "d.parquet")
    store_in = store / "in"
    store_in.put((path, path.name) for path in local.iterdir())
    put_object(store_in, "README.md", b"# data", tmp_path)
    put_object(store_in, "more/notes.pdf", b"%PDF", tmp_path)
    settings = small_settings(tokenizer_dir)
    expected = build(str(local), output=tmp_path / "o", **settings).manifest
    found = build(f"{store_in}", output=tmp_path / "p", **settings).manifest
    assert found.data_digest == expected.data_digest
    assert [info.path for info in found.inputs] == [
        f"{store_in}/{name}" for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet")
    ]
    assert verify(tmp_path / "p").ok
    (skipped,) = [text for text in caplog.messages if text.startswith("not read: ")]
    assert "notes.pdf" in skipped
    assert "README" not in skipped


def test_a_pattern_and_a_split_select_objects(memory, tmp_path, tokenizer_dir):
    for number, name in enumerate(("train-0.jsonl", "train-1.jsonl", "test-0.jsonl")):
        put_object(memory, name, example_lines(number * 5, number * 5 + 5), tmp_path)
    settings = small_settings(tokenizer_dir)

    def inputs(name: str, **more: str) -> list[str]:
        manifest = build(name, output=tmp_path / "o", overwrite=True, **settings, **more).manifest
        return [info.path.rpartition("/")[2] for info in manifest.inputs]

    assert inputs(f"{memory}/t*-0.jsonl") == ["test-0.jsonl", "train-0.jsonl"]
    assert inputs(f"{memory}", split="train") == ["train-0.jsonl", "train-1.jsonl"]
    assert inputs(f"{memory}/train-1.jsonl") == ["train-1.jsonl"]


def test_an_object_that_changes_during_the_build_stops_it(memory, tmp_path, tokenizer_dir):
    content = example_lines(0, 10)
    for name in ("a.jsonl", "b.jsonl"):
        put_object(memory, name, content, tmp_path)

    def change(stage: str, *_: int) -> None:
        put_object(memory, "a.jsonl", content.replace(b"a", b"b"), tmp_path)

    with pytest.raises(InputChanged, match=r"a\.jsonl changed while the build ran"):
        build(
            f"{memory}",
            output=tmp_path / "o",
            progress=change,
            **small_settings(tokenizer_dir),
        )
    assert not (tmp_path / "o").exists() or not (tmp_path / "o" / "manifest.json").exists()


def test_a_changed_object_is_read_again(store, tmp_path, tokenizer_dir, monkeypatch):
    """The receipt of an object has its size and ETag; here the size stays."""
    monkeypatch.setenv("SFTPREP_CACHE", str(tmp_path / "cache"))
    settings = small_settings(tokenizer_dir, overwrite=True)
    reads = spy_on_reads(monkeypatch)
    content = example_lines(0, 5)
    builds = []
    for version in (content, content, content.replace(b"breakfast", b"Breakfast")):
        if not builds or version != content:
            url = put_object(store, "a.jsonl", version, tmp_path)
        report = build(url, output=tmp_path / "o", **settings)
        builds.append((len(reads), report.manifest.data_digest))
        assert verify(report.folder).ok
    (first, expected), second, (third, changed) = builds
    assert first > 0
    assert second == (first, expected)  # its receipt was found
    assert third > first
    assert changed != expected


def test_an_object_that_changes_while_it_is_read_has_no_receipt(memory, tmp_path, tokenizer_dir):
    settings = small_settings(tokenizer_dir, overwrite=True)
    content = example_lines(0, 5)
    url = put_object(memory, "a.jsonl", content, tmp_path)

    def change(stage: str, *_: int) -> None:
        if stage == "write":
            put_object(memory, "a.jsonl", content.replace(b"breakfast", b"Breakfast"), tmp_path)

    with pytest.raises(InputChanged, match="changed while the build ran"):
        build(url, output=tmp_path / "o", progress=change, **settings)
    assert not [*(tmp_path / "o").rglob("receipt-*")]


def test_a_changed_table_is_fetched_again(memory, tmp_path, tokenizer_dir):
    settings = small_settings(tokenizer_dir, overwrite=True)
    digests = set()
    for first in (0, 5):
        rows = [json.loads(line) for line in example_lines(first, first + 5).splitlines()]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        memory.put([(tmp_path / "a.parquet", "a.parquet")])
        manifest = build(f"{memory}/a.parquet", output=tmp_path / "o", **settings).manifest
        digests.add(manifest.data_digest)
    assert len(digests) == 2


def test_a_bad_record_is_reported_with_its_url_and_line(
    memory, tmp_path, tokenizer_dir, monkeypatch
):
    monkeypatch.setattr(groups, "PARTITION_BYTES", 1_200)
    content = example_lines(0, 12) + b"{bad}\n"
    url = put_object(memory, "a.jsonl", content, tmp_path)
    with pytest.raises(RecordError) as caught:
        build(url, output=tmp_path / "o", **small_settings(tokenizer_dir))
    assert f"{url}:13" in caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("none.jsonl", None, InputNotFound),
        ("a.xyz", b"x", FormatError),
        ("a.jsonl", b"PAR1....", InputUnreadable),
        ("folder", None, InputNotFound),
    ],
)
def test_a_url_without_data_is_an_error(memory, tmp_path, tokenizer_dir, name, content, error):
    if content is not None:
        put_object(memory, name, content, tmp_path)
    with pytest.raises(error):
        build(f"{memory}/{name}", output=tmp_path / "o", **small_settings(tokenizer_dir))
    assert not (tmp_path / "o").exists()


def test_an_error_in_a_copied_object_names_its_url(memory, tmp_path, tokenizer_dir):
    url = put_object(memory, "a.jsonl.gz", gzip.compress(example_lines(0, 9))[:-20], tmp_path)
    with pytest.raises(InputUnreadable, match="is damaged or cut short") as caught:
        build(url, output=tmp_path / "o", **small_settings(tokenizer_dir))
    assert caught.value.message.startswith(f"{url}: ")
    assert str(caught.value) == str(pickle.loads(pickle.dumps(caught.value)))


def test_a_build_is_not_an_input(memory, tmp_path, tokenizer_dir, caplog):
    settings = small_settings(tokenizer_dir)
    put_object(memory, "a.jsonl", example_lines(0, 5), tmp_path)
    build(f"{memory}/a.jsonl", output=f"{memory}/old", **settings)
    with pytest.raises(FormatError, match="is a build of sftprep"):
        build(f"{memory}/old", output=tmp_path / "o", **settings)
    with caplog.at_level(logging.WARNING):
        found = build(f"{memory}", output=f"{memory}/new", **settings).manifest
    assert [info.path for info in found.inputs] == [f"{memory}/a.jsonl"]
    assert "in a build" in caplog.text


def test_a_store_that_cannot_be_reached_is_an_error_of_the_environment(
    memory, tmp_path, tokenizer_dir, monkeypatch
):
    def fail(self, *_):
        raise StorageError("cannot read", remedy="")

    url = put_object(memory, "a.jsonl", (EXAMPLES / "data" / "qa.jsonl").read_bytes(), tmp_path)
    monkeypatch.setattr(StoreFolder, "read_range", fail)
    with pytest.raises(StorageError) as caught:
        build(url, output=tmp_path / "o", **small_settings(tokenizer_dir))
    assert caught.value.exit_code == 3

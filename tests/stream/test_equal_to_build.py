"""A stream yields the packs of a build with the same window and order, from the same records."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftprep import BuildConfig, build, open_shards, verify
from sftprep.errors import ConfigError
from sftprep.stream import PackedStream
from tests.stream.plain_packs import plains, rows


def written(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    return str(path)


def both(inputs, tokenizer_dir, folder, **settings):
    """Return the shards of a build, and the stream of the same inputs."""
    settings = {
        "max_length": 160,
        "pack_window": 40,
        "order": "keep",
        "shard_tokens": 20_000,
        **settings,
    }
    config = BuildConfig.of(
        inputs=inputs, tokenizer=str(tokenizer_dir), output=str(folder), **settings
    )
    build(config)
    stream = PackedStream(inputs, config=config)
    return open_shards(folder), stream


def assert_equal(shards, stream):
    packs = list(stream)
    assert plains(packs) == plains(shards)
    assert len(packs) > 20
    ours = [[stream.locate(int(o)) for o in pack.origin] for pack in packs]
    assert ours == [[shards.manifest.locate(int(o)) for o in pack.origin] for pack in shards]


@pytest.mark.parametrize(
    "format_name",
    ["tokens", "prompt-completion", "messages", "sharegpt", "alpaca", "text", "question/answer"],
)
def test_every_format(format_name, tokenizer_dir, tmp_path):
    path = written(tmp_path / "data.jsonl", rows(format_name, 600))
    assert_equal(*both(path, tokenizer_dir, tmp_path / "build"))


@pytest.mark.parametrize("workers", [1, 2])
def test_partitions_and_workers_do_not_matter(workers, tokenizer_dir, tmp_path, monkeypatch):
    # One partition holds some blocks, and not a whole number of them.
    monkeypatch.setattr("sftprep.sources.partition.PARTITION_BYTES", 10_000)
    path = written(tmp_path / "data.jsonl", rows("messages", 500))
    assert_equal(*both(path, tokenizer_dir, tmp_path / "build", workers=workers))


def test_several_files_and_kinds(tokenizer_dir, tmp_path):
    files = [written(tmp_path / f"{k}.jsonl", rows("messages", 150, seed=k)) for k in range(2)]
    with gzip.open(tmp_path / "2.jsonl.gz", "wt", encoding="utf-8") as packed:
        packed.write("".join(json.dumps(row) + "\n" for row in rows("messages", 150, seed=2)))
    pq.write_table(
        pa.Table.from_pylist(rows("text", 150, seed=3)), tmp_path / "3.parquet", row_group_size=40
    )
    files += [
        str(tmp_path / "2.jsonl.gz"),
        str(tmp_path / "3.parquet"),
        written(tmp_path / "4.jsonl", rows("text", 90, seed=4)),
    ]
    assert_equal(*both(files, tokenizer_dir, tmp_path / "build"))


def test_whitespace_and_bad_lines_are_skipped_alike(tokenizer_dir, tmp_path):
    good = [json.dumps(row) for row in rows("text", 400)]
    lines = [
        line
        for k, row in enumerate(good)
        for line in ([row, ""] if k % 7 == 0 else [row, "{bad"] if k % 31 == 0 else [row])
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    settings = {"on_bad_record": "quarantine", "max_rejected": "10%"}
    shards, stream = both(str(path), tokenizer_dir, tmp_path / "build", **settings)
    assert_equal(shards, stream)
    accounts = shards.manifest.accounting
    counts = stream.counts
    assert {
        name: counts[name]
        for name in ("lines", "blank", "records", "sequences", "tokens", "trained_tokens")
    } == {
        name: getattr(accounts, name)
        for name in ("lines", "blank", "records", "sequences", "tokens", "trained_tokens")
    }
    assert counts["rejected.bad_json"] == accounts.rejected["bad_json"] == 11


def test_a_shuffled_build_in_windows_holds_the_same_packs(tokenizer_dir, tmp_path):
    path = written(tmp_path / "data.jsonl", rows("text", 300))
    shards, stream = both(path, tokenizer_dir, tmp_path / "build", order="shuffle")
    assert sorted(plains(stream)) == sorted(plains(shards))


def test_the_bytes_of_a_build_in_windows_depend_on_the_input_only(
    tokenizer_dir, tmp_path, monkeypatch
):
    path = written(tmp_path / "data.jsonl", rows("messages", 300))
    settings = {
        "inputs": path,
        "tokenizer": str(tokenizer_dir),
        "max_length": 160,
        "pack_window": 40,
        "lanes": 3,
    }
    build(BuildConfig.of(output=str(tmp_path / "a"), **settings))
    monkeypatch.setattr("sftprep.sources.partition.PARTITION_BYTES", 9_000)
    build(BuildConfig.of(output=str(tmp_path / "b"), workers=2, **settings))
    assert (
        open_shards(tmp_path / "a").manifest.digest == open_shards(tmp_path / "b").manifest.digest
    )
    assert verify(tmp_path / "a").ok
    build(BuildConfig.of(output=str(tmp_path / "c"), **{**settings, "lanes": 4}))
    assert (
        open_shards(tmp_path / "c").manifest.config_digest
        != open_shards(tmp_path / "a").manifest.config_digest
    )


def test_invalid_settings_of_streams_are_rejected():
    for settings in (
        {"pack_window": 0},
        {"lanes": 0},
        {"order": "sorted"},
        {"pack_window": 9, "packing": "none"},
    ):
        with pytest.raises(ConfigError):
            BuildConfig.of(inputs="a.jsonl", tokenizer="t", output="o", **settings)

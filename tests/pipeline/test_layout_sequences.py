"""Builds of layout `sequences`: selection, receipts, parts, kills, merging and stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from sftprep import build, merge, open_shards, read_manifest
from sftprep.cli import main
from sftprep.errors import MismatchError
from sftprep.shards.manifest import Manifest
from sftprep.shards.sequences.index import read_sequence_index
from sftprep.stores import protocols
from tests.pipeline.builds import content
from tests.pipeline.group_inputs import GROUP_BYTES, spy_on_reads, texts_of, write
from tests.shards.layouts import assert_same_packs, build_layout, open_both
from tests.stores.memory import MEMORY


@pytest.fixture
def run(tokenizer_dir: Path, tmp_path: Path) -> Any:
    """Return a function that builds both layouts, and compares their packs."""

    def run_both(source: Any, folders: tuple[str, ...] = ("",), **more: Any) -> Manifest:
        more = {"tokenizer": tokenizer_dir, "group_bytes": GROUP_BYTES} | more
        for layout in ("packs", "sequences"):
            build_layout(layout, tmp_path, source, **more)
        for folder in folders:
            packs = open_shards(tmp_path / "packs" / folder)
            assert_same_packs(packs, open_shards(tmp_path / "sequences" / folder))
        return read_manifest(tmp_path / "sequences")

    return run_both


def sources(tmp_path: Path, **shares: dict[str, float]) -> tuple[dict[str, Any], ...]:
    """Return the sources of a mixture, each with its share."""
    counts = {"a": 300, "b": 500, "c": 200}
    return tuple(
        {"path": write(tmp_path / f"{name}.jsonl", texts_of(count, 1, name)), **shares[name]}
        for name, count in counts.items()
    )


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_a_repeated_sequence_is_stored_once(run: Any, tmp_path: Path, overlong: str) -> None:
    shares = {"a": {"repeat": 3.0}, "b": {"repeat": 0.5}, "c": {"repeat": 1.5}}
    manifest = run(None, sources=sources(tmp_path, **shares), overlong=overlong, seed=7)
    assert manifest.accounting.extra == {"repeated": 600 + 100}
    assert sum(group.rows for group in manifest.read_groups()) == 300 + 250 + 200
    indices = [
        read_sequence_index(tmp_path / "sequences", group) for group in manifest.read_groups()
    ]
    assert sum(int(index.copies.sum()) for index in indices) == manifest.accounting.sequences


def test_the_shares_of_a_mixture_are_those_of_a_build(run: Any, tmp_path: Path) -> None:
    shares = {"a": {"weight": 3.0}, "b": {"weight": 1.0}, "c": {"weight": 2.0}}
    manifest = run(None, sources=sources(tmp_path, **shares))
    assert [source.sequences for source in manifest.sources] == [300, 100, 200]


def test_held_out_and_equal_records_are_those_of_a_build(run: Any, tmp_path: Path) -> None:
    rows = texts_of(500)
    path = write(tmp_path / "a.jsonl", [*rows, *rows[:40]])
    manifest = run(path, ("", "eval"), eval_fraction=0.1, duplicates="drop", eval_packing="none")
    assert manifest.accounting.left_out["duplicate"] == 40
    evaluation = open_shards(tmp_path / "sequences" / "eval", max_length=16)
    assert evaluation.manifest.layout == "sequences"
    assert max(len(pack.input_ids) for pack in evaluation) == 16


def test_weights_and_several_sequences_of_a_record(run: Any, tmp_path: Path) -> None:
    """Reasoning that is expanded makes several sequences of a record; a turn may have a weight."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "count " * (number % 9)},
                {"role": "assistant", "content": "one two " * (number % 5), "weight": 0},
                {"role": "user", "content": f"more {number}"},
                {"role": "assistant", "content": "three", "weight": 0.5},
            ]
        }
        for number in range(60)
    ]
    manifest = run(write(tmp_path / "a.jsonl", rows), train_on="assistant", max_length=40)
    assert manifest.accounting.sequences == 60
    assert open_shards(tmp_path / "sequences")[0].loss_weights is not None


def test_the_accounts_are_those_before_the_cut(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(300))
    manifest = run(path, max_length=32)
    packs = read_manifest(tmp_path / "packs")
    assert packs.accounting.truncated > 0
    assert manifest.accounting.truncated == 0
    assert manifest.accounting.tokens == packs.accounting.tokens_in > manifest.tokens
    assert sum(manifest.lengths["tokens"]) == manifest.accounting.tokens


def test_another_length_or_packing_changes_no_group(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(1200))
    fixed = {"tokenizer": tokenizer_dir, "group_bytes": GROUP_BYTES}
    before = content(build_layout("sequences", tmp_path, path, **fixed))
    reads = spy_on_reads(monkeypatch)
    more: dict[str, Any] = {"max_length": 200, "packing": "exact", "overlong": "split"}
    after = content(build_layout("sequences", tmp_path, path, **fixed, **more))
    assert reads == []
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"manifest.json", "README.md"}
    assert before.keys() == after.keys()
    assert open_shards(tmp_path / "sequences").plan_settings["max_length"] == 200
    build_layout("packs", tmp_path, path, **fixed, **more)
    assert_same_packs(*open_both(tmp_path))


def test_parts_and_workers_give_the_same_bytes(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(900))
    fixed: dict[str, Any] = {
        "tokenizer": tokenizer_dir,
        "encoder": "tokenizers",
        "group_bytes": GROUP_BYTES,
        "max_length": 64,
        "layout": "sequences",
    }
    one = build(path, output=tmp_path / "one", workers=1, **fixed)
    build(path, output=tmp_path / "two", workers=2, **fixed)
    for part in ("1/2", "2/2"):
        build(path, output=tmp_path / "parts", workers=1, part=part, **fixed)
    build(path, output=tmp_path / "parts", workers=1, **fixed)
    assert content(one.folder) == content(tmp_path / "two") == content(tmp_path / "parts")


def test_builds_are_merged(tokenizer_dir: Path, tmp_path: Path) -> None:
    fixed = {"tokenizer": tokenizer_dir, "group_bytes": GROUP_BYTES}
    for name, seed in (("a", 0), ("b", 1)):
        path = write(tmp_path / f"{name}.jsonl", texts_of(400, seed, name))
        build_layout("sequences", tmp_path / name, path, **fixed)
        build_layout("packs", tmp_path / name, path, **fixed)
    for layout in ("packs", "sequences"):
        merge(tmp_path / "a" / layout, tmp_path / "b" / layout, output=tmp_path / layout)
    assert_same_packs(*open_both(tmp_path))
    with pytest.raises(MismatchError, match="layout"):
        merge(tmp_path / "a" / "packs", tmp_path / "b" / "sequences", output=tmp_path / "none")


def test_a_build_in_a_store_is_planned_from_there(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(protocols.PROTOCOLS, "memory", MEMORY)
    path = write(tmp_path / "a.jsonl", texts_of(400))
    fixed = {"tokenizer": tokenizer_dir, "group_bytes": GROUP_BYTES}
    url = f"memory://layouts/{tmp_path.name}"
    try:
        build_layout("sequences", tmp_path, path, **fixed, output=url)
        build_layout("packs", tmp_path, path, **fixed, max_length=48)
        packs, planned = open_shards(tmp_path / "packs"), open_shards(url, max_length=48)
        assert_same_packs(packs, planned)
    finally:
        fsspec.filesystem("memory").rm(f"/layouts/{tmp_path.name}", recursive=True)


def test_the_command_shows_planned_packs(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write(tmp_path / "a.jsonl", texts_of(50)), str(tmp_path / "o")
    command = ["build", path, "--tokenizer", str(tokenizer_dir), "--output", output]
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--layout", "sequences", "--max-length", "64"])
    shown = capsys.readouterr().out
    assert "planned when they are read" in shown
    assert "stored" in shown
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", output, "--max-length", "32", "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] <= 32

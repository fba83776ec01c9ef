"""A group with a receipt is not run again, and a receipt is never used for other work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftprep import BuildReport, build, verify
from sftprep.config import cache_dir
from sftprep.errors import InputChanged, RecordError, TooManyRejected
from tests.pipeline.builds import content, texts
from tests.pipeline.group_inputs import GROUP_BYTES, spy_on_reads, texts_of, write


class Interrupted(Exception):
    """Raised by a test in the middle of a build."""


@pytest.fixture
def run(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., BuildReport]:
    def run_build(inputs: Any, name: str = "o", **more: Any) -> BuildReport:
        fixed = {"group_bytes": GROUP_BYTES, "max_length": 128, "workers": 1, "overwrite": True}
        report = build(inputs, tokenizer=tokenizer_dir, output=tmp_path / name, **(fixed | more))
        assert verify(report.folder).ok
        return report

    return run_build


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    return spy_on_reads(monkeypatch)


EVALUATION = {"eval_fraction": 0.05, "overlong": "split", "max_length": 40}
SETTINGS: list[dict[str, Any]] = [
    {},
    EVALUATION,
    {"duplicates": "drop", "on_bad_record": "quarantine", "max_rejected": "50%"},
    {"packing": "wrapped", "position_ids": False},
]


@pytest.mark.parametrize("more", SETTINGS, ids=lambda more: ",".join(more) or "default")
def test_an_interrupted_build_reads_only_what_has_no_receipt(
    run: Any, reads: Any, tmp_path: Path, more: dict[str, Any]
) -> None:
    rows: list[Any] = texts_of(1500)
    if more.get("on_bad_record"):
        rows[700] = rows[1400] = "{"
        rows[1300] = rows[3]
    path = write(tmp_path / "a.jsonl", rows)
    written = []

    def stop_in_the_third_group(stage: str, done: int, total: int) -> None:
        written.append(stage == "write" and done == total)
        if sum(written) == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(path, progress=stop_in_the_third_group, **more)
    for spill in (tmp_path / "o" / "spill").glob("[0-9a-f]*.arrow"):
        spill.unlink()
    reads.clear()
    report = run(path, **more)
    assert len(report.manifest.groups) == 4
    # Each group has one slice here, and two of four groups have a receipt.
    assert [start for _, start in reads] == [2 * GROUP_BYTES, 3 * GROUP_BYTES]
    golden = run(path, "golden", **more)
    assert content(report.folder) == content(golden.folder)
    assert report.bytes_read == golden.bytes_read


@pytest.mark.parametrize("more", SETTINGS, ids=lambda more: ",".join(more) or "default")
def test_an_unchanged_build_reads_no_input(
    run: Any, reads: Any, tmp_path: Path, more: dict[str, Any]
) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(1500))
    before = content(run(path, **more).folder)
    reads.clear()
    assert content(run(path, **more).folder) == before
    assert reads == []


@pytest.mark.parametrize("more", [{}, EVALUATION], ids=["training", "evaluation"])
def test_of_a_corpus_with_one_more_file_only_that_file_is_read(
    run: Any, reads: Any, tmp_path: Path, more: dict[str, Any]
) -> None:
    (tmp_path / "in").mkdir()
    # Each file is a group of its own.
    for name in "bcd":
        write(tmp_path / "in" / f"{name}.jsonl", texts_of(400, ord(name), name))
    run(str(tmp_path / "in"), **more)
    write(tmp_path / "in" / "a.jsonl", texts_of(400, 5, "new"))
    reads.clear()
    grown = run(str(tmp_path / "in"), **more)
    assert {name for name, _ in reads} == {"a.jsonl"}
    assert content(grown.folder) == content(run(str(tmp_path / "in"), "fresh", **more).folder)
    (tmp_path / "in" / "c.jsonl").unlink()
    reads.clear()
    shrunk = run(str(tmp_path / "in"), **more)
    assert reads == []
    assert content(shrunk.folder) == content(run(str(tmp_path / "in"), "less", **more).folder)


@pytest.mark.parametrize("kept", ["size", "time"])
def test_a_changed_input_is_read_again(run: Any, tmp_path: Path, kept: str) -> None:
    path = tmp_path / "a.jsonl"
    write(path, texts_of(900))
    run(str(path))
    status = path.stat()
    changed = path.read_bytes().replace(b"alpha", b"omega" if kept == "size" else b"first one")
    path.write_bytes(changed)
    time = status.st_mtime_ns + (1_000_000 if kept == "size" else 0)
    os.utime(path, ns=(status.st_atime_ns, time))
    assert (path.stat().st_size == status.st_size) == (kept == "size")
    again = run(str(path))
    assert content(again.folder) == content(run(str(path), "fresh").folder)


def test_an_input_that_changes_while_it_is_read_has_no_receipt(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, texts_of(900))
    before, status = path.read_bytes(), path.stat()

    def change(stage: str, done: int, total: int) -> None:
        if stage == "write":
            path.write_bytes(before.replace(b"alpha", b"omega"))

    with pytest.raises(InputChanged):
        run(str(path), progress=change)
    # The earlier file is back, with its time.
    path.write_bytes(before)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content(run(str(path)).folder) == content(run(str(path), "fresh").folder)


def test_work_with_a_function_without_a_stable_digest_is_done_again(
    run: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(900))
    for word in ("one", "two"):
        again = run(path, transform=lambda record, word=word: {"text": f"{word} {record['text']}"})
    fresh = run(path, "fresh", transform=lambda record: {"text": f"two {record['text']}"})
    assert texts(again.folder) == texts(fresh.folder)


def test_data_in_memory_is_read_again(run: Any, tmp_path: Path) -> None:
    run(texts_of(50))
    again, fresh = run(texts_of(50, 1)), run(texts_of(50, 1), "fresh")
    assert again.manifest.data_digest == fresh.manifest.data_digest


def test_other_settings_do_not_use_a_receipt(run: Any, tmp_path: Path) -> None:
    rows: list[Any] = texts_of(900)
    rows[800] = "{"
    path = write(tmp_path / "a.jsonl", rows)
    quarantine = {"on_bad_record": "quarantine"}
    run(path, **quarantine)
    for number, more in enumerate(
        ({"seed": 3}, {"max_length": 90}, {"packing": "none"}, {"eval_fraction": 0.1})
    ):
        report = run(path, **quarantine, **more)
        fresh = run(path, f"fresh{number}", **quarantine, **more)
        assert content(report.folder) == content(fresh.folder)
    with pytest.raises(RecordError):
        run(path)
    with pytest.raises(TooManyRejected):
        run(path, max_rejected="0", **quarantine)
    one_group = {"group_bytes": 1 << 30, **quarantine}
    run(path, **one_group)
    with pytest.raises(TooManyRejected):
        run(path, max_rejected="0", **one_group)


def test_a_damaged_shard_is_written_again(run: Any, reads: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(900))
    report = run(path, **EVALUATION)
    before = content(report.folder)
    shards = [*report.folder.glob("shards/*/*.arrow"), *report.folder.glob("eval/shards/*/*.arrow")]
    assert len(shards) == 4
    for shard in shards:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        reads.clear()
        assert content(run(path, **EVALUATION).folder) == before
        # Evaluation shards are written again from the held-out sequences.
        assert len({name for name, _ in reads}) == (shard.parents[2].name != "eval")


def test_damaged_receipts_are_not_used_but_replaced(run: Any, reads: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(900))
    before = content(run(path, **EVALUATION).folder)
    kept = [*(cache_dir() / "receipts").iterdir()]
    assert kept
    for file in kept:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
    assert content(run(path, **EVALUATION).folder) == before
    for file in kept:
        file.write_bytes(b"")
    assert content(run(path, **EVALUATION).folder) == before
    reads.clear()
    assert content(run(path, **EVALUATION).folder) == before
    assert reads == []


def test_data_in_memory_leaves_no_receipt(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTPREP_CACHE", str(tmp_path / "cache"))  # not that of other tests
    run([{"text": "a b c"}])
    assert not [*(cache_dir() / "receipts").glob("*")]
    run(write(tmp_path / "a.jsonl", [{"text": "a b c"}]))
    assert len([*(cache_dir() / "receipts").glob("*.json")]) == 1


def test_the_cache_of_receipts_has_a_size_limit(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftprep.pipeline.groups import receipt_cache

    monkeypatch.setenv("SFTPREP_CACHE", str(tmp_path / "cache"))  # not that of other tests
    monkeypatch.setattr(receipt_cache, "RECEIPTS_BYTES", 8000)
    for number in range(5):
        run(write(tmp_path / f"{number}.jsonl", texts_of(300, number)), f"o{number}")
        sizes = [file.stat().st_size for file in (cache_dir() / "receipts").iterdir()]
        assert 0 < sum(sizes) <= 8000

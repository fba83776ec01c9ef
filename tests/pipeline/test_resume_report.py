"""A build that was interrupted reports, at its start, what is kept and what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftprep.config.build import BuildConfig
from sftprep.pipeline.build import build
from sftprep.pipeline.kept_work import KeptWork
from sftprep.pipeline.part import build_part
from sftprep.report.summary import resume_line
from sftprep.sources import groups
from tests.pipeline.group_inputs import GROUP_BYTES, spy_on_reads, texts_of, write


class Interruption(Exception):
    """What stops a build."""


@pytest.fixture
def run(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """A function that builds into tmp_path/o, and may stop after some reports of a stage."""

    def run_build(inputs: Any, *, stop_after: tuple[str, int] | None = None, **more: Any) -> Any:
        seen: list[KeptWork] = []
        reports: Counter[str] = Counter()

        def progress(stage: str, done: int, total: int) -> None:
            reports[stage] += 1
            if (stage, reports[stage]) == stop_after:
                raise Interruption

        sources = {"sources": inputs} if isinstance(inputs, list) else {"inputs": inputs}
        settings = {"output": str(tmp_path / "o"), "max_length": 64, "workers": 1} | more
        config = BuildConfig.of(**sources, tokenizer=str(tokenizer_dir), **settings)
        function = build if config.output.part is None else build_part
        report: Any = function(config, progress=progress, on_resume=seen.append)
        assert [report.resumed] == (seen or [None])
        return report

    return run_build


def test_the_partitions_of_one_group_are_counted(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "PARTITION_BYTES", 20_000)
    path = write(tmp_path / "a.jsonl", texts_of(1000))
    with pytest.raises(Interruption):
        run(path, stop_after=("tokenize", 3))
    kept_files = len([*(tmp_path / "o" / "spill").glob("*.arrow")])
    assert kept_files >= 3
    report = run(path)
    kept = report.resumed
    assert (kept.groups, kept.groups_total, kept.partitions) == (0, 1, kept_files)
    assert kept.bytes_total == os.path.getsize(path)
    assert 0 < kept.bytes < kept.bytes_total
    assert report.reused == kept_files


def test_nothing_is_reported_at_a_first_start_or_for_work_of_other_settings(
    run: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(100))
    with pytest.raises(Interruption):
        run(path, stop_after=("tokenize", 1))
    assert run(path, eos_token="<|endoftext|>").resumed is None
    assert run(path, output=str(tmp_path / "p")).resumed is None


def test_a_receipt_from_the_cache_without_its_shards_is_no_work(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(2000))
    run(path, group_bytes=GROUP_BYTES, output=str(tmp_path / "other"))
    with pytest.raises(Interruption):
        run(path, group_bytes=GROUP_BYTES, stop_after=("tokenize", 1))
    assert [*(tmp_path / "o" / "spill").glob("receipt-*")]
    kept = run(path, group_bytes=GROUP_BYTES).resumed
    assert (kept.groups, kept.partitions) == (0, 1)


@pytest.mark.parametrize("rounds", ["one", "weights", "duplicates"])
def test_the_groups_that_are_done_are_counted(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: str
) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(2500))
    inputs: Any = path
    more: dict[str, Any] = {"group_bytes": GROUP_BYTES}
    if rounds == "weights":
        other = write(tmp_path / "b.jsonl", texts_of(500, 1, "b"))
        inputs = [{"path": path, "weight": 3}, {"path": other, "weight": 1}]
        more["mix_by"] = "tokens"
    elif rounds == "duplicates":
        more["duplicates"] = "drop"
    with pytest.raises(Interruption):
        run(inputs, stop_after=("write", 4), **more)
    read = spy_on_reads(monkeypatch)
    report = run(inputs, **more)
    kept = report.resumed
    assert kept.groups >= 1
    assert kept.groups_total == len(report.manifest.groups) >= 5
    assert 0 < kept.bytes <= kept.bytes_total
    partitions = sum(len(i.slices) for g in report.manifest.read_groups() for i in g.inputs)
    # Each of the other groups is read once, in the last round.
    assert len(read) <= partitions - kept.groups


def test_parts_count_their_own_groups(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", texts_of(2000))
    more = {"group_bytes": GROUP_BYTES}
    first = run(path, part="1/2", **more)
    assert first.resumed is None
    assert run(path, part="2/2", **more).resumed is None
    again = run(path, part="1/2", **more)
    assert again.resumed.groups == again.resumed.groups_total == first.groups
    whole = run(path, **more)
    assert whole.resumed.groups == whole.resumed.groups_total == len(whole.manifest.groups)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (
            KeptWork(3, 8, 57, 412_000_000, 1_648_000_000),
            "resuming: kept 3 of 8 groups and 57 partitions, 412.0 of 1,648.0 MB; 1,236.0 MB are"
            " left",
        ),
        (KeptWork(0, 1, 1, 2_000_000, None), "resuming: kept 1 partition, 2.0 MB of records"),
        (KeptWork(1, 1, 0, 0, 0), "resuming: kept 1 of 1 group, 0.0 of 0.0 MB; 0.0 MB are left"),
    ],
)
def test_the_work_that_is_kept_is_described_in_a_line(kept: KeptWork, words: str) -> None:
    assert resume_line(kept) == words


_WAIT = """
import time, pathlib
def wait(record):
    if record["text"].startswith(" 900 ") and not pathlib.Path({marker!r}).exists():
        pathlib.Path({marker!r}).touch()
        time.sleep(100)
    return record
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills a process")
def test_the_command_reports_it_first(tokenizer_dir: Path, tmp_path: Path) -> None:
    marker, code = tmp_path / "waiting", tmp_path / "f.py"
    code.write_text(_WAIT.format(marker=str(marker)))
    path = write(tmp_path / "a.jsonl", texts_of(1000))
    command = [sys.executable, "-m", "sftprep", "build", path, "--output", str(tmp_path / "o")]
    command += ["--tokenizer", str(tokenizer_dir), "--transform", f"{code}:wait", "--workers", "1"]
    command += ["--group-bytes", str(GROUP_BYTES), "--max-length", "64"]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    for _ in range(300):
        if marker.exists():
            break
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    run = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    resumed = json.loads(run.stdout)["resumed"]
    assert resumed["groups"] >= 1
    assert "resuming" not in run.stderr


def test_the_command_prints_a_line(
    run: Any, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sftprep.cli import main

    path = write(tmp_path / "a.jsonl", texts_of(1000))
    with pytest.raises(Interruption):
        run(path, stop_after=("write", 2), group_bytes=GROUP_BYTES)
    command = ["build", path, "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "o")]
    command += ["--max-length", "64", "--group-bytes", str(GROUP_BYTES), "--workers", "1"]
    with pytest.raises(SystemExit):
        main(command)
    captured = capsys.readouterr()
    assert captured.err.startswith("resuming: kept ")
    assert "resuming" not in captured.out

"""The progress of a command outside a terminal, and what it reports when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftprep.cli.console import StageProgress
from tests.conftest import EXAMPLES

_WAIT = """
import time, pathlib
def wait(record):
    marker = pathlib.Path({marker!r})
    if not marker.exists():
        marker.touch()
        time.sleep(100)
    return record
"""


_WITH_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Runs a command. Shells start background jobs, such as these tests, with the signal ignored."""


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            StageProgress("tokenize", 60_000_000, 200_000_000, 20_000_000, 5.0),
            "tokenize: 60.0 of 200.0 MB (30 %), 8.0 MB/s, 0:18 left",
        ),
        (StageProgress("write", 3, 40, 0, 6.0), "write: 3 of 40 shards (7 %), 1:14 left"),
        (StageProgress("write", 1, 40, 1, 0.0), "write: 1 of 40 shards (2 %)"),
        (StageProgress("write", 0, 0), "write: 0 of 0 shards (0 %)"),
    ],
)
def test_progress_is_described_in_a_line(state: StageProgress, words: str) -> None:
    assert str(state) == words


def test_an_interrupted_build_prints_the_command_that_resumes_it(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "reading"
    (tmp_path / "f.py").write_text(_WAIT.format(marker=str(marker)))
    arguments = ["build", str(EXAMPLES / "data" / "qa.jsonl"), "--tokenizer", str(tokenizer_dir)]
    arguments += ["--output", str(tmp_path / "o"), "--transform", f"{tmp_path / 'f.py'}:wait"]
    command = [sys.executable, "-m", "sftprep", *arguments]
    build = subprocess.Popen(
        [sys.executable, "-c", _WITH_SIGINT, *command],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=dict(os.environ),
    )
    for _ in range(600):
        if marker.exists():
            break
        time.sleep(0.1)
    os.killpg(build.pid, signal.SIGINT)
    _, errors = build.communicate(timeout=60)
    assert build.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("interrupted; what is done is kept. To resume, run")
    assert f"--output {tmp_path / 'o'} --transform" in errors
    assert not (tmp_path / "o" / "manifest.json").exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0

"""The progress bar of a build, on a terminal and elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")


def shown(tokenizer: Path, output: Path, *flags: str) -> str:
    """Return the output of a build whose stderr is a terminal."""
    command = [
        sys.executable,
        "-m",
        "sftprep",
        "build",
        str(EXAMPLES / "data" / "qa.jsonl"),
        *flags,
    ]
    command += ["--tokenizer", str(tokenizer), "--output", str(output), "--max-length", "256"]
    ours, theirs = os.openpty()
    parts: list[bytes] = []

    def collect() -> None:
        try:
            while part := os.read(ours, 4096):
                parts.append(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=collect)
    reader.start()
    try:
        child = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
            check=False,
        )
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    assert child.returncode == 0
    return b"".join(parts).decode()


def test_a_terminal_shows_a_bar_from_the_start(tokenizer_dir: Path, tmp_path: Path) -> None:
    text = shown(tokenizer_dir, tmp_path / "o")
    assert 0 <= text.index("prepare") < text.index("tokenize") < text.index("write")
    assert "prepare" not in text[text.index("write") :]


def test_no_bar_is_shown_with_json(tokenizer_dir: Path, tmp_path: Path) -> None:
    text = shown(tokenizer_dir, tmp_path / "o", "--json")
    assert not any(stage in text for stage in ("prepare", "tokenize", "write"))

"""Two containers that share a folder may give their processes the same id."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_WRITER = """
import os, sys
from pathlib import Path
from sftprep.core.atomic_write import write_bytes

os.getpid = lambda: 7
file, letter = Path(sys.argv[1]), sys.argv[2].encode()
for number in range(200):
    write_bytes(file, letter * 100_000)
    content = file.read_bytes()
    assert len(content) == 100_000 and len(set(content)) == 1, "a torn read"
"""


def test_processes_with_the_same_id_write_the_same_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "file")]
    writers = [
        subprocess.Popen([*command, letter], stderr=subprocess.PIPE, text=True) for letter in "ab"
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=300)
        assert writer.returncode == 0, errors
    assert [file.name for file in tmp_path.iterdir()] == ["file"]

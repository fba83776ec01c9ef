"""What several tests share: the folder of real data that some of them use, and where it is absent,
the reason to skip; the number of random examples; and a limit on time."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sftprep import read_manifest
from sftprep.shards.layout import rejected_path

_CANDIDATE = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SHARED: Path = _CANDIDATE
"""Folder of real tokenizers, datasets and a tiny model, beside the checkout."""

needs_shared = pytest.mark.skipif(
    not _CANDIDATE.is_dir(), reason="the real data is not beside this checkout (../shared/data)"
)

IS_THOROUGH = bool(os.environ.get("THOROUGH_TESTS"))
"""Whether expensive tests run with all of their examples: `make test-all`."""


def thorough(examples: int, *, default: int) -> int:
    """Return the number of examples of an expensive property test, or the step of a sweep."""
    return examples if IS_THOROUGH else default


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this process where the block takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rejected_file(folder: Path) -> Path:
    """Return the file of the rejected records of a build with one group."""
    (path,) = (folder / "rejected").iterdir()
    return path


def rejected_entries(folder: Path) -> list[dict[str, Any]]:
    """Return the rejected records of a build, in the order of its groups."""
    return [
        json.loads(line)
        for entry in read_manifest(folder).groups
        if entry.rejected
        for line in (folder / rejected_path(entry.key, entry.rejected)).read_text().splitlines()
    ]

"""Inputs of many small groups, and what a build reads of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sftprep.pipeline.passes import tokenize_pass
from sftprep.sources.partition import Partition

GROUP_BYTES = 1 << 16
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi".split()  # noqa: SIM905


def texts_of(count: int, seed: int = 0, name: str = "") -> list[dict[str, str]]:
    """Return distinct records of text, of 150 bytes on average."""
    rng = random.Random(seed)
    return [
        {"text": f"{name} {number} " + " ".join(rng.choices(WORDS, k=rng.randint(5, 45)))}
        for number in range(count)
    ]


def write(path: Path, rows: Iterable[Any]) -> str:
    """Write records as JSON lines; strings are lines as they are."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def spy_on_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list that receives the file and the start of each partition that is read."""
    read: list[tuple[str, int]] = []
    read_partition = tokenize_pass.read_partition

    def spy(partition: Partition) -> bytes:
        read.append((Path(partition.file).name, partition.start))
        return read_partition(partition)

    monkeypatch.setattr(tokenize_pass, "read_partition", spy)
    return read

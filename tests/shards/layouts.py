"""Builds of both layouts from the same records, and the comparison of their packs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from sftprep import Shards, build, open_shards

COLUMNS = (
    "input_ids",
    "position_ids",
    "completion_mask",
    "seq_lengths",
    "origin",
    "loss_weights",
    "flags",
)
TOTALS = ("rows", "tokens", "trained_tokens", "max_length", "plan")


def write_tokens(path: Path, sizes: list[tuple[int, float]], seed: int = 0) -> str:
    """Write records of token ids, each with a number of tokens and the share that is trained."""
    draw = random.Random(seed)
    rows = []
    for size, share in sizes:
        ids = [draw.randrange(3, 120) for _ in range(size)]
        labels = [token if draw.random() < share else -100 for token in ids]
        rows.append({"input_ids": ids, "labels": labels})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def build_layout(layout: str, folder: Path, source: Any, **settings: Any) -> Path:
    """Build a layout in a subfolder of its name."""
    fixed: dict[str, Any] = {"workers": 1, "encoder": "tokenizers", "max_length": 64}
    fixed |= {"output": folder / layout, "layout": layout, "overwrite": True}
    arguments = () if source is None else (source,)
    build(*arguments, **(fixed | settings))
    return folder / layout


def assert_same_packs(packs: Shards, planned: Shards) -> None:
    """Check that all packs are equal in all columns and types, and so are their totals."""
    assert len(packs) == len(planned)
    for number, (pack, other) in enumerate(zip(packs, planned, strict=True)):
        for name in COLUMNS:
            expected, found = getattr(pack, name), getattr(other, name)
            assert (expected is None) == (found is None), (number, name)
            if expected is not None:
                np.testing.assert_array_equal(expected, found, err_msg=f"{number} {name}")
                assert expected.dtype == found.dtype, name
        assert packs.locate(number, 0) == planned.locate(number, 0)
        np.testing.assert_array_equal(planned.seq_lengths(number), pack.seq_lengths)
    everything = np.arange(len(packs))
    assert packs.sizes(everything).equals(planned.sizes(everything))
    for name in TOTALS:
        assert getattr(packs.manifest, name) == getattr(planned.manifest, name), name


def open_both(folder: Path, **requested: Any) -> tuple[Shards, Shards]:
    """Open the packs of a folder, and the planned ones with the requested settings."""
    return open_shards(folder / "packs"), open_shards(folder / "sequences", **requested)

"""What exports must contain, computed from the packs token by token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sftprep

SPLITS = {"train": "", "validation": "eval"}
"""The folder of the build of each split, relative to that of the whole build."""

Sequence = tuple[list[int], list[bool], list[float]]
"""The ids of a sequence, whether each is a target, and the weight of each target."""


def expected_packs(build: Path, split: str) -> list[list[Sequence]]:
    """Return the sequences of each pack of a build."""
    packs = []
    for pack in sftprep.open_shards(build / SPLITS[split]):
        weights = pack.completion_mask if pack.loss_weights is None else pack.loss_weights
        begin, sequences = 0, []
        for length in pack.seq_lengths.tolist():
            ids = pack.input_ids[begin : begin + length].tolist()
            mask = pack.completion_mask[begin : begin + length].tolist()
            targets = [number > 0 and bool(trained) for number, trained in enumerate(mask)]
            cut = weights[begin : begin + length].tolist()
            kept = [float(w) if t else 0.0 for w, t in zip(cut, targets, strict=True)]
            sequences.append((ids, targets, kept))
            begin += length
        packs.append(sequences)
    return packs


def labelled_packs(rows: Any) -> list[list[Sequence]]:
    """Return the sequences of rows with input_ids, labels, seq_lengths and perhaps loss_weights."""
    return [[*_split(row)] for row in rows]


def _split(row: Any) -> Iterator[Sequence]:
    begin = 0
    for length in row["seq_lengths"]:
        ids = [int(token) for token in row["input_ids"][begin : begin + length]]
        labels = [int(label) for label in row["labels"][begin : begin + length]]
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        targets = [label != -100 for label in labels]
        weights = row.get("loss_weights")
        cut = targets if weights is None else weights[begin : begin + length]
        yield ids, targets, [float(w) if t else 0.0 for w, t in zip(cut, targets, strict=True)]
        begin += length
    assert begin == len(row["input_ids"]) == len(row["labels"])

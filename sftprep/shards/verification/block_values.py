"""Checks of the values in a block of packs whose layout is valid."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftprep.shards.group import Group
from sftprep.shards.manifest import Manifest
from sftprep.shards.schema import ORIGIN_BITS, numpy_view, position_dtype
from sftprep.shards.writer import make_position_ids


def find_value_problems(
    batch: pa.RecordBatch, first: int, group: Group, manifest: Manifest
) -> Iterator[str]:
    """Yield the problems with the values of a block.

    Each check yields the first violation only.

    Args:
        batch: The block.
        first: The number of packs before it in the shard.
        group: The group of the shard.
        manifest: The manifest of the build.
    """
    yield from _find_row_problems(batch, first, manifest)
    origin = numpy_view(batch.column("origin").values)
    if (wrong := np.flatnonzero(~are_lines(origin, group, manifest))).size:
        offsets = numpy_view(batch.column("origin").offsets)
        row = first + int(np.searchsorted(offsets, wrong[0], side="right")) - 1
        yield f"row {row}: origin {origin[wrong[0]]} is not a line of the inputs"


def _find_row_problems(batch: pa.RecordBatch, first: int, manifest: Manifest) -> Iterator[str]:
    """Yield the problems with ids, lengths, weights and positions."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    seq_lengths = numpy_view(columns["seq_lengths"].values)
    token_offsets = numpy_view(columns["input_ids"].offsets).astype(np.int64)
    pack_offsets = numpy_view(columns["seq_lengths"].offsets).astype(np.int64)

    # Lengths of sequences and of packs.
    if (wrong := np.flatnonzero(seq_lengths > manifest.max_length)).size:
        row = first + int(np.searchsorted(pack_offsets, wrong[0], side="right")) - 1
        yield (
            f"row {row}: a sequence of {seq_lengths[wrong[0]]} tokens (1 to"
            f" {manifest.max_length} are allowed)"
        )
    pack_lengths = np.diff(token_offsets)
    if (wrong := np.flatnonzero(pack_lengths > manifest.max_length)).size:
        yield (
            f"row {first + wrong[0]}: {pack_lengths[wrong[0]]} tokens, more than"
            f" {manifest.max_length}"
        )

    yield from find_token_problems(batch, first, manifest)
    if "position_ids" in columns:
        stored = numpy_view(columns["position_ids"].values)
        expected = make_position_ids(seq_lengths, position_dtype(manifest.max_length))
        if not np.array_equal(stored, expected):
            yield "position_ids do not restart at 0 with each sequence"


def find_token_problems(batch: pa.RecordBatch, first: int, manifest: Manifest) -> Iterator[str]:
    """Yield the problems with the values of each token of a block, of any layout.

    The arguments are those of `find_value_problems`.
    """
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    ids = numpy_view(columns["input_ids"].values)
    mask = numpy_view(columns["completion_mask"].values)
    token_offsets = numpy_view(columns["input_ids"].offsets).astype(np.int64)
    if "loss_weights" in columns:
        weights = numpy_view(columns["loss_weights"].values)
        if not (np.isfinite(weights).all() and ((weights > 0) == mask).all()):
            yield "loss_weights are not above 0 exactly where tokens are trained"
    if not isinstance(vocab_size := manifest.tokenizer.get("vocab_size"), int):
        yield "the manifest does not state the size of the vocabulary"
    elif (wrong := np.flatnonzero(ids >= vocab_size)).size:
        row = first + int(np.searchsorted(token_offsets, wrong[0], side="right")) - 1
        yield f"row {row}: id {ids[wrong[0]]} is outside the vocabulary of {vocab_size}"


def are_lines(origin: NDArray[np.int64], group: Group, manifest: Manifest) -> NDArray[np.bool_]:
    """Return whether each origin is that of a line of the inputs of a group: bool [n]."""
    if not manifest.has_slices:
        return (origin >= 0) & (origin < sum(info.lines for info in group.inputs))
    # All slices that do not exist are taken for one without lines, after the last one.
    lines = np.array([*(n for info in group.inputs for n in info.slices), 0], dtype=np.int64)
    number = np.minimum(origin >> ORIGIN_BITS, len(lines) - 1)
    line = origin & ((1 << ORIGIN_BITS) - 1)
    is_line: NDArray[np.bool_] = (origin >= 0) & (line < lines[np.maximum(number, 0)])
    return is_line

"""One shard of layout `sequences` as a memory-mapped file, and its writer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftprep.core.ragged import to_offsets
from sftprep.shards.group import ShardInfo
from sftprep.shards.schema import arrow_array, numpy_view
from sftprep.shards.sequences.schema import block_offsets, sequence_schema
from sftprep.shards.shard_file import ShardFile
from sftprep.shards.writer import ShardRows, count_targets, write_batch


class SequenceFile(ShardFile):
    """A mapped shard with one row per sequence.

    Args:
        path: The file.
        info: Its entry in the file of its group.
        lengths: int32 [n]; the tokens of each sequence, from the index of the group.
        verify: Whether to check the digest of each block when it is first read.
        checked: The numbers of the blocks that were checked already; blocks are added to it.

    Raises:
        ShardError: The file is missing, has another size, is not a shard, or its end is damaged.
    """

    def __init__(
        self,
        path: Path,
        info: ShardInfo,
        lengths: NDArray[np.int32],
        *,
        verify: bool,
        checked: set[int],
    ) -> None:
        self._lengths = lengths
        super().__init__(
            path,
            info,
            0,  # there are no position ids, whose type would depend on it
            verify=verify,
            checked=checked,
            row_offsets=block_offsets(lengths).tolist(),
        )

    def _expected_schema(self, names: list[str], max_length: int) -> pa.Schema:
        return sequence_schema(loss_weights="loss_weights" in names)

    def _find_problems(self, batch: pa.RecordBatch, first: int, end: int) -> Iterator[str]:
        if batch.num_rows != end - first:
            yield f"its rows from {first} are {batch.num_rows}, and the index says {end - first}"
        expected = to_offsets(self._lengths[first:end].astype(np.int64))
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if column.null_count:
                yield f"{name} holds null"
            if not pa.types.is_list(column.type):
                continue
            if column.values.null_count:
                yield f"{name} holds null"
            offsets = numpy_view(column.offsets)
            if not np.array_equal(offsets, expected) or len(column.values) != expected[-1]:
                yield f"{name} does not have the lengths of the index"
        ids = numpy_view(batch.column("input_ids").values)
        for index in np.flatnonzero(ids < 0):
            row = first + int(np.searchsorted(expected, index, side="right")) - 1
            yield f"row {row}: the token id {ids[index]}"


def write_sequences(folder: Path, index: int, rows: ShardRows) -> ShardInfo:
    """Write a shard with one row per sequence, under a name with a digest of its content.

    Args:
        folder: The folder to write to.
        index: The number of the shard in its group, from 0.
        rows: The sequences. The packs are ignored.

    Raises:
        StorageError: The file cannot be written.
    """
    schema = sequence_schema(loss_weights=rows.loss_weights is not None)
    offsets = to_offsets(rows.seq_lengths.astype(np.int64)).astype(np.int32)
    columns: dict[str, NDArray[Any]] = {
        "input_ids": rows.input_ids,
        "completion_mask": rows.completion_mask,
        "origin": rows.origin.astype(np.int64, copy=False),
        "flags": rows.flags,
    }
    if rows.loss_weights is not None:
        columns["loss_weights"] = rows.loss_weights
    arrays = {name: arrow_array(values) for name, values in columns.items()}
    is_list = {field.name: pa.types.is_list(field.type) for field in schema}
    batch = pa.RecordBatch.from_arrays(
        [
            pa.ListArray.from_arrays(arrow_array(offsets), arrays[name])
            if is_list[name]
            else arrays[name]
            for name in schema.names
        ],
        schema=schema,
    )
    return write_batch(
        folder,
        index,
        batch,
        block_offsets(rows.seq_lengths).tolist(),
        trained_tokens=count_targets(rows.completion_mask, rows.seq_lengths),
    )

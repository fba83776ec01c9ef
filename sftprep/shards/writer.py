"""Writing one shard: flat buffers of packed sequences into an Arrow file named by its content."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sftprep.core.atomic_write import write_named
from sftprep.shards.manifest import ShardInfo
from sftprep.shards.schema import arrow_array, position_dtype, shard_schema


@dataclass(frozen=True, slots=True)
class ShardRows:
    """The packs of one shard, flat.

    input_ids int32 [tokens], completion_mask bool [tokens]: sequence after sequence, pack after
    pack; seq_lengths int32 [sequences], origin int64 [sequences]; pack_offsets int64 [packs + 1]:
    pack k holds the sequences pack_offsets[k] .. pack_offsets[k + 1] - 1; loss_weights float32
    [tokens], or None.
    """

    input_ids: NDArray[np.int32]
    completion_mask: NDArray[np.bool_]
    seq_lengths: NDArray[np.int32]
    origin: NDArray[np.int64]
    pack_offsets: NDArray[np.int64]
    loss_weights: NDArray[np.float32] | None = None


def write_shard(
    folder: Path, index: int, rows: ShardRows, *, max_length: int, position_ids: bool
) -> ShardInfo:
    """Write shard number `index` into `folder` under its final, content-addressed name.

    The same rows give the same bytes and the same name. Raises StorageError.
    """
    batch = _record_batch(rows, max_length, position_ids=position_ids)
    with ThreadPoolExecutor(1) as beside:
        sink = _Sink(beside)

        def write(file: BinaryIO) -> None:
            sink.file = file
            with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), batch.schema) as writer:
                writer.write_batch(batch)

        def name_of() -> str:
            beside.shutdown()
            return f"{working_name}-{sink.sha256.hexdigest()[:16]}.arrow"

        working_name = f"shard-{index:05d}"
        name = write_named(folder, working_name, write, name_of)
    return ShardInfo(
        name=name,
        rows=len(rows.pack_offsets) - 1,
        tokens=len(rows.input_ids),
        trained_tokens=count_targets(rows.completion_mask, rows.seq_lengths),
        bytes=sink.size,
        sha256=sink.sha256.hexdigest(),
        xxh3=sink.xxh3.hexdigest(),
    )


def count_targets(completion_mask: NDArray[np.bool_], seq_lengths: NDArray[np.int32]) -> int:
    """Trained tokens that something predicts: all that the mask marks but the first of each
    sequence."""
    filled = seq_lengths[seq_lengths > 0]
    firsts = np.cumsum(filled, dtype=np.int64) - filled
    return int(np.count_nonzero(completion_mask)) - int(np.count_nonzero(completion_mask[firsts]))


def positions_of(seq_lengths: NDArray[np.int32], dtype: Any) -> NDArray[Any]:
    """0 .. len-1 for each sequence, one after the other: [sum(seq_lengths)] of `dtype`."""
    # Copying the start of one count is several times faster than computing each.
    count = np.arange(int(seq_lengths.max(initial=0)), dtype=dtype)
    return np.concatenate([count[:0], *(count[:length] for length in seq_lengths.tolist())])


class _Sink:
    """A file that knows the digests of what is written to it: no copy is made of a shard, and it is
    not read again.

    beside: one thread. SHA-256 takes as long as writing and syncing together, and runs beside them.
    """

    closed = False

    def __init__(self, beside: ThreadPoolExecutor) -> None:
        self.file: BinaryIO | None = None
        self.size, self.sha256, self.xxh3 = 0, sha256(), xxhash.xxh3_128()
        self._beside = beside

    def write(self, data: Any) -> int:
        assert self.file is not None
        self._beside.submit(self.sha256.update, data)
        self.xxh3.update(data)
        self.file.write(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        return None


def _record_batch(rows: ShardRows, max_length: int, *, position_ids: bool) -> pa.RecordBatch:
    schema = shard_schema(
        max_length, position_ids=position_ids, loss_weights=rows.loss_weights is not None
    )
    token_offsets = np.concatenate(([0], np.cumsum(rows.seq_lengths, dtype=np.int64)))[
        rows.pack_offsets
    ].astype(np.int32)
    sequence_offsets = rows.pack_offsets.astype(np.int32)
    values: dict[str, tuple[NDArray[np.int32], NDArray[Any]]] = {
        "input_ids": (token_offsets, rows.input_ids),
        "completion_mask": (token_offsets, rows.completion_mask),
        "seq_lengths": (sequence_offsets, rows.seq_lengths.astype(np.int32, copy=False)),
        "origin": (sequence_offsets, rows.origin.astype(np.int64, copy=False)),
    }
    if rows.loss_weights is not None:
        values["loss_weights"] = (token_offsets, rows.loss_weights)
    if position_ids:
        values["position_ids"] = (
            token_offsets,
            positions_of(rows.seq_lengths, position_dtype(max_length)),
        )
    lists = {
        name: pa.ListArray.from_arrays(*map(arrow_array, pair)) for name, pair in values.items()
    }
    # The types are right as they are; a cast would import pyarrow.compute, which takes longer than
    # a small build.
    columns = [lists[name] for name in schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=schema)

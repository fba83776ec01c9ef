"""Writing of shards: packed sequences in Arrow files named by their content."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sftprep.core.atomic_write import write_named
from sftprep.shards.group import Block, ShardInfo
from sftprep.shards.schema import BLOCK_PACKS, arrow_array, position_dtype, shard_schema


@dataclass(frozen=True, slots=True)
class ShardRows:
    """The packs of one shard in flat arrays.

    They are stored sequence after sequence, pack after pack.

    Example:
        The packs [[5, 6], [7]] and [[8, 9]], which hold three sequences:
        input_ids = [5, 6, 7, 8, 9], seq_lengths = [2, 1, 2], pack_offsets = [0, 2, 3]
    """

    input_ids: NDArray[np.int32]  # [tokens]
    completion_mask: NDArray[np.bool_]  # [tokens], True = trained
    seq_lengths: NDArray[np.int32]  # [sequences], in tokens
    origin: NDArray[np.int64]  # [sequences], slice and line of the record
    # [packs + 1]; pack k holds the sequences pack_offsets[k] .. pack_offsets[k + 1] - 1
    pack_offsets: NDArray[np.int64]
    flags: NDArray[np.uint8]  # [sequences], see `core.types.Flag`
    loss_weights: NDArray[np.float32] | None = None  # [tokens]; None if all weights are 1


def write_shard(
    folder: Path, index: int, rows: ShardRows, *, max_length: int, position_ids: bool
) -> ShardInfo:
    """Write a shard under its final name, with a digest of its content.

    The same rows give the same bytes and the same name.

    Args:
        folder: The folder to write to.
        index: The number of the shard in the build, from 0.
        rows: The packs.
        max_length: Tokens per pack at most, which determines the type of position ids.
        position_ids: Whether to store position ids.

    Returns:
        The entry of the shard in the manifest.

    Raises:
        StorageError: The file cannot be written.
    """
    batch = _make_record_batch(rows, max_length, position_ids=position_ids)
    return write_batch(
        folder,
        index,
        batch,
        [*range(0, batch.num_rows, BLOCK_PACKS), batch.num_rows],
        trained_tokens=count_targets(rows.completion_mask, rows.seq_lengths),
    )


def write_batch(
    folder: Path,
    index: int,
    batch: pa.RecordBatch,
    row_offsets: Sequence[int],
    *,
    trained_tokens: int,
) -> ShardInfo:
    """Write the rows of a shard as `write_shard` does, whatever its columns.

    Args:
        folder: The folder to write to.
        index: The number of the shard, from 0.
        batch: The rows, with a column `input_ids`.
        row_offsets: The first row of each block, and the number of rows at the end.
        trained_tokens: The number of targets of the loss.

    Raises:
        StorageError: The file cannot be written.
    """
    with ThreadPoolExecutor(1) as hash_thread:
        sink = _HashingSink(hash_thread)

        def write(file: BinaryIO) -> None:
            sink.file = file
            with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), batch.schema) as writer:
                for first, end in pairwise(row_offsets):
                    writer.write_batch(batch.slice(first, end - first))
                    sink.end_block()
            sink.end_block()

        def final_name() -> str:
            hash_thread.shutdown()  # waits for the digest
            return f"{working_name}-{sink.sha256.hexdigest()[:16]}.arrow"

        working_name = f"shard-{index:05d}"
        name = write_named(folder, working_name, write, final_name)
    return ShardInfo(
        name=name,
        rows=batch.num_rows,
        tokens=len(batch.column("input_ids").values),
        trained_tokens=trained_tokens,
        bytes=sink.size,
        sha256=sink.sha256.hexdigest(),
        blocks=tuple(sink.blocks),
    )


def count_targets(completion_mask: NDArray[np.bool_], seq_lengths: NDArray[np.int32]) -> int:
    """Return the number of targets of the loss.

    These are the tokens that the mask marks, except for the first token of each sequence, which
    nothing predicts.

    Args:
        completion_mask: bool [sum(seq_lengths)].
        seq_lengths: int32 [sequences]; lengths of 0 are allowed.

    Example:
        completion_mask = [True, True, True, False, True], seq_lengths = [2, 3]  ->  2
    """
    nonempty = seq_lengths[seq_lengths > 0]
    firsts = np.cumsum(nonempty, dtype=np.int64) - nonempty
    return int(np.count_nonzero(completion_mask)) - int(np.count_nonzero(completion_mask[firsts]))


def make_position_ids(seq_lengths: NDArray[np.int32], dtype: Any) -> NDArray[Any]:
    """Return position ids, restarting at 0 with each sequence.

    Args:
        seq_lengths: int32 [sequences].
        dtype: The type of the result.

    Returns:
        `dtype` [sum(seq_lengths)].

    Example:
        make_position_ids([2, 3], np.int32)  ->  [0, 1, 0, 1, 2]
    """
    # Copying the start of one range is several times faster than computing a range per sequence.
    longest = np.arange(int(seq_lengths.max(initial=0)), dtype=dtype)
    return np.concatenate([longest[:0], *(longest[:length] for length in seq_lengths.tolist())])


class _HashingSink:
    """A file object with digests of the bytes written to it.

    The shard is neither copied in memory nor read back from the disk for its digests.

    Args:
        hash_thread: An executor with one thread, so that the parts are hashed in order. SHA-256
            takes as long as writing and syncing together, and runs in parallel with them.
    """

    closed = False  # Arrow asks for it

    def __init__(self, hash_thread: ThreadPoolExecutor) -> None:
        self.file: BinaryIO | None = None  # set when the temporary file is open
        self.size, self.sha256, self.blocks = 0, sha256(), list[Block]()
        self._block, self._block_start = xxhash.xxh3_128(), 0
        self._hash_thread = hash_thread

    def write(self, data: Any) -> int:
        assert self.file is not None
        self._hash_thread.submit(self.sha256.update, data)
        self._block.update(data)
        self.file.write(data)
        self.size += len(data)
        return len(data)

    def end_block(self) -> None:
        """End a block with the bytes written so far."""
        self.blocks.append(Block(self.size - self._block_start, self._block.hexdigest()))
        self._block, self._block_start = xxhash.xxh3_128(), self.size

    def flush(self) -> None:
        return None


def _make_record_batch(rows: ShardRows, max_length: int, *, position_ids: bool) -> pa.RecordBatch:
    """Return the packs as one Arrow record batch without a copy of the arrays."""
    schema = shard_schema(
        max_length,
        position_ids=position_ids,
        loss_weights=rows.loss_weights is not None,
    )
    # Offsets of each row, in tokens and in sequences; Arrow lists have int32 offsets.
    token_offsets = np.concatenate(([0], np.cumsum(rows.seq_lengths, dtype=np.int64)))[
        rows.pack_offsets
    ].astype(np.int32)
    sequence_offsets = rows.pack_offsets.astype(np.int32)

    # Name of a column -> offsets of its rows, and its values.
    flat: dict[str, tuple[NDArray[np.int32], NDArray[Any]]] = {
        "input_ids": (token_offsets, rows.input_ids),
        "completion_mask": (token_offsets, rows.completion_mask),
        "seq_lengths": (sequence_offsets, rows.seq_lengths.astype(np.int32, copy=False)),
        "origin": (sequence_offsets, rows.origin.astype(np.int64, copy=False)),
        "flags": (sequence_offsets, rows.flags),
    }
    if rows.loss_weights is not None:
        flat["loss_weights"] = (token_offsets, rows.loss_weights)
    if position_ids:
        flat["position_ids"] = (
            token_offsets,
            make_position_ids(rows.seq_lengths, position_dtype(max_length)),
        )

    # The arrays already have the types of the schema. A cast would import pyarrow.compute, which
    # takes longer than a small build.
    lists = {name: pa.ListArray.from_arrays(*map(arrow_array, pair)) for name, pair in flat.items()}
    return pa.RecordBatch.from_arrays([lists[name] for name in schema.names], schema=schema)

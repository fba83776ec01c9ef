"""One shard as a memory-mapped file, read and checked block by block.

A block is a record batch of `BLOCK_PACKS` packs. A reader that needs one pack reads and checks the
block of that pack, and not the whole shard. The digests of the blocks and of the footer cover every
byte of the file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from sftprep.errors import ShardError, setting
from sftprep.shards.group import Block, ShardInfo
from sftprep.shards.schema import BLOCK_PACKS, numpy_view, shard_schema

# The second remedy is shown only by front ends that can replace a build.
BUILD_AGAIN = (
    "copy the folder again (`sftprep verify DIR` checks every shard)",
    f"build it again with {setting('overwrite', True)}",
)

FileIdentity = tuple[int, int, int, int, int]
"""Changes whenever a file is replaced or written: device, inode, size, and times in nanoseconds."""


class ShardFile:
    """A mapped shard.

    Args:
        path: The file.
        info: Its entry in the manifest.
        max_length: Tokens per pack at most, which determines the type of position ids.
        verify: Whether to check the digest of each block when it is first read.
        checked: The numbers of the blocks that were checked already; blocks are added to it.
        row_offsets: The first row of each block, and the number of rows at the end; None for blocks
            of `BLOCK_PACKS` packs.

    Raises:
        ShardError: The file is missing, has another size, is not a shard, or its end is damaged.
    """

    def __init__(
        self,
        path: Path,
        info: ShardInfo,
        max_length: int,
        *,
        verify: bool,
        checked: set[int],
        row_offsets: Sequence[int] | None = None,
    ) -> None:
        self.path, self._info, self._verify, self._checked = path, info, verify, checked
        # A shard of version 1 is one block, with the digest of the whole file.
        self._blocks = info.blocks or (Block(info.bytes, info.xxh3),)
        self._ends = [*accumulate(block.bytes for block in self._blocks)]
        self.packs_per_block = BLOCK_PACKS if info.blocks else max(1, info.rows)
        self._row_offsets = row_offsets or [*range(0, info.rows, self.packs_per_block), info.rows]
        num_blocks = len(self._row_offsets) - 1
        # The size is checked first: a file that is shorter than its map would kill the process with
        # SIGBUS when the missing part is read.
        check_size(path, info)
        if self._ends[-1] != info.bytes or len(self._blocks) != num_blocks + bool(info.blocks):
            raise self._error(": its blocks in the manifest do not cover it")
        try:
            self._source = pa.memory_map(str(path))
            # The last block has the footer, from which everything below is read.
            self._check_digest(len(self._blocks) - 1)
            self._reader = pa.ipc.open_file(self._source)
            fields = [(field.name, field.type) for field in self._reader.schema]
        except (pa.ArrowException, OSError, ValueError) as error:
            # Arrow raises ValueError too, for example for a name that is not UTF-8.
            raise self._damaged(str(error)) from error
        if self._reader.num_record_batches != num_blocks:
            raise self._error(
                f" holds {self._reader.num_record_batches} record batches, not {num_blocks}"
            )
        self._columns = self._check_columns(fields, max_length)

    def __len__(self) -> int:
        """Return the number of blocks with packs."""
        return int(self._reader.num_record_batches)

    def read_block(self, number: int) -> pa.RecordBatch:
        """Return the packs of a block.

        Its offsets are consistent, so rows can be read without further checks.

        Raises:
            ShardError: The block is damaged.
        """
        try:
            if number in self._checked:
                return self._reader.get_batch(number).select(self._columns)
            self._check_digest(number)
            batch = self._reader.get_batch(number).select(self._columns)
            batch.validate(full=True)
            first, end = self._row_offsets[number : number + 2]
            problem = next(self._find_problems(batch, first, end), None)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(str(error)) from error
        if problem:
            raise self._error(f": {problem}")
        self._checked.add(number)
        return batch

    def _check_columns(self, fields: list[tuple[str, pa.DataType]], max_length: int) -> list[str]:
        """Check the names and types of columns; return the columns of a shard."""
        names = [name for name, _ in fields]
        expected = self._expected_schema(names, max_length)
        # Other columns, which a later minor version may add, are ignored.
        found = dict(fields)
        if len(found) != len(names) or any(found.get(f.name) != f.type for f in expected):
            raise self._error(f": its columns are {names}, of other types than those of a shard")
        return [*expected.names]

    def _expected_schema(self, names: list[str], max_length: int) -> pa.Schema:
        """Return the schema of a shard with columns of these names."""
        return shard_schema(
            max_length,
            position_ids="position_ids" in names,
            loss_weights="loss_weights" in names,
            flags="flags" in names,
        )

    def _find_problems(self, batch: pa.RecordBatch, first: int, end: int) -> Iterator[str]:
        """Yield the problems with offsets, lengths and ids of the block of rows [first, end)."""
        return _find_layout_problems(batch, first, end - first)

    def _check_digest(self, number: int) -> None:
        if not self._verify or number in self._checked:
            return
        block = self._blocks[number]
        data = self._source.read_at(block.bytes, self._ends[number] - block.bytes)
        if xxhash.xxh3_128_hexdigest(data) != block.xxh3:
            raise self._damaged("its content is not what was written")

    def _damaged(self, problem: str) -> ShardError:
        return self._error(f" is damaged: {problem}")

    def _error(self, problem: str) -> ShardError:
        return ShardError(f"{self.path}{problem}", remedy=BUILD_AGAIN)


def check_size(path: Path, info: ShardInfo) -> FileIdentity:
    """Check that a shard is a regular file of the size that was written, and identify the file.

    Raises:
        ShardError: It is missing, or of another kind or size.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise ShardError(f"{path} is missing", remedy=BUILD_AGAIN) from error
    if not stat.S_ISREG(status.st_mode):
        # Opening a pipe would block until another process writes to it.
        raise ShardError(f"{path} is not a regular file", remedy=BUILD_AGAIN)
    size = status.st_size
    if size != info.bytes:
        raise ShardError(
            f"{path} has {size} bytes, not the {info.bytes} that were written", remedy=BUILD_AGAIN
        )
    return status.st_dev, status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns


def _find_layout_problems(batch: pa.RecordBatch, first: int, rows: int) -> Iterator[str]:
    """Yield the problems with offsets, lengths and ids of a block.

    Each check relies on the ones before it.

    Args:
        batch: The block.
        first: The number of packs before it in the shard.
        rows: Its number of packs, according to the manifest.
    """
    # Rows, and the values that they cover.
    if batch.num_rows != rows:
        yield f"its rows from {first} are {batch.num_rows}, and the manifest says {rows}"
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for name, column in columns.items():
        if column.null_count or column.values.null_count:
            yield f"{name} holds null"
        offsets = numpy_view(column.offsets)
        if offsets[0] != 0 or offsets[-1] != len(column.values):
            yield f"the rows of {name} do not hold all of its values"

    # Columns with one value per token have equal offsets, and so have those with one per sequence.
    token_offsets = numpy_view(columns["input_ids"].offsets)
    pack_offsets = numpy_view(columns["seq_lengths"].offsets)
    for name, column in columns.items():
        same_as = "seq_lengths" if name in ("seq_lengths", "origin", "flags") else "input_ids"
        if not np.array_equal(numpy_view(column.offsets), numpy_view(columns[same_as].offsets)):
            yield f"{name} and {same_as} have other lengths"

    # The sequences of a pack cover its tokens.
    seq_lengths = numpy_view(columns["seq_lengths"].values)
    for index in np.flatnonzero(seq_lengths < 1):
        row = first + int(np.searchsorted(pack_offsets, index, side="right")) - 1
        yield f"row {row}: a sequence of {seq_lengths[index]} tokens"
    ends = np.concatenate(([0], np.cumsum(seq_lengths, dtype=np.int64)))
    for index in np.flatnonzero(ends[pack_offsets] != token_offsets):
        yield f"row {first + index - 1}: its seq_lengths do not sum to its length"

    # A negative id would index an embedding from its end, without an error.
    ids = numpy_view(columns["input_ids"].values)
    for index in np.flatnonzero(ids < 0):
        row = first + int(np.searchsorted(token_offsets, index, side="right")) - 1
        yield f"row {row}: the token id {ids[index]}"

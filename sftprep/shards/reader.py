"""Reading a build back: memory-mapped, in any order, columns as NumPy views."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sftprep.errors import ManifestError, ShardError
from sftprep.shards.layout import MANIFEST_NAME, SHARD_FOLDER
from sftprep.shards.manifest import Manifest, ShardInfo, read_manifest
from sftprep.shards.schema import numpy_view, position_dtype, shard_schema
from sftprep.shards.writer import positions_of


@dataclass(frozen=True, slots=True)
class Pack:
    """One row of a shard: several sequences, one after the other.

    input_ids int32 [T]; position_ids uint16 or int32 [T]; completion_mask bool [T]; seq_lengths
    int32 [S], summing to T; origin int64 [S]; loss_weights float32 [T], what each token weighs in
    the loss, None where every trained one weighs 1. All but completion_mask (which is stored as
    bits) and derived position_ids are views of the file.
    """

    input_ids: NDArray[np.int32]
    position_ids: NDArray[Any]
    completion_mask: NDArray[np.bool_]
    seq_lengths: NDArray[np.int32]
    origin: NDArray[np.int64]
    loss_weights: NDArray[np.float32] | None = None


def open_shards(folder: str | os.PathLike[str], *, verify: bool = True) -> Shards:
    """Open a finished build for reading.

    verify: check a shard's digest when it is first touched (some 20 GB/s), so that a damaged one is
    an error and never wrong tokens. Raises ManifestError where the folder is no finished build,
    ShardError where a shard is missing or cut.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    if (held := sum(info.rows for info in manifest.shards)) != manifest.rows:
        raise ManifestError(
            f"{root / MANIFEST_NAME} is damaged: rows is {manifest.rows}, and the shards that it"
            f" lists have {held}",
            remedy=_BUILD_AGAIN,
        )
    for info in manifest.shards:
        _check_size(root / SHARD_FOLDER / info.name, info)
    return Shards(root, manifest, verify=verify)


class Shards:
    """A build, as a sequence of packs: `len(shards)`, `shards[i]`, iteration. Cheap to make, safe
    to send to a process."""

    def __init__(self, root: Path, manifest: Manifest, *, verify: bool) -> None:
        self.root, self.manifest, self.verify = root, manifest, verify
        self._ends = np.cumsum([info.rows for info in manifest.shards], dtype=np.int64)
        self._open: dict[int, _Columns] = {}

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: int) -> Pack:
        columns, row = self._find(index)
        seq_lengths = columns.row("seq_lengths", row)
        positions = (
            columns.row("position_ids", row)
            if "position_ids" in columns.values
            else positions_of(seq_lengths, position_dtype(self.manifest.max_length))
        )
        weights = columns.row("loss_weights", row) if "loss_weights" in columns.values else None
        return Pack(
            columns.row("input_ids", row),
            positions,
            columns.mask(row),
            seq_lengths,
            columns.row("origin", row),
            weights,
        )

    def __iter__(self) -> Iterator[Pack]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (str(self.root), self.manifest, self.verify))

    def seq_lengths(self, index: int) -> NDArray[np.int32]:
        """Lengths of the sequences in pack `index`: int32 [S], a view; touches none of its
        tokens."""
        columns, row = self._find(index)
        return columns.row("seq_lengths", row)

    def _find(self, index: int) -> tuple[_Columns, int]:
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, at, side="right"))
        if shard not in self._open:
            info = self.manifest.shards[shard]
            self._open[shard] = _Columns(
                self.root / SHARD_FOLDER / info.name,
                info,
                self.manifest.max_length,
                verify=self.verify,
            )
        return self._open[shard], at - int(self._ends[shard] - self.manifest.shards[shard].rows)


class _Columns:
    """The flat values and offsets of one shard's columns, as views of its memory map."""

    def __init__(self, path: Path, info: ShardInfo, max_length: int, *, verify: bool) -> None:
        batch = map_shard(path, info, max_length, verify=verify)
        self.offsets: dict[str, NDArray[np.int32]] = {}
        self.values: dict[str, NDArray[Any]] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            self.offsets[name] = numpy_view(column.offsets)
            if pa.types.is_boolean(column.values.type):
                self._bits = np.frombuffer(column.values.buffers()[1], dtype=np.uint8)
            else:
                self.values[name] = numpy_view(column.values)

    def row(self, name: str, row: int) -> NDArray[Any]:
        offsets = self.offsets[name]
        return self.values[name][offsets[row] : offsets[row + 1]]

    def mask(self, row: int) -> NDArray[np.bool_]:
        start, end = (
            int(self.offsets["completion_mask"][row]),
            int(self.offsets["completion_mask"][row + 1]),
        )
        first = start // 8
        bits = np.unpackbits(self._bits[first : (end + 7) // 8], bitorder="little")
        return bits[start - 8 * first : end - 8 * first].view(np.bool_)


def map_shard(path: Path, info: ShardInfo, max_length: int, *, verify: bool) -> pa.RecordBatch:
    """Map a shard and return its one record batch.

    Its columns have the types of a shard, and their offsets fit each other, so that rows can be
    read without looking at them again.

    Args:
        path: the file.
        info: what the manifest says of it.
        max_length: tokens of a pack at most; the type of position ids depends on it.
        verify: compare the digest of the file too.

    Raises:
        ShardError: the file is missing, of another size, unlike its digest, or not a shard.
    """
    # A file that is shorter than its map kills the process that reads it, so its size is looked at
    # first.
    _check_size(path, info)
    try:
        source = pa.memory_map(str(path))
        if verify and xxhash.xxh3_128_hexdigest(source.read_buffer()) != info.xxh3:
            raise ShardError(
                f"{path} is damaged: its content is not what was written", remedy=_BUILD_AGAIN
            )
        reader = pa.ipc.open_file(source)
        if reader.num_record_batches != 1:
            raise ShardError(
                f"{path} holds {reader.num_record_batches} record batches, not 1",
                remedy=_BUILD_AGAIN,
            )
        names = reader.schema.names
        wanted = shard_schema(
            max_length,
            position_ids="position_ids" in names,
            loss_weights="loss_weights" in names,
        )
        if not reader.schema.equals(wanted):
            raise ShardError(
                f"{path}: its columns are {names}, of other types than a shard has",
                remedy=_BUILD_AGAIN,
            )
        batch = reader.get_batch(0)
        batch.validate(full=True)
        problem = next(_layout_problems(batch, info), None)
    except (pa.ArrowException, OSError, ValueError) as error:
        # Arrow raises ValueError too, for a name that is not UTF-8.
        raise ShardError(f"{path} is damaged: {error}", remedy=_BUILD_AGAIN) from error
    if problem:
        raise ShardError(f"{path}: {problem}", remedy=_BUILD_AGAIN)
    return batch


def _layout_problems(batch: pa.RecordBatch, info: ShardInfo) -> Iterator[str]:
    """Yield what is wrong with the offsets and lengths of a shard; each check relies on those
    before it."""
    if batch.num_rows != info.rows:
        yield f"it has {batch.num_rows} rows, and the manifest says {info.rows}"
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for name, column in columns.items():
        if column.null_count or column.values.null_count:
            yield f"{name} holds null"
        offsets = numpy_view(column.offsets)
        if offsets[0] != 0 or offsets[-1] != len(column.values):
            yield f"the rows of {name} do not hold all of its values"
    token_offsets = numpy_view(columns["input_ids"].offsets)
    pack_offsets = numpy_view(columns["seq_lengths"].offsets)
    for name, column in columns.items():
        same_as = "seq_lengths" if name in ("seq_lengths", "origin") else "input_ids"
        if not np.array_equal(numpy_view(column.offsets), numpy_view(columns[same_as].offsets)):
            yield f"{name} and {same_as} have other lengths"
    seq_lengths = numpy_view(columns["seq_lengths"].values)
    for at in np.flatnonzero(seq_lengths < 1):
        row = int(np.searchsorted(pack_offsets, at, side="right")) - 1
        yield f"row {row}: a sequence of {seq_lengths[at]} tokens"
    ends = np.concatenate(([0], np.cumsum(seq_lengths, dtype=np.int64)))
    for at in np.flatnonzero(ends[pack_offsets] != token_offsets):
        yield f"row {at - 1}: its seq_lengths do not sum to its length"
    ids = numpy_view(columns["input_ids"].values)
    for at in np.flatnonzero(ids < 0):
        row = int(np.searchsorted(token_offsets, at, side="right")) - 1
        yield f"row {row}: the token id {ids[at]}"


def _check_size(path: Path, info: ShardInfo) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise ShardError(f"{path} is missing", remedy=_BUILD_AGAIN) from error
    if not stat.S_ISREG(status.st_mode):
        # Opening a pipe would wait for who writes to it.
        raise ShardError(f"{path} is not a regular file", remedy=_BUILD_AGAIN)
    size = status.st_size
    if size != info.bytes:
        raise ShardError(
            f"{path} has {size} bytes, not the {info.bytes} that were written", remedy=_BUILD_AGAIN
        )


def _reopen(root: str, manifest: Manifest, verify: bool) -> Shards:
    return Shards(Path(root), manifest, verify=verify)


_BUILD_AGAIN = (
    "copy the folder again, or build it again with --overwrite; `sftprep verify DIR` checks every"
    " shard"
)

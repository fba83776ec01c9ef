"""Reading of builds: memory-mapped, in any order, with columns as NumPy views."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sftprep.errors import ManifestError, ShardError, setting
from sftprep.shards.layout import MANIFEST_NAME, SHARD_FOLDER
from sftprep.shards.manifest import Manifest, ShardInfo, read_manifest
from sftprep.shards.schema import numpy_view, position_dtype, shard_schema
from sftprep.shards.writer import make_position_ids

# The second remedy is shown only by front ends that can replace a build.
_BUILD_AGAIN = (
    "copy the folder again (`sftprep verify DIR` checks every shard)",
    f"build it again with {setting('overwrite', True)}",
)

_MOST_MAPPED = 256
"""The most shards that stay mapped. Each shard is one map, of which Linux allows a process 65,530.
A pack keeps the map of its own shard."""


@dataclass(frozen=True, slots=True)
class Pack:
    """One row of a shard: several sequences, one after the other.

    In a pack of `open_shards`, all arrays are read-only views of the memory-mapped file, except for
    `completion_mask`, which is stored as bits, and for position ids that are not stored.

    Example:
        A pack of the sequences [5, 6] and [7]:
        input_ids = [5, 6, 7], position_ids = [0, 1, 0], seq_lengths = [2, 1]
    """

    input_ids: NDArray[np.int32]  # [T], the tokens of all sequences
    position_ids: NDArray[Any]  # uint16 or int32 [T], restarts at 0 with each sequence
    completion_mask: NDArray[np.bool_]  # [T], True = trained
    seq_lengths: NDArray[np.int32]  # [S], sums to T
    origin: NDArray[np.int64]  # [S], slice and line of the record; see `Manifest.locate`
    # [T], weight of each token in the loss, 0 = not trained; None if every trained one weighs 1
    loss_weights: NDArray[np.float32] | None = None
    flags: NDArray[np.uint8] | None = None  # [S], see `schema.py`; None if all are 0


def open_shards(folder: str | os.PathLike[str], *, verify: bool = True) -> Shards:
    """Open a finished build for reading.

    Args:
        folder: The output folder of the build.
        verify: Whether to check the digest of each shard when it is first accessed (about 20 GB/s),
            so that damage is an error and never wrong tokens.

    Raises:
        ManifestError: The folder is not a finished build.
        ShardError: A shard is missing or has another size.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    if (listed_rows := sum(info.rows for info in manifest.shards)) != manifest.rows:
        raise ManifestError(
            f"{root / MANIFEST_NAME} is damaged: rows is {manifest.rows}, and the shards that it"
            f" lists have {listed_rows}",
            remedy=_BUILD_AGAIN,
        )
    for info in manifest.shards:
        _check_size(root / SHARD_FOLDER / info.name, info)
    return Shards(root, manifest, verify=verify)


class Shards:
    """A build as a sequence of packs: `len(shards)`, `shards[i]`, iteration.

    An object is cheap to create, and can be pickled for another process, which opens the files
    itself.
    """

    def __init__(self, root: Path, manifest: Manifest, *, verify: bool) -> None:
        self.root, self.manifest, self.verify = root, manifest, verify
        # Index of the first pack after each shard.
        self._ends = np.cumsum([info.rows for info in manifest.shards], dtype=np.int64)
        self._mapped: OrderedDict[int, _Columns] = OrderedDict()  # by number, the last used last
        self._checked: dict[int, _Identity] = {}  # the files whose content was checked

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: int) -> Pack:
        columns, row = self._find(index)
        seq_lengths = columns.row("seq_lengths", row)
        position_ids = (
            columns.row("position_ids", row)
            if "position_ids" in columns.values
            else make_position_ids(seq_lengths, position_dtype(self.manifest.max_length))
        )
        weights = columns.row("loss_weights", row) if "loss_weights" in columns.values else None
        return Pack(
            columns.row("input_ids", row),
            position_ids,
            columns.mask(row),
            seq_lengths,
            columns.row("origin", row),
            weights,
            columns.row("flags", row) if "flags" in columns.values else None,
        )

    def __iter__(self) -> Iterator[Pack]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (str(self.root), self.manifest, self.verify))

    def seq_lengths(self, index: int) -> NDArray[np.int32]:
        """Return the lengths of the sequences in a pack, without reading its tokens.

        Args:
            index: The index of the pack.

        Returns:
            int32 [S], a view of the file.
        """
        columns, row = self._find(index)
        return columns.row("seq_lengths", row)

    def locate(self, index: int, sequence: int) -> tuple[str, int]:
        """Return the file and the 1-based line of the record of a sequence.

        Args:
            index: The index of the pack.
            sequence: The index of the sequence in the pack.
        """
        columns, row = self._find(index)
        return self.manifest.locate(int(columns.row("origin", row)[sequence]))

    def _find(self, index: int) -> tuple[_Columns, int]:
        """Open the shard of a pack, and return it with the row of the pack."""
        pack = index + len(self) if index < 0 else index
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, pack, side="right"))
        if shard in self._mapped:
            self._mapped.move_to_end(shard)
        else:
            self._mapped[shard] = self._map(shard)
            if len(self._mapped) > _MOST_MAPPED:
                self._mapped.popitem(last=False)
        first = int(self._ends[shard] - self.manifest.shards[shard].rows)
        return self._mapped[shard], pack - first

    def _map(self, shard: int) -> _Columns:
        """Map a shard, and check its content unless this object has done so before."""
        info = self.manifest.shards[shard]
        path = self.root / SHARD_FOLDER / info.name
        identity = _check_size(path, info)
        is_checked = self._checked.get(shard) == identity
        batch = map_shard(
            path, info, self.manifest.max_length, verify=self.verify, is_checked=is_checked
        )
        self._checked[shard] = identity
        return _Columns(batch)


class _Columns:
    """The columns of one shard, as views of its memory map."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.offsets: dict[str, NDArray[np.int32]] = {}  # [rows + 1], by name of the column
        self.values: dict[str, NDArray[Any]] = {}  # of all rows; without the mask
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            self.offsets[name] = numpy_view(column.offsets)
            if pa.types.is_boolean(column.values.type):
                # The mask stays packed: unpacking all of it would take 8 times the memory.
                self._bits = np.frombuffer(column.values.buffers()[1], dtype=np.uint8)
            else:
                self.values[name] = numpy_view(column.values)

    def row(self, name: str, row: int) -> NDArray[Any]:
        """Return the values of a column in one row, a view."""
        offsets = self.offsets[name]
        return self.values[name][offsets[row] : offsets[row + 1]]

    def mask(self, row: int) -> NDArray[np.bool_]:
        """Return the completion mask of one row, bool [T], unpacked from bits."""
        start, end = (
            int(self.offsets["completion_mask"][row]),
            int(self.offsets["completion_mask"][row + 1]),
        )
        first_byte = start // 8
        bits = np.unpackbits(self._bits[first_byte : (end + 7) // 8], bitorder="little")
        return bits[start - 8 * first_byte : end - 8 * first_byte].view(np.bool_)


def map_shard(
    path: Path, info: ShardInfo, max_length: int, *, verify: bool, is_checked: bool = False
) -> pa.RecordBatch:
    """Map a shard into memory and return its record batch.

    The schema is that of a shard, and the offsets of its columns are consistent, so rows can be
    read without further checks.

    Args:
        path: The file.
        info: Its entry in the manifest.
        max_length: Tokens per pack at most, which determines the type of position ids.
        verify: Whether to check the digest of the file too.
        is_checked: Whether an earlier call checked the content of the same, unchanged file.

    Raises:
        ShardError: The file is missing, has another size or digest, or is not a shard.
    """
    # The size is checked first: a file that is shorter than its map would kill the process with
    # SIGBUS when the missing part is read.
    _check_size(path, info)
    try:
        source = pa.memory_map(str(path))
        if (
            verify
            and not is_checked
            and xxhash.xxh3_128_hexdigest(source.read_buffer()) != info.xxh3
        ):
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
        expected = shard_schema(
            max_length,
            position_ids="position_ids" in names,
            loss_weights="loss_weights" in names,
            flags="flags" in names,
        )
        if not reader.schema.equals(expected):
            raise ShardError(
                f"{path}: its columns are {names}, of other types than those of a shard",
                remedy=_BUILD_AGAIN,
            )
        batch = reader.get_batch(0)
        if is_checked:
            return batch
        batch.validate(full=True)
        problem = next(_find_layout_problems(batch, info), None)
    except (pa.ArrowException, OSError, ValueError) as error:
        # Arrow raises ValueError too, for example for a name that is not UTF-8.
        raise ShardError(f"{path} is damaged: {error}", remedy=_BUILD_AGAIN) from error
    if problem:
        raise ShardError(f"{path}: {problem}", remedy=_BUILD_AGAIN)
    return batch


def _find_layout_problems(batch: pa.RecordBatch, info: ShardInfo) -> Iterator[str]:
    """Yield the problems with offsets, lengths and ids.

    Each check relies on the ones before it.
    """
    # Rows, and the values that they cover.
    if batch.num_rows != info.rows:
        yield f"it has {batch.num_rows} rows, and the manifest says {info.rows}"
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
        row = int(np.searchsorted(pack_offsets, index, side="right")) - 1
        yield f"row {row}: a sequence of {seq_lengths[index]} tokens"
    ends = np.concatenate(([0], np.cumsum(seq_lengths, dtype=np.int64)))
    for index in np.flatnonzero(ends[pack_offsets] != token_offsets):
        yield f"row {index - 1}: its seq_lengths do not sum to its length"

    # A negative id would index an embedding from its end, without an error.
    ids = numpy_view(columns["input_ids"].values)
    for index in np.flatnonzero(ids < 0):
        row = int(np.searchsorted(token_offsets, index, side="right")) - 1
        yield f"row {row}: the token id {ids[index]}"


_Identity = tuple[int, int, int, int, int]
"""Changes whenever a file is replaced or written: device, inode, size, and times in nanoseconds."""


def _check_size(path: Path, info: ShardInfo) -> _Identity:
    """Check that a shard is a regular file of the size that was written, and identify the file."""
    try:
        status = path.stat()
    except OSError as error:
        raise ShardError(f"{path} is missing", remedy=_BUILD_AGAIN) from error
    if not stat.S_ISREG(status.st_mode):
        # Opening a pipe would block until another process writes to it.
        raise ShardError(f"{path} is not a regular file", remedy=_BUILD_AGAIN)
    size = status.st_size
    if size != info.bytes:
        raise ShardError(
            f"{path} has {size} bytes, not the {info.bytes} that were written", remedy=_BUILD_AGAIN
        )
    return status.st_dev, status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns


def _reopen(root: str, manifest: Manifest, verify: bool) -> Shards:
    return Shards(Path(root), manifest, verify=verify)

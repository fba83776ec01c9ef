"""Spills: the results of pass 1, one file for each partition.

The name of the file is a digest of the recipe, the format and the bytes of the partition. If a
file of that name exists and its content is complete, the work is done. This provides the cache,
resume, and exactly-once processing. A spill is not synced to the disk: a file that a crash left
incomplete is detected by its digest, and made again.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sftprep.core.atomic_write import storage_errors, temporary_path
from sftprep.core.types import Rejected, TokenBatch
from sftprep.shards.schema import arrow_array


@dataclass(frozen=True, slots=True)
class Spill:
    """A memory-mapped spill: the flat buffers of a TokenBatch with n sequences.

    Attributes:
        input_ids: int32 [tokens].
        offsets: int32 [n + 1]; sequence k is input_ids[offsets[k]:offsets[k + 1]].
        line_of: int64 [n]; the line of each sequence's record within its partition.
        facts: JSON with the counts, the first lines of warnings, the rejected records, and the
            columns that are not read.
        completion_mask: uint8 [tokens], 1 = trained; None if every token is trained.
        loss_weights: float32 [tokens]; None if every trained token has the weight 1.
        record: int64 [n]; as in TokenBatch.
        exact_hashes: uint64 [n]; as in TokenBatch.
        near_hashes: uint64 [n]; as in TokenBatch.
        flags: uint8 [n]; as in TokenBatch.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    line_of: NDArray[np.int64]
    facts: bytes
    completion_mask: NDArray[np.uint8] | None = None
    loss_weights: NDArray[np.float32] | None = None
    record: NDArray[np.int64] | None = None
    exact_hashes: NDArray[np.uint64] | None = None
    near_hashes: NDArray[np.uint64] | None = None
    flags: NDArray[np.uint8] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """The counts of the partition, by name."""
        counts: dict[str, int] = orjson.loads(self.facts)["counts"]
        return counts

    @property
    def rejected(self) -> list[Rejected]:
        """The rejected records, in the order of their lines."""
        return [Rejected(*values) for values in orjson.loads(self.facts)["rejected"]]

    @property
    def first_lines(self) -> dict[str, int]:
        """The line of the first record for each count, by its name."""
        first_lines: dict[str, int] = orjson.loads(self.facts).get("first_lines", {})
        return first_lines

    @property
    def unread_columns(self) -> list[str]:
        """The columns with content that the format does not read."""
        columns: list[str] = orjson.loads(self.facts).get("unread_columns", [])
        return columns

    @property
    def lengths(self) -> NDArray[np.int32]:
        """The number of tokens in each sequence: int32 [sequences]."""
        return np.diff(self.offsets)


def spill_path(folder: Path, key: str) -> Path:
    """Return the path of the spill with this key."""
    return folder / f"{key}.arrow"


class SpillOrigin(NamedTuple):
    """What a spill was made of.

    Attributes:
        recipe_key: The key of the recipe.
        bytes: The size of the lines of the partition.
    """

    recipe_key: str
    bytes: int


def write_spill(path: Path, batch: TokenBatch, origin: SpillOrigin | None = None) -> None:
    """Write a spill atomically.

    Args:
        path: The file.
        batch: The sequences.
        origin: What they were made of, for `read_origin`.

    Raises:
        StorageError: The file cannot be written.
    """
    content = {"counts": batch.counts, "rejected": [*map(dataclasses.astuple, batch.rejected)]}
    optional = {"first_lines": batch.first_lines, "unread_columns": batch.unread_columns}
    facts = orjson.dumps(content | {name: value for name, value in optional.items() if value})
    assert batch.offsets[-1] < 2**31, "a partition has more tokens than the offsets can count"
    # Columns that hold only the default are not written.
    offsets = batch.offsets.astype(np.int32)
    flat: dict[str, NDArray[Any]] = {"input_ids": batch.input_ids}
    if not batch.completion_mask.all():
        flat["completion_mask"] = batch.completion_mask.view(np.uint8)
    if batch.loss_weights is not None:
        flat["loss_weights"] = batch.loss_weights
    lists = {
        name: pa.ListArray.from_arrays(arrow_array(offsets), arrow_array(values))
        for name, values in flat.items()
    }
    per_sequence = {column: getattr(batch, field) for column, field in _PER_SEQUENCE.items()}
    per_sequence = {name: values for name, values in per_sequence.items() if values is not None}
    arrays = lists | {name: arrow_array(values) for name, values in per_sequence.items()}
    buffers = [*flat.values(), offsets, *per_sequence.values()]
    schema = pa.schema(
        [(name, column.type) for name, column in arrays.items()],
        metadata={
            b"facts": facts,
            b"digest": _digest(facts, buffers).encode(),
            b"origin": orjson.dumps(list(origin or ())),
        },
    )
    columns = [*arrays.values()]
    with storage_errors(path), temporary_path(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        os.replace(temporary, path)


def read_origin(path: Path) -> SpillOrigin | None:
    """Return what a spill was made of; None if it is not known, or the file is incomplete."""
    try:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_file(file).schema.metadata
        return SpillOrigin(*orjson.loads(metadata[b"origin"]))
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None


def read_spill(path: Path) -> Spill | None:
    """Map a spill and verify its digest; None if the file is missing or incomplete."""
    try:
        spill = map_spill(path)
        expected = _cached_layout(path).digest
    except Exception:  # a damaged file makes Arrow, and the code below, fail in a dozen ways
        return None
    flat = [spill.input_ids, spill.completion_mask, spill.loss_weights, spill.offsets]
    flat += [getattr(spill, field) for field in _PER_SEQUENCE.values()]
    found = _digest(spill.facts, [values for values in flat if values is not None])
    return spill if found.encode() == expected else None


def map_spill(path: Path) -> Spill:
    """Map a spill written or verified by this build."""
    layout = _cached_layout(path)
    with open(path, "rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    arrays = {
        _PER_SEQUENCE.get(name, name): data[first:last].view(dtype)
        for name, (first, last, dtype) in layout.buffers.items()
    }
    return Spill(facts=layout.facts, **arrays)


_TYPES: dict[str, np.dtype[Any]] = {
    "input_ids": np.dtype(np.int32),
    "completion_mask": np.dtype(np.uint8),
    "loss_weights": np.dtype(np.float32),
    "offsets": np.dtype(np.int32),
    "origin": np.dtype(np.int64),
    "record": np.dtype(np.int64),
    "same": np.dtype(np.uint64),
    "alike": np.dtype(np.uint64),
    "flags": np.dtype(np.uint8),
}
_PER_SEQUENCE = {
    "origin": "line_of",
    "record": "record",
    "same": "exact_hashes",
    "alike": "near_hashes",
    "flags": "flags",
}
"""The columns with one value per sequence, with their fields; the others have one per token."""


class _Layout(NamedTuple):
    """The positions of the buffers in a file, and its metadata."""

    buffers: dict[str, tuple[int, int, np.dtype[Any]]]  # first byte, last + 1, type of the values
    facts: bytes
    digest: bytes


def _cached_layout(path: Path) -> _Layout:
    stat = path.stat()
    return _read_layout(path, stat.st_size, stat.st_mtime_ns)


# Each shard maps each spill, and reading the footer again takes ten times as long as mapping the
# file.
@lru_cache(maxsize=100_000)
def _read_layout(path: Path, size: int, time: int) -> _Layout:
    """Read the layout of a file.

    Args:
        path: The file.
        size: Its size, as a key of the cache.
        time: Its modification time, as a key of the cache.
    """
    file = pa.memory_map(str(path)).read_buffer()
    batch = pa.ipc.open_file(file).get_batch(0)
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    arrays = {
        name: column if name in _PER_SEQUENCE else column.values for name, column in columns.items()
    }
    arrays["offsets"] = columns["input_ids"].offsets
    buffers = {}
    for name, array in arrays.items():
        first = array.buffers()[1].address - file.address if len(array) else 0
        # The digest covers the values, not their types, so the types in the file are not trusted.
        dtype = _TYPES[name]
        buffers[name] = (first, first + len(array) * dtype.itemsize, dtype)
    metadata = batch.schema.metadata or {}
    return _Layout(buffers, metadata.get(b"facts", b"{}"), metadata.get(b"digest", b""))


def _digest(facts: bytes, buffers: list[NDArray[Any]]) -> str:
    state = xxhash.xxh3_128(facts)
    for buffer in buffers:
        state.update(np.ascontiguousarray(buffer).view(np.uint8).data if len(buffer) else b"")
    return state.hexdigest()

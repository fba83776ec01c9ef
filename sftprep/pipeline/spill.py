"""Spills: what pass 1 made of one partition, in a file named by what it was made from.

If the name is there and its content is whole, the work is done: that is the cache, the resume and
the exactly-once. A spill is not synced to the disk; a torn one is noticed by its digest and made
again.
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
    """A spill, mapped: the flat buffers of a TokenBatch. facts: JSON of what was counted;
    completion_mask: uint8, 1 = trained, None where every token is; loss_weights: None where every
    trained token weighs 1."""

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    origin: NDArray[np.int64]
    facts: bytes
    completion_mask: NDArray[np.uint8] | None = None
    loss_weights: NDArray[np.float32] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """What was counted."""
        counts: dict[str, int] = orjson.loads(self.facts)["counts"]
        return counts

    @property
    def rejected(self) -> list[Rejected]:
        """The records that were set aside, in the order of their lines."""
        return [Rejected(*values) for values in orjson.loads(self.facts)["rejected"]]

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens in each sequence: int32 [n]."""
        return np.diff(self.offsets)


def spill_path(folder: Path, key: str) -> Path:
    """Where the spill with this key is, or will be."""
    return folder / f"{key}.arrow"


def write_spill(path: Path, batch: TokenBatch) -> None:
    """Write a spill, whole or not at all. Raises StorageError."""
    facts = orjson.dumps(
        {"counts": batch.counts, "rejected": [dataclasses.astuple(r) for r in batch.rejected]}
    )
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
    schema = pa.schema(
        [*((name, column.type) for name, column in lists.items()), ("origin", pa.int64())],
        metadata={
            b"facts": facts,
            b"digest": _digest(facts, [*flat.values(), offsets, batch.origin]).encode(),
        },
    )
    with storage_errors(path), temporary_path(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(
                pa.RecordBatch.from_arrays(
                    [*lists.values(), arrow_array(batch.origin)], schema=schema
                )
            )
        os.replace(temporary, path)


def read_spill(path: Path) -> Spill | None:
    """Map a spill and check it; None where there is none, or where it is not whole."""
    try:
        spill = map_spill(path)
        written = _layout_of(path).digest
    except (
        Exception
    ):  # of a damaged file, Arrow and what looks at its schema say it in a dozen ways
        return None
    flat = (spill.input_ids, spill.completion_mask, spill.loss_weights, spill.offsets, spill.origin)
    return (
        spill
        if _digest(spill.facts, [each for each in flat if each is not None]).encode() == written
        else None
    )


def map_spill(path: Path) -> Spill:
    """Map a spill that this build has written or checked already."""
    layout = _layout_of(path)
    with open(path, "rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    arrays = {
        name: data[first:last].view(dtype) for name, (first, last, dtype) in layout.places.items()
    }
    return Spill(facts=layout.facts, **arrays)


_TYPES: dict[str, np.dtype[Any]] = {
    "input_ids": np.dtype(np.int32),
    "completion_mask": np.dtype(np.uint8),
    "loss_weights": np.dtype(np.float32),
    "offsets": np.dtype(np.int32),
    "origin": np.dtype(np.int64),
}


class _Layout(NamedTuple):
    """Where the buffers of a file are: first byte, last + 1, and type of the values."""

    places: dict[str, tuple[int, int, np.dtype[Any]]]
    facts: bytes
    digest: bytes


def _layout_of(path: Path) -> _Layout:
    stat = path.stat()
    return _layout(path, stat.st_size, stat.st_mtime_ns)


# Each shard maps each spill, and reading the same footer again takes ten times as long as mapping
# the file.
@lru_cache(maxsize=100_000)
def _layout(path: Path, size: int, time: int) -> _Layout:
    """size, time: of the file when it was looked at."""
    file = pa.memory_map(str(path)).read_buffer()
    batch = pa.ipc.open_file(file).get_batch(0)
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    arrays = {name: columns[name].values for name in columns if name != "origin"}
    arrays.update(offsets=columns["input_ids"].offsets, origin=columns["origin"])
    places = {}
    for name, array in arrays.items():
        first = array.buffers()[1].address - file.address if len(array) else 0
        # The digest is of the values, not of the types that a schema says they are of.
        dtype = _TYPES[name]
        places[name] = (first, first + len(array) * dtype.itemsize, dtype)
    metadata = batch.schema.metadata or {}
    return _Layout(places, metadata.get(b"facts", b"{}"), metadata.get(b"digest", b""))


def _digest(facts: bytes, buffers: list[NDArray[Any]]) -> str:
    state = xxhash.xxh3_128(facts)
    for buffer in buffers:
        state.update(np.ascontiguousarray(buffer).view(np.uint8).data if len(buffer) else b"")
    return state.hexdigest()

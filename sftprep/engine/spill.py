"""Spills: what pass 1 made of one partition, in a file named by what it was made from.

If the name is there and its content is whole, the work is done: that is the cache, the resume and the exactly-once.
A spill is not synced to the disk; a torn one is noticed by its digest and made again.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sftprep.batch import Rejected, TokenBatch
from sftprep.shards.files import storage_errors
from sftprep.shards.schema import arrow_array, numpy_view


@dataclass(frozen=True, slots=True)
class Spill:
    """A spill, mapped: the flat buffers of a TokenBatch. completion_mask: uint8, 1 = trained; facts: JSON of what was counted;
    loss_weights: None where every trained token weighs 1."""

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    completion_mask: NDArray[np.uint8]
    origin: NDArray[np.int64]
    facts: bytes
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
    facts = orjson.dumps({"counts": batch.counts, "rejected": [dataclasses.astuple(r) for r in batch.rejected]})
    offsets = batch.offsets.astype(np.int32)
    buffers: list[NDArray[Any]] = [batch.input_ids, offsets, batch.completion_mask.view(np.uint8), batch.origin]
    flat = {"input_ids": buffers[0], "completion_mask": buffers[2]}
    if batch.loss_weights is not None:
        flat["loss_weights"] = batch.loss_weights
        buffers.append(batch.loss_weights)
    lists = {name: pa.ListArray.from_arrays(arrow_array(offsets), arrow_array(values)) for name, values in flat.items()}
    schema = pa.schema(
        [*((name, column.type) for name, column in lists.items()), ("origin", pa.int64())],
        metadata={b"facts": facts, b"digest": _digest(facts, buffers).encode()},
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(pa.RecordBatch.from_arrays([*lists.values(), arrow_array(batch.origin)], schema=schema))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_spill(path: Path) -> Spill | None:
    """Map a spill and check it; None where there is none, or where it is not whole."""
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (OSError, pa.ArrowInvalid):
        return None
    spill = _view(batch)
    buffers: list[NDArray[Any]] = [spill.input_ids, spill.offsets, spill.completion_mask, spill.origin]
    if spill.loss_weights is not None:
        buffers.append(spill.loss_weights)
    written = (batch.schema.metadata or {}).get(b"digest", b"")
    return spill if _digest(spill.facts, buffers).encode() == written else None


def map_spill(path: Path) -> Spill:
    """Map a spill that this build has written or checked already."""
    return _view(pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0))


def _view(batch: pa.RecordBatch) -> Spill:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    ids, mask, weights = columns["input_ids"], columns["completion_mask"], columns.get("loss_weights")
    return Spill(
        input_ids=numpy_view(ids.values),
        offsets=numpy_view(ids.offsets),
        completion_mask=numpy_view(mask.values),
        origin=numpy_view(columns["origin"]),
        facts=(batch.schema.metadata or {}).get(b"facts", b"{}"),
        loss_weights=None if weights is None else numpy_view(weights.values),
    )


def _digest(facts: bytes, buffers: list[NDArray[Any]]) -> str:
    state = xxhash.xxh3_128(facts)
    for buffer in buffers:
        state.update(np.ascontiguousarray(buffer).view(np.uint8).data if len(buffer) else b"")
    return state.hexdigest()

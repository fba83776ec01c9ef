"""The schema of a shard: its columns, their types, and `datasets` metadata.

| column | type | content |
|---|---|---|
| input_ids | list<int32> | tokens of the pack |
| position_ids | list<uint16>, int32 above 65,535 | 0 .. len-1 of each sequence; optional |
| completion_mask | list<bool> | True = trained |
| seq_lengths | list<int32> | length of each sequence in the pack |
| origin | list<int64> | slice and line of the record of each sequence; see `Manifest.locate` |
| loss_weights | list<float32> | weight in the loss, 0 = not trained; absent if all weights are 1 |
| flags | list<uint8> | of each sequence: see `core.types.Flag`; absent before version 2.0 |
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

# The folder of the group, since version 2.0, and the file.
SHARD_PATTERN = r"([0-9a-f]{16}/)?shard-\d{5,}-[0-9a-f]{16}\.arrow"
SHARD_NAME = re.compile(SHARD_PATTERN)
"""Names that a manifest may list, for `fullmatch`: none of them leads out of the folder."""

ORIGIN_BITS = 44
"""An origin is `slice << ORIGIN_BITS | line`: a slice is a partition of an input, and its lines are
numbered from 0. So the lines of a slice do not depend on those before it."""

BLOCK_PACKS = 64
"""The number of packs in a block, which is a record batch with a digest of its own."""

LARGEST_UINT16_LENGTH = 65_535


def position_dtype(max_length: int) -> DTypeLike:
    """Return the NumPy type of stored position ids."""
    return np.uint16 if max_length <= LARGEST_UINT16_LENGTH else np.int32


def arrow_array(values: NDArray[Any]) -> pa.Array:
    """Return NumPy integers, floats or booleans as an Arrow array.

    Only booleans are copied. `pa.array` does the same, but tries to import pandas first, which
    takes longer than a small build.
    """
    if values.dtype == np.bool_:
        return pa.Array.from_buffers(
            pa.bool_(), len(values), [None, pa.py_buffer(np.packbits(values, bitorder="little"))]
        )
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype),
        len(values),
        [None, pa.py_buffer(np.ascontiguousarray(values))],
    )


def numpy_view(array: pa.Array) -> NDArray[Any]:
    """Return an Arrow array without nulls as NumPy; inverse of `arrow_array`.

    Numbers are not copied. Booleans are unpacked, since Arrow stores them as bits.
    """
    data = array.buffers()[1]
    if pa.types.is_boolean(array.type):
        bits = np.frombuffer(data or b"", dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little", count=array.offset + len(array))[
            array.offset :
        ].view(np.bool_)
    values: NDArray[Any] = np.frombuffer(data or b"", dtype=array.type.to_pandas_dtype())
    return values[array.offset : array.offset + len(array)]


def shard_schema(
    max_length: int, *, position_ids: bool, loss_weights: bool = False, flags: bool = True
) -> pa.Schema:
    """Return the Arrow schema of a shard, with `datasets` features.

    Args:
        max_length: Tokens per pack at most, which determines the type of position ids.
        position_ids: Whether the shard has the column `position_ids`.
        loss_weights: Whether the shard has the column `loss_weights`.
        flags: Whether the shard has the column `flags`.
    """
    types = {
        "input_ids": pa.int32(),
        "completion_mask": pa.bool_(),
        "seq_lengths": pa.int32(),
        "origin": pa.int64(),
    }
    if position_ids:
        types["position_ids"] = pa.from_numpy_dtype(position_dtype(max_length))
    if loss_weights:
        types["loss_weights"] = pa.float32()
    if flags:
        types["flags"] = pa.uint8()
    # The order of columns is part of the bytes of a shard, and so of its name.
    columns = (
        "input_ids",
        "position_ids",
        "completion_mask",
        "seq_lengths",
        "origin",
        "loss_weights",
        "flags",
    )
    order = [name for name in columns if name in types]
    # Arrow's name for the type is "float" where that of `datasets` is "float32".
    dtypes = {
        name: "float32" if types[name] == pa.float32() else str(types[name]) for name in order
    }
    features = {
        name: {"feature": {"dtype": dtypes[name], "_type": "Value"}, "_type": "List"}
        for name in order
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([pa.field(name, pa.list_(types[name])) for name in order], metadata=metadata)

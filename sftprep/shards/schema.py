"""What a shard holds: the columns, their types, and the metadata that `datasets` reads.

| column | type | |
|---|---|---|
| input_ids | list<int32> | tokens of the pack |
| position_ids | list<uint16>, int32 above 65,535 | 0 .. len-1 of each sequence; may be left out |
| completion_mask | list<bool> | True = trained |
| seq_lengths | list<int32> | length of each sequence in the pack |
| origin | list<int64> | ordinal of the record of each sequence; the manifest gives file and line |
| loss_weights | list<float32> | weight in the loss, 0 = not trained; only where one is not 1 |
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

SHARD_PATTERN = r"shard-\d{5,}-[0-9a-f]{16}\.arrow"
SHARD_NAME = re.compile(SHARD_PATTERN)
"""Names a manifest may list, to be matched with `fullmatch`: nothing that leads out of the
folder."""

LARGEST_UINT16_LENGTH = 65_535


def position_dtype(max_length: int) -> DTypeLike:
    """The NumPy type of stored position ids."""
    return np.uint16 if max_length <= LARGEST_UINT16_LENGTH else np.int32


def arrow_array(values: NDArray[Any]) -> pa.Array:
    """NumPy integers or booleans as an Arrow array, integers without a copy.

    `pa.array` does the same, but looks for pandas first, and importing that takes longer than a
    small build.
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
    """Arrow integers without nulls as NumPy, without a copy; booleans come unpacked. The way back
    of `arrow_array`."""
    data = array.buffers()[1]
    if pa.types.is_boolean(array.type):
        bits = np.frombuffer(data or b"", dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little", count=array.offset + len(array))[
            array.offset :
        ].view(np.bool_)
    values: NDArray[Any] = np.frombuffer(data or b"", dtype=array.type.to_pandas_dtype())
    return values[array.offset : array.offset + len(array)]


def shard_schema(max_length: int, *, position_ids: bool, loss_weights: bool = False) -> pa.Schema:
    """The Arrow schema of a shard, with the feature description that `datasets` looks for."""
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
    columns = (
        "input_ids",
        "position_ids",
        "completion_mask",
        "seq_lengths",
        "origin",
        "loss_weights",
    )
    order = [name for name in columns if name in types]
    # Arrow says "float" where `datasets` says "float32".
    dtypes = {
        name: "float32" if types[name] == pa.float32() else str(types[name]) for name in order
    }
    features = {
        name: {"feature": {"dtype": dtypes[name], "_type": "Value"}, "_type": "List"}
        for name in order
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([pa.field(name, pa.list_(types[name])) for name in order], metadata=metadata)

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
from collections.abc import Mapping
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


def shard_columns(
    max_length: int, *, position_ids: bool, loss_weights: bool = False, flags: bool = True
) -> dict[str, str]:
    """Return the columns of a shard, in order, and their types, see `schema_of`.

    Args:
        max_length: Tokens per pack at most, which determines the type of position ids.
        position_ids: Whether the shard has the column `position_ids`.
        loss_weights: Whether the shard has the column `loss_weights`.
        flags: Whether the shard has the column `flags`.
    """
    # The order of columns is part of the bytes of a shard, and so of its name.
    columns = {
        "input_ids": "list<int32>",
        "position_ids": f"list<{np.dtype(position_dtype(max_length))}>" if position_ids else "",
        "completion_mask": "list<bool>",
        "seq_lengths": "list<int32>",
        "origin": "list<int64>",
        "loss_weights": "list<float32>" if loss_weights else "",
        "flags": "list<uint8>" if flags else "",
    }
    return {name: kind for name, kind in columns.items() if kind}


def shard_schema(
    max_length: int, *, position_ids: bool, loss_weights: bool = False, flags: bool = True
) -> pa.Schema:
    """Return the Arrow schema of a shard, with `datasets` features.

    Args:
        max_length: As for `shard_columns`.
        position_ids: As for `shard_columns`.
        loss_weights: As for `shard_columns`.
        flags: As for `shard_columns`.
    """
    return schema_of(
        shard_columns(max_length, position_ids=position_ids, loss_weights=loss_weights, flags=flags)
    )


def schema_of(columns: Mapping[str, str]) -> pa.Schema:
    """Return an Arrow schema with `datasets` features.

    Args:
        columns: The columns and their types: list<int32>, or int32 without a list. The names of
            the types are those of `datasets`; Arrow accepts them too.
    """
    features: dict[str, Any] = {}
    fields = []
    for name, kind in columns.items():
        dtype, is_list = split_type(kind)
        value = {"dtype": dtype, "_type": "Value"}
        features[name] = {"feature": value, "_type": "List"} if is_list else value
        stored = pa.type_for_alias(dtype)
        fields.append(pa.field(name, pa.list_(stored) if is_list else stored))
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(fields, metadata=metadata)


def split_type(kind: str) -> tuple[str, bool]:
    """Return the type of the values of a column, and whether they are in lists.

    Example:
        "list<int32>"  ->  ("int32", True)
    """
    dtype = kind.removeprefix("list<").removesuffix(">")
    return dtype, dtype != kind

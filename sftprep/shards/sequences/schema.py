"""The schema of a shard of layout `sequences`, and its division into blocks.

| column | type | content |
|---|---|---|
| input_ids | list<int32> | tokens of the sequence, uncut |
| completion_mask | list<bool> | True = trained |
| origin | int64 | slice and line of its record; see `Manifest.locate` |
| loss_weights | list<float32> | weight in the loss, 0 = not trained; absent if all weights are 1 |
| flags | uint8 | see `core.types.Flag` |
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftprep.shards.schema import schema_of

BLOCK_TOKENS = 1 << 18
"""The tokens of a block, about: those of a block of 64 packs of 4,096 tokens."""


def sequence_columns(*, loss_weights: bool) -> dict[str, str]:
    """Return the columns of a shard, in order, and their types, see `schema_of`.

    Args:
        loss_weights: Whether the shard has the column `loss_weights`.
    """
    columns = {
        "input_ids": "list<int32>",
        "completion_mask": "list<bool>",
        "origin": "int64",
        "loss_weights": "list<float32>" if loss_weights else "",
        "flags": "uint8",
    }
    return {name: kind for name, kind in columns.items() if kind}


def sequence_schema(*, loss_weights: bool) -> pa.Schema:
    """Return the Arrow schema of a shard, with `datasets` features.

    Args:
        loss_weights: Whether the shard has the column `loss_weights`.
    """
    return schema_of(sequence_columns(loss_weights=loss_weights))


def block_offsets(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Return the first sequence of each block of a shard, and the number of sequences at the end.

    A sequence belongs to the block in whose share of `BLOCK_TOKENS` tokens it begins. So readers
    know the blocks from the lengths alone.

    Args:
        lengths: Integers [n]; the tokens of each sequence of the shard, at least 1.

    Returns:
        int64 [blocks + 1].
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    share = (ends - lengths) // BLOCK_TOKENS
    firsts = np.flatnonzero(np.diff(share, prepend=-1))
    return np.append(firsts, len(lengths)).astype(np.int64)

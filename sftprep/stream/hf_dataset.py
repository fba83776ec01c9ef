"""A stream as a `datasets.IterableDataset`, for what takes nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from sftprep.shards.reader import Pack
from sftprep.shards.schema import position_dtype


def to_hf(stream: Any, *, shards: int = 1, epochs: int | None = 1) -> Any:
    """See `PackedStream.to_hf`."""
    import datasets
    import numpy as np

    kinds = {
        "input_ids": "int32",
        "position_ids": np.dtype(position_dtype(stream.max_length)).name,
        "completion_mask": "bool",
    }
    kinds |= {"seq_lengths": "int32", "origin": "int64"}
    features = datasets.Features(
        {name: datasets.List(datasets.Value(kind)) for name, kind in kinds.items()}
    )
    parts = [stream.share(number, shards) for number in range(shards)]
    return datasets.IterableDataset.from_generator(
        _rows, features=features, gen_kwargs={"parts": parts, "epochs": epochs}
    )


def columns_of(pack: Pack) -> dict[str, Any]:
    """The columns of a pack by their names in shards, as NumPy arrays."""
    return {
        "input_ids": pack.input_ids,
        "position_ids": pack.position_ids,
        "completion_mask": pack.completion_mask,
        "seq_lengths": pack.seq_lengths,
        "origin": pack.origin,
    }


def _rows(parts: list[Any], epochs: int | None) -> Iterator[dict[str, Any]]:
    for part in parts:
        # `datasets` calls this for every iteration and expects the same rows: the stream itself is
        # left where it stands.
        own = part.share(0, 1)
        for _ in itertools.count() if epochs is None else range(epochs):
            packs = 0
            for pack in own:
                packs += 1
                yield columns_of(pack)
            if not packs:
                break  # its lanes have no record, and would have none in any pass

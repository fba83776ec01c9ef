"""A stream as a `datasets.IterableDataset`, for libraries in need of one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from sftprep.shards.reading.hf_dataset import hf_features, import_datasets
from sftprep.shards.reading.pack import Pack
from sftprep.shards.schema import shard_columns


def to_hf(stream: Any, *, shards: int = 1, epochs: int | None = 1) -> Any:
    """Return a stream as an IterableDataset; see `PackedStream.to_hf`.

    Raises:
        MissingDependency: datasets is not installed.
    """
    datasets = import_datasets()
    columns = shard_columns(stream.max_length, position_ids=True, flags=False)
    parts = [stream.share(number, shards) for number in range(shards)]
    return datasets.IterableDataset.from_generator(
        _rows, features=hf_features(columns), gen_kwargs={"parts": parts, "epochs": epochs}
    )


def columns_of(pack: Pack) -> dict[str, Any]:
    """Return the columns of a pack as NumPy arrays, by their names in shards."""
    return {
        "input_ids": pack.input_ids,
        "position_ids": pack.position_ids,
        "completion_mask": pack.completion_mask,
        "seq_lengths": pack.seq_lengths,
        "origin": pack.origin,
    }


def _rows(parts: list[Any], epochs: int | None) -> Iterator[dict[str, Any]]:
    for part in parts:
        # A copy, since `datasets` calls this function for every iteration, and expects the same
        # rows each time.
        stream = part.share(0, 1)
        for _ in itertools.count() if epochs is None else range(epochs):
            is_empty = True
            for pack in stream:
                is_empty = False
                yield columns_of(pack)
            if is_empty:
                break  # these lanes have no record in any pass, and would never end

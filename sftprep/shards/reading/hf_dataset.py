"""Packs as data sets of the library `datasets`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sftprep.errors import MissingDependency
from sftprep.shards.schema import schema_of

if TYPE_CHECKING:
    from sftprep.shards.reading.shards import Shards

_MOST_PARTS = 1024
"""The most parts among which the processes of `datasets` can divide a build."""


def to_hf(shards: Shards, *, streaming: bool, **options: Any) -> Any:
    """Return a build as a data set of `datasets`; see `Shards.to_hf`.

    Raises:
        MissingDependency: datasets is not installed.
    """
    datasets = import_datasets()
    count = min(_MOST_PARTS, max(len(shards), 1))
    bounds = [len(shards) * number // count for number in range(count + 1)]
    parts = [(shards, first, end) for first, end in itertools.pairwise(bounds)]
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(
        _rows,
        features=hf_features(shards.column_types),
        gen_kwargs={"parts": parts},
        **options,
    )


def import_datasets() -> Any:
    """Return the module `datasets`.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency("datasets", extra="train", needed_for="to_hf") from error
    return datasets


def hf_features(columns: Mapping[str, str]) -> Any:
    """Return columns and their types, as in `shard_columns`, as features of `datasets`."""
    return import_datasets().Features.from_arrow_schema(schema_of(columns))


def _rows(parts: list[tuple[Shards, int, int]]) -> Iterator[dict[str, Any]]:
    for shards, first, end in parts:
        names = [*shards.column_types]
        for pack in shards.read_in_order(range(first, end)):
            yield {name: getattr(pack, name) for name in names}

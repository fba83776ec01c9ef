"""Records that live in no file: data sets of `datasets`, tables, and whatever can be iterated, as
sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from sftprep.errors import ConfigError
from sftprep.sources.partition import PARTITION_BYTES, Source
from sftprep.sources.readers.arrow_tables import iter_table_lines
from sftprep.sources.readers.lines import grouped
from sftprep.sources.readers.to_jsonl import iter_lines

_BATCH = 1000


_grouped = partial(grouped, size=PARTITION_BYTES)


def memory_source(data: Any) -> Source:
    """Records as a source, cut into partitions by their content alone.

    data: a `datasets.Dataset` or `IterableDataset`, a `pyarrow.Table`, an iterable of mappings, or
    a function without arguments that gives one. Raises ConfigError for anything else.
    """
    reject_columns(data)
    kind = dataset_kind(data)
    if kind == "Dataset":
        return Source(_name(data, "Dataset"), blocks=lambda: _grouped(_dataset_lines(data)))
    if kind == "IterableDataset":
        return Source(
            _name(data, "IterableDataset"), blocks=_Replay(lambda: _grouped(iter_lines(data)))
        )
    if type(data).__module__.partition(".")[0] == "pyarrow" and hasattr(data, "to_batches"):
        return Source(
            "<Table>",
            blocks=lambda: _grouped(
                lines
                for batch in data.to_batches(_BATCH)
                for lines in iter_table_lines(batch, data.schema)
            ),
        )
    if callable(data):
        return Source(
            f"<{getattr(data, '__qualname__', 'function')}>",
            blocks=_Replay(lambda: _grouped(iter_lines(_called(data)))),
        )
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ConfigError(
            f"records cannot be read from a {type(data).__name__}",
            remedy="give a path, a data set of `datasets`, or an iterable of dictionaries",
        )
    if isinstance(data, Iterator):
        return Source(
            f"<{type(data).__name__}>", blocks=_Replay(lambda: _grouped(iter_lines(data)))
        )
    return Source(f"<{type(data).__name__}>", blocks=lambda: _grouped(iter_lines(data)))


def reject_columns(data: Any) -> None:
    """Raises ConfigError for data that is columns and not records: a pandas DataFrame, a dictionary
    of lists."""
    if type(data).__module__.partition(".")[0] == "pandas":
        raise ConfigError(
            f"records are given as a pandas {type(data).__name__}",
            remedy="give datasets.Dataset.from_pandas(frame)",
        )
    if isinstance(data, Mapping) and data and all(_is_column(value) for value in data.values()):
        raise ConfigError(
            f"records are given as a {type(data).__name__} of columns",
            remedy="give datasets.Dataset.from_dict(columns)",
        )


def _is_column(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return not any(isinstance(item, Mapping) for item in value[:1])
    return hasattr(value, "tolist")


def dataset_kind(data: Any) -> str | None:
    """Which class of `datasets` an object is of, without importing that library; None for other
    objects."""
    kinds = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    names = (c.__name__ for c in type(data).__mro__ if c.__module__.partition(".")[0] == "datasets")
    return next((name for name in names if name in kinds), None)


class _Replay:
    """Blocks of something that can be read once: what the first call took, the second gives again
    before it goes on."""

    def __init__(self, blocks: Callable[[], Iterator[bytes]]) -> None:
        self._make = blocks
        self._rest: Iterator[bytes] | None = None
        self._seen: list[bytes] = []

    def __call__(self) -> Iterator[bytes]:
        if self._rest is None:
            self._rest = self._make()
            return self._recorded(self._rest)
        seen, self._seen = self._seen, []
        return _chained(seen, self._rest)

    def _recorded(self, rest: Iterator[bytes]) -> Iterator[bytes]:
        for block in rest:
            self._seen.append(block)
            yield block


def _chained(seen: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    while seen:
        yield seen.pop(0)
    yield from rest


def _called(function: Callable[[], Any]) -> Iterable[Any]:
    made = function()
    if isinstance(made, Mapping) or not isinstance(made, Iterable):
        raise ConfigError(
            f"the function gave a {type(made).__name__}, not records",
            remedy="write a generator function that yields dictionaries",
        )
    return made


def _dataset_lines(data: Any) -> Iterator[bytes]:
    shape = data.format
    if shape["type"] == "custom":  # a transform of the user's: what it gives are the records
        yield from iter_lines(data)
        return
    for table in data.with_format("arrow", columns=shape["columns"]).iter(batch_size=_BATCH):
        for batch in table.to_batches():
            yield from iter_table_lines(batch, table.schema)


def _name(data: Any, kind: str) -> str:
    split = getattr(data, "split", None)
    return f"<{kind} {split}>" if split else f"<{kind}>"

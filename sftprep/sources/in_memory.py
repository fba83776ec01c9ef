"""Records without a file, as sources: datasets, tables, and iterables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from sftprep.errors import ConfigError
from sftprep.sources.partition import PARTITION_BYTES, Source
from sftprep.sources.readers.lines import join_to_size
from sftprep.sources.readers.table_lines import check_column_names, iter_table_lines
from sftprep.sources.readers.to_jsonl import iter_lines

_BATCH = 1000
"""Rows of a data set that are converted together."""


def memory_source(data: Any) -> Source:
    """Return a source for data in memory.

    It is cut into partitions by the content of the records alone.

    Args:
        data: A `datasets.Dataset` or `IterableDataset`, a `pyarrow.Table`, an iterable of
            mappings, or a function without arguments that returns one.

    Raises:
        ConfigError: The data is anything else.

    Example:
        memory_source([{"text": "a"}]).blocks()  ->  yields b'{"text":"a"}\\n'
    """
    reject_columns(data)
    kind = dataset_kind(data)
    if kind == "Dataset":
        return Source(
            _dataset_name(data, "Dataset"),
            blocks=lambda: _to_blocks(_dataset_lines(data)),
            has_schema=True,
        )
    if kind == "IterableDataset":
        return Source(
            _dataset_name(data, "IterableDataset"),
            blocks=_Replay(lambda: _to_blocks(iter_lines(data))),
        )
    if type(data).__module__.partition(".")[0] == "pyarrow" and hasattr(data, "to_batches"):
        check_column_names("the pyarrow.Table", data.schema)
        return Source(
            "<Table>",
            blocks=lambda: _to_blocks(
                lines
                for batch in data.to_batches(_BATCH)
                for lines in iter_table_lines(batch, data.schema)
            ),
            has_schema=True,
        )
    if callable(data):
        return Source(
            f"<{getattr(data, '__qualname__', 'function')}>",
            blocks=_Replay(lambda: _to_blocks(iter_lines(_call(data)))),
        )
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ConfigError(
            f"records cannot be read from an object of type {type(data).__name__}",
            remedy="use a path, a data set of `datasets`, or an iterable of dictionaries",
        )
    if isinstance(data, Iterator):
        return Source(
            f"<{type(data).__name__}>", blocks=_Replay(lambda: _to_blocks(iter_lines(data)))
        )
    return Source(f"<{type(data).__name__}>", blocks=lambda: _to_blocks(iter_lines(data)))


def replayed_source(name: str, blocks: Callable[[], Iterator[bytes]]) -> Source:
    """Return a source of lines of JSON that can be read only once.

    Args:
        name: The name of the source.
        blocks: Starts to read blocks of whole lines.
    """
    return Source(name, blocks=_Replay(blocks))


def reject_columns(data: Any) -> None:
    """Reject data organized in columns.

    Raises:
        ConfigError: It is a pandas DataFrame or a dictionary of lists.
    """
    if type(data).__module__.partition(".")[0] == "pandas":
        raise ConfigError(
            f"records cannot be read from a pandas {type(data).__name__}",
            remedy="use datasets.Dataset.from_pandas(frame)",
        )
    if isinstance(data, Mapping) and data and all(_is_column(value) for value in data.values()):
        raise ConfigError(
            f"records cannot be read from a {type(data).__name__} of columns",
            remedy="use datasets.Dataset.from_dict(columns)",
        )


def _is_column(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return not any(isinstance(item, Mapping) for item in value[:1])
    return hasattr(value, "tolist")


def dataset_kind(data: Any) -> str | None:
    """Return the name of an object's class in `datasets`, or None for other objects.

    The library is not imported: that takes seconds, and most builds read files.
    """
    kinds = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    names = (c.__name__ for c in type(data).__mro__ if c.__module__.partition(".")[0] == "datasets")
    return next((name for name in names if name in kinds), None)


class _Replay:
    """Blocks of a one-time iterable, readable twice.

    The first call reads, so that the format can be detected; the second call repeats the blocks
    that the first one read and continues with the rest.
    """

    def __init__(self, blocks: Callable[[], Iterator[bytes]]) -> None:
        self._make = blocks  # starts the iteration
        self._iteration: Iterator[bytes] | None = None  # the iteration, once it has started
        self._read_blocks: list[bytes] = []  # blocks that the first call yielded

    def __call__(self) -> Iterator[bytes]:
        if self._iteration is None:
            self._iteration = self._make()
            return self._record(self._iteration)
        blocks, self._read_blocks = self._read_blocks, []
        return _drain_and_continue(blocks, self._iteration)

    def _record(self, iteration: Iterator[bytes]) -> Iterator[bytes]:
        for block in iteration:
            self._read_blocks.append(block)
            yield block


def _drain_and_continue(blocks: list[bytes], iteration: Iterator[bytes]) -> Iterator[bytes]:
    # Blocks are removed as they are yielded, so that their memory is freed.
    while blocks:
        yield blocks.pop(0)
    yield from iteration


def _call(function: Callable[[], Any]) -> Iterable[Any]:
    result = function()
    if isinstance(result, Mapping) or not isinstance(result, Iterable):
        raise ConfigError(
            f"the function returned an object of type {type(result).__name__}, not records",
            remedy="write a generator function that yields dictionaries",
        )
    return result


def _dataset_lines(data: Any) -> Iterator[bytes]:
    row_format = data.format
    if row_format["type"] == "custom":
        # The user set a transform with `set_transform`: its results are the records.
        yield from iter_lines(data)
        return
    for table in data.with_format("arrow", columns=row_format["columns"]).iter(batch_size=_BATCH):
        for batch in table.to_batches():
            yield from iter_table_lines(batch, table.schema)


def _to_blocks(lines: Iterable[bytes]) -> Iterator[bytes]:
    return join_to_size(lines, PARTITION_BYTES)


def _dataset_name(data: Any, kind: str) -> str:
    split = getattr(data, "split", None)
    return f"<{kind} {split}>" if split else f"<{kind}>"

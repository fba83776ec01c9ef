"""Parquet files and Arrow IPC files: their rows as lines of JSON, by ranges of rows that workers
read by themselves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import orjson

from sftprep.errors import InputUnreadable
from sftprep.sources.arrow_ipc import ArrowFile, open_arrow
from sftprep.sources.lines import Piece, unreadable
from sftprep.sources.rows import OPAQUE, rows_to_lines

Columns = frozenset[str] | None
"""The columns that anybody looks at; None for all."""

_STREAMED = 8
"""A row group or batch of more than this many targets is read by one process: ranges of it would
each read it whole."""


def parquet_pieces(file: str, target: int, columns: Columns = None) -> Iterator[Piece]:
    """Runs of row groups of about `target` unpacked bytes; larger ones come as lines, in runs of
    rows."""
    with _damaged(file):
        parquet = _parquet(file)
        wanted = _readable(parquet.schema_arrow, columns)
        start = end = size = 0
        for group in range(parquet.metadata.num_row_groups):
            facts = parquet.metadata.row_group(group)
            if facts.total_byte_size > _STREAMED * target:
                if end > start:
                    yield start, end, None
                rows = max(1, facts.num_rows * target // facts.total_byte_size)
                for batch in parquet.iter_batches(
                    batch_size=rows, row_groups=[group], columns=wanted
                ):
                    yield (
                        end,
                        end + batch.num_rows,
                        table_lines(batch, parquet.schema_arrow, columns),
                    )
                    end += batch.num_rows
                start, size = end, 0
                continue
            end, size = end + facts.num_rows, size + facts.total_byte_size
            if size >= target:
                yield start, end, None
                start, size = end, 0
        if end > start:
            yield start, end, None


def read_parquet_rows(file: str, start: int, end: int, columns: Columns = None) -> bytes:
    """The rows [start, end) as lines of JSON. Raises InputUnreadable."""
    with _damaged(file):
        parquet = _parquet(file)
        groups: list[int] = []
        first = at = 0
        for group in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if at < end and at + rows > start:
                first = at if not groups else first
                groups.append(group)
            at += rows
        _check_rows(file, at, end)
        table = parquet.read_row_groups(
            groups, columns=_readable(parquet.schema_arrow, columns), use_threads=False
        )
        table = table.slice(start - first, end - start)
        return b"".join(
            table_lines(batch, parquet.schema_arrow, columns) for batch in table.to_batches()
        )


def arrow_pieces(file: str, target: int, columns: Columns = None) -> Iterator[Piece]:
    """Runs of rows of about `target` bytes of an Arrow file or stream (what `datasets` writes).

    A batch of more than `_STREAMED` targets comes as lines, and so do all where columns refer to
    dictionaries: such a batch is held in memory by one process. Raises InputUnreadable.
    """
    with _damaged(file):
        arrow = open_arrow(file)
        if arrow.has_dictionaries:
            yield from _lines_of(arrow.read_in_order(), arrow, 0, target, columns)
            return
        start = end = size = 0
        for number, batch in enumerate(arrow.batches):
            if batch.length > _STREAMED * target:
                if end > start:
                    yield start, end, None
                yield from _lines_of([arrow.read(number)], arrow, end, target, columns)
                start = end = arrow.first_rows[number + 1]
                size = 0
                continue
            per_row = max(1, batch.length // max(1, batch.rows))
            step = max(1, target // per_row)
            for first in range(0, batch.rows, step):
                rows = min(step, batch.rows - first)
                end, size = end + rows, size + rows * per_row
                if size >= target:
                    yield start, end, None
                    start, size = end, 0
        if end > start:
            yield start, end, None


def _lines_of(
    batches: Iterable[Any], arrow: ArrowFile, start: int, target: int, columns: Columns
) -> Iterator[Piece]:
    """The rows of batches as lines, in pieces of about `target` bytes; start: the first one's."""
    for batch in batches:
        step = max(1, target * batch.num_rows // max(1, batch.nbytes))
        for first in range(0, batch.num_rows, step):
            part = batch.slice(first, step)
            yield start, start + part.num_rows, table_lines(part, arrow.schema, columns)
            start += part.num_rows


def read_arrow_rows(file: str, start: int, end: int, columns: Columns = None) -> bytes:
    """The rows [start, end) as lines of JSON. Raises InputUnreadable."""
    lines = []
    with _damaged(file):
        arrow = open_arrow(file)
        _check_rows(file, arrow.first_rows[-1], end)
        for number in range(bisect_right(arrow.first_rows, start) - 1, len(arrow.batches)):
            at = arrow.first_rows[number]
            if at >= end:
                break
            part = _read_batch(arrow, number)[max(start - at, 0) : end - at]
            lines.append(table_lines(part, arrow.schema, columns))
    return b"".join(lines)


@lru_cache(maxsize=1)
def _read_batch(arrow: ArrowFile, number: int) -> Any:
    # The next partition usually begins in the batch in which this one ends.
    return arrow.read(number)


def table_lines(batch: Any, schema: Any, wanted: Columns = None) -> bytes:
    """The rows of a record batch as lines of JSON.

    schema: all columns of the table; those that are no JSON stand in each row as what cannot be
    read, if they are not in the batch. wanted: the columns that anybody looks at; None for all.
    JSON that is stored as text (`arrow.json`, the Json feature of `datasets`) is written as it is,
    so numbers keep their text and absent keys stay absent.
    """
    names = [name for name in batch.schema.names if wanted is None or name in wanted]
    columns = [_values(batch.column(name)) for name in names]
    there = [
        field
        for field in schema
        if field.name not in names and (wanted is None or field.name in wanted)
    ]
    missing = {field.name: {OPAQUE: _opaque(field.type)} for field in there}
    if not columns:
        return rows_to_lines(missing for _ in range(batch.num_rows))
    rows = (dict(zip(names, cells, strict=True), **missing) for cells in zip(*columns, strict=True))
    return rows_to_lines(rows)


def _check_rows(file: str, rows: int, end: int) -> None:
    """Raises InputUnreadable where a file has fewer rows than when it was cut into partitions."""
    if rows < end:
        raise InputUnreadable(
            f"{file} has {rows:,} rows, and had {end:,} or more when it was opened",
            remedy="run the command again when nothing writes to the file",
        )


def _parquet(file: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)


def _readable(schema: Any, wanted: Columns) -> list[str]:
    """The wanted columns without those that are no JSON: a text build is not to unpack images."""
    return [
        field.name
        for field in schema
        if _opaque(field.type) is None and (wanted is None or field.name in wanted)
    ]


def _opaque(kind: Any) -> str | None:
    """What a column holds that is no JSON, or None."""
    import pyarrow as pa

    if (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    ):
        return "bytes"
    if pa.types.is_struct(kind) and {kind.field(k).name for k in range(kind.num_fields)} == {
        "bytes",
        "path",
    }:
        return "image"
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and (
        inner := _opaque(kind.value_type)
    ):
        return f"list of {inner}"
    return None


def _values(array: Any) -> list[Any]:
    """The values of an array as Python objects, column by column at every depth: ten times faster
    than value by value."""
    import pyarrow as pa

    kind = array.type
    if kind.equals(pa.json_(pa.string())) or kind.equals(pa.json_(pa.large_string())):
        return [None if text is None else _fragment(text) for text in array.storage.to_pylist()]
    if (opaque := _opaque(kind)) is not None:
        return [{OPAQUE: opaque}] * len(array)
    if isinstance(array, pa.ExtensionArray):
        return _values(array.storage)
    if pa.types.is_dictionary(kind):
        return _values(array.dictionary_decode())
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        array = array.cast(
            pa.timestamp("us", kind.tz), safe=False
        )  # Python's datetime holds no nanoseconds
    if pa.types.is_duration(kind):
        return [
            None if value is None else str(value)
            for value in array.cast(pa.duration("us"), safe=False).to_pylist()
        ]
    shape = next((shape for test, shape in _SHAPES if getattr(pa.types, test)(kind)), None)
    values: list[Any] = shape(array) if shape is not None else array.to_pylist()
    return values


def _struct_values(array: Any) -> list[Any]:
    names = [array.type.field(k).name for k in range(array.type.num_fields)]
    fields = [_values(array.field(k)) for k in range(array.type.num_fields)]
    whole: list[Any] = (
        [dict(zip(names, cells, strict=True)) for cells in zip(*fields, strict=True)]
        if names
        else [{}] * len(array)
    )
    return _with_nulls(whole, array)


def _list_values(array: Any) -> list[Any]:
    offsets = array.offsets.to_pylist()
    flat = _values(array.values.slice(offsets[0], offsets[-1] - offsets[0]))
    base = offsets[0]
    return _with_nulls([flat[begin - base : end - base] for begin, end in pairwise(offsets)], array)


def _map_values(array: Any) -> list[Any]:
    return [None if pairs is None else dict(pairs) for pairs in array.to_pylist()]


_SHAPES: tuple[tuple[str, Callable[[Any], list[Any]]], ...] = (
    ("is_struct", _struct_values),
    ("is_list", _list_values),
    ("is_large_list", _list_values),
    ("is_map", _map_values),
)


def _with_nulls(values: list[Any], array: Any) -> list[Any]:
    if array.null_count == 0:
        return values
    return [
        value if there else None
        for value, there in zip(values, array.is_valid().to_pylist(), strict=True)
    ]


def _fragment(text: str) -> Any:
    return orjson.Fragment(text.replace("\n", " ").encode("utf-8", "replace"))


@contextmanager
def _damaged(file: str) -> Iterator[None]:
    """Turn what pyarrow says of a file into InputUnreadable."""
    import pyarrow as pa

    with unreadable(file):
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            # Values that Python cannot hold, such as dates beyond its years, are ValueErrors.
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputUnreadable(
                f"{file} is damaged, or not what its name says: {what}",
                remedy="fetch or make the file again",
            ) from error

"""Parquet files and Arrow IPC files: their rows as lines of JSON, by ranges of rows that workers
read by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import orjson

from sftprep.errors import InputUnreadable
from sftprep.sources.lines import Piece, unreadable
from sftprep.sources.rows import OPAQUE, rows_to_lines

Columns = frozenset[str] | None
"""The columns that anybody looks at; None for all."""

_STREAMED = 8
"""A row group of more than this many targets is read by one process as a stream: ranges of it would
each unpack it whole."""


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
        table = parquet.read_row_groups(
            groups, columns=_readable(parquet.schema_arrow, columns), use_threads=False
        )
        table = table.slice(start - first, end - start)
        return b"".join(
            table_lines(batch, parquet.schema_arrow, columns) for batch in table.to_batches()
        )


def arrow_pieces(file: str, target: int, columns: Columns = None) -> Iterator[Piece]:
    """Runs of rows of about `target` bytes of an Arrow file or stream (what `datasets` writes).
    Raises InputUnreadable."""
    with _damaged(file):
        start = end = size = 0
        for batch in _batches(file):
            per_row = max(1, batch.nbytes // max(1, batch.num_rows))
            for first in range(0, batch.num_rows, max(1, target // per_row)):
                rows = min(max(1, target // per_row), batch.num_rows - first)
                end, size = end + rows, size + rows * per_row
                if size >= target:
                    yield start, end, None
                    start, size = end, 0
        if end > start:
            yield start, end, None


def read_arrow_rows(file: str, start: int, end: int, columns: Columns = None) -> bytes:
    """The rows [start, end) as lines of JSON. Raises InputUnreadable."""
    lines, at = [], 0
    with _damaged(file):
        for batch in _batches(file):
            first, last = max(start - at, 0), min(end - at, batch.num_rows)
            if first < last:
                lines.append(table_lines(batch.slice(first, last - first), batch.schema, columns))
            at += batch.num_rows
            if at >= end:
                break
    return b"".join(lines)


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


def _parquet(file: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)


def _batches(file: str) -> Iterator[Any]:
    import pyarrow as pa

    source = pa.memory_map(file)
    if source.size() == 0:
        return
    magic = source.read(6)
    source.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(source)


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
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise InputUnreadable(
                f"{file} is damaged, or not what its name says: {str(error).splitlines()[0]}",
                remedy="fetch or make the file again",
            ) from error

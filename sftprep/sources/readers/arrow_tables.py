"""Parquet files and Arrow IPC files: their rows as lines of JSON, by ranges of rows that workers
read by themselves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import orjson

from sftprep.errors import InputUnreadable
from sftprep.sources.readers.arrow_ipc import ArrowFile, open_arrow
from sftprep.sources.readers.lines import LARGEST_LINE, Piece, open_regular, unreadable
from sftprep.sources.readers.row_sizes import Floats, row_sizes, runs_of_rows, shares_values
from sftprep.sources.readers.to_jsonl import OPAQUE, rows_to_lines, unusable_line

Columns = frozenset[str] | None
"""The columns that anybody looks at; None for all."""

_STREAMED = 8
"""A row group or batch of more than this many targets is read by one process: ranges of it would
each read it whole."""


_SLICE = 16 << 20
"""Bytes of text, about, that rows have which are made into lines together."""

_ROWS = 1 << 16
"""Rows that are looked at together; some types need no bytes for a row."""

_SCALAR = 16.0
"""Bytes for a value and what surrounds it, in text or as a Python object."""

_MOST_EXPANDED = 16
"""A row group of which the text is longer than its bytes by more than this factor is read by one
process, which cuts it by the sizes of its rows."""

_FIRST_ROWS = 64
"""Rows of a row group that are read for its dictionaries."""

_SMALL_GROUP = 8 << 20
"""Bytes of a row group of which the text is read as dictionaries, if those may be referred to
often."""


def parquet_pieces(file: str, target: int, columns: Columns = None) -> Iterator[Piece]:
    """Runs of row groups of about `target` unpacked bytes; larger ones come as lines, in runs of
    rows."""
    with _damaged(file), _parquet(file) as parquet:
        schema = parquet.schema_arrow
        start = end = size = 0
        for group in range(parquet.metadata.num_row_groups):
            facts = _group_of(file, parquet, group, columns)
            if facts.text > _STREAMED * target or _expands(file, parquet, facts, columns):
                if end > start:
                    yield start, end, None
                batches = _parquet_batches(file, parquet, facts, columns)
                yield from _lines_of(batches, schema, end, target, columns)
                start = end = end + facts.rows
                size = 0
                continue
            end, size = end + facts.rows, size + facts.text
            if size >= target:
                yield start, end, None
                start, size = end, 0
        if end > start:
            yield start, end, None


def read_parquet_rows(file: str, start: int, end: int, columns: Columns = None) -> bytes:
    """The rows [start, end) as lines of JSON. Raises InputUnreadable."""
    lines = []
    with _damaged(file), _parquet(file) as parquet:
        at = 0
        for group in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if at < end and at + rows > start:
                facts = _group_of(file, parquet, group, columns)
                before = at
                for batch in _parquet_batches(file, parquet, facts, columns):
                    part = batch[max(start - before, 0) : max(end - before, 0)]
                    lines.append(table_lines(part, parquet.schema_arrow, columns))
                    before += batch.num_rows
                    if before >= end:
                        break
            at += rows
        _check_rows(file, at, end)
    return b"".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A row group of a Parquet file.

    bytes: decompressed; text: bytes that it has as text at least, as far as its metadata tells;
    longest: bytes that dictionaries may add to a row, on average where rows have several values;
    batch: rows that may be decoded together.
    """

    number: int
    rows: int
    bytes: int
    text: int
    longest: float
    batch: int


def _group_of(file: str, parquet: Any, number: int, columns: Columns) -> _Group:
    facts = parquet.metadata.row_group(number)
    rows = max(facts.num_rows, 1)
    values = sum(facts.column(k).num_values for k in range(facts.num_columns))
    longest = _longest_values(file, parquet, number, columns)
    return _Group(
        number=number,
        rows=facts.num_rows,
        bytes=facts.total_byte_size,
        text=_text_bytes(facts.total_byte_size, rows, values, parquet.schema_arrow, columns),
        longest=longest,
        batch=max(1, min(_ROWS, int(4 * _SLICE / (longest + _SCALAR * values / rows + 1)))),
    )


def _longest_values(file: str, parquet: Any, number: int, columns: Columns) -> float:
    """Return the bytes that dictionaries of a row group may add to a row; see `_Group`.

    A dictionary comes as a whole with the first values that are in it. Text outside of dictionaries
    is as long as its bytes in the file.
    """
    import pyarrow.compute as pc

    facts = parquet.metadata.row_group(number)
    paths = {
        path: facts.column(k).num_values / facts.num_rows
        for k, path in _text_columns(parquet, number, columns)
        if facts.column(k).num_values * facts.column(k).total_uncompressed_size > _SLICE
    }
    total = 0.0
    for path, values in paths.items():
        # Extensions are read as what they store.
        options = {"read_dictionary": [path], "arrow_extensions_enabled": False}
        chosen = {"row_groups": [number], "columns": [path]}
        dictionary = None
        with _parquet(file, metadata=parquet.metadata, **options) as dictionaries:
            for batch in dictionaries.iter_batches(_FIRST_ROWS, **chosen):
                dictionary = _dictionary_in(batch.column(0))
                if dictionary is None or len(dictionary):
                    break
        longest = 0 if dictionary is None else pc.max(pc.binary_length(dictionary)).as_py() or 0
        total += longest * max(values, 1.0)
    return total


def _text_columns(parquet: Any, number: int, columns: Columns) -> list[tuple[int, str]]:
    """Return number and path of the wanted columns of text that have a dictionary."""
    facts = parquet.metadata.row_group(number)
    wanted = set(_readable(parquet.schema_arrow, columns))
    kinds = ("STRING", "JSON", "ENUM")
    return [
        (k, described.path)
        for k in range(facts.num_columns if facts.num_rows else 0)
        if (described := parquet.schema.column(k)).physical_type == "BYTE_ARRAY"
        and described.logical_type.type in kinds
        and described.path.split(".")[0] in wanted
        and facts.column(k).has_dictionary_page
    ]


def _dictionary_in(array: Any) -> Any:
    """Return the dictionary of an array, or of the array in it that has one."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_dictionary(kind):
        return array.dictionary
    if pa.types.is_map(kind):
        inner = [array.keys, array.items]
    elif pa.types.is_struct(kind):
        inner = [array.field(k) for k in range(kind.num_fields)]
    else:
        inner = [array.values] if kind.num_fields else []
    return next((found for each in inner if (found := _dictionary_in(each)) is not None), None)


def _expands(file: str, parquet: Any, group: _Group, columns: Columns) -> bool:
    """Return whether the text of a row group is much longer than its bytes."""
    limit = max(4 * _SLICE, _MOST_EXPANDED * group.bytes)
    if group.longest * group.rows <= limit:
        return False
    size = 0.0
    for batch in _parquet_batches(file, parquet, group, columns):
        size += _sizes(batch, columns).sum()
        if size > limit:
            return True
    return False


def _parquet_batches(file: str, parquet: Any, group: _Group, columns: Columns) -> Iterator[Any]:
    """Yield the rows of a row group, as many at a time as may be held in memory."""
    chosen = {"row_groups": [group.number], "columns": _readable(parquet.schema_arrow, columns)}
    if group.longest * group.rows <= 4 * _SLICE or group.bytes > _SMALL_GROUP:
        yield from parquet.iter_batches(group.batch, **chosen)
        return
    # All values may be in one row. Dictionaries take little memory, but time.
    paths = [
        path
        for k, path in _text_columns(parquet, group.number, columns)
        if parquet.schema.column(k).logical_type.type != "JSON"
    ]
    with _parquet(file, metadata=parquet.metadata, read_dictionary=paths) as dictionaries:
        yield from dictionaries.iter_batches(group.batch, **chosen)


def arrow_pieces(file: str, target: int, columns: Columns = None) -> Iterator[Piece]:
    """Runs of rows of about `target` bytes of an Arrow file or stream (what `datasets` writes).

    A batch of more than `_STREAMED` targets comes as lines, and so do all where columns refer to
    dictionaries: such a batch is held in memory by one process. Raises InputUnreadable.
    """
    with _damaged(file):
        arrow = open_arrow(file)
        if arrow.has_dictionaries:
            yield from _lines_of(arrow.read_in_order(), arrow.schema, 0, target, columns)
            return
        shares = any(shares_values(field.type) for field in _wanted(arrow.schema, columns))
        start = end = size = 0
        for number, batch in enumerate(arrow.batches):
            if batch.rows == 0:
                # No range of rows leads to it, and its header may be what is damaged.
                arrow.read(number)
            least = max(batch.length, batch.expanded)
            text = _text_bytes(least, batch.rows, batch.values, arrow.schema, columns)
            if text > _STREAMED * target:
                if end > start:
                    yield start, end, None
                yield from _lines_of([arrow.read(number)], arrow.schema, end, target, columns)
                start = end = arrow.first_rows[number + 1]
                size = 0
                continue
            for rows, bytes_ in (
                _runs_of_batch(_read_batch(arrow, number), target, columns)
                if shares
                else _even_runs(batch.rows, text, target)
            ):
                end, size = end + rows, size + bytes_
                if size >= target:
                    yield start, end, None
                    start, size = end, 0
        if end > start:
            yield start, end, None


def _even_runs(rows: int, size: int, target: int) -> Iterator[tuple[int, int]]:
    """Yield numbers of rows that are about `target` bytes together, and those bytes."""
    per_row = max(1, size // max(1, rows))
    step = max(1, target // per_row)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        yield count, count * per_row


def _runs_of_batch(batch: Any, target: int, columns: Columns) -> Iterator[tuple[int, int]]:
    """As `_even_runs`, by the sizes of the rows."""
    for first in range(0, batch.num_rows, _ROWS):
        sizes = _sizes(batch.slice(first, _ROWS), columns)
        for begin, end in runs_of_rows(sizes, target):
            yield end - begin, int(sizes[begin:end].sum())


def _lines_of(
    batches: Iterable[Any], schema: Any, start: int, target: int, columns: Columns
) -> Iterator[Piece]:
    """The rows of batches as lines, in pieces of about `target` bytes; start: the first one's."""
    for batch in batches:
        first = 0
        for rows, _ in _runs_of_batch(batch, min(target, _SLICE), columns):
            part = batch.slice(first, rows)
            yield start, start + rows, table_lines(part, schema, columns)
            first, start = first + rows, start + rows


def _text_bytes(least: int, rows: int, values: int, schema: Any, columns: Columns) -> int:
    """Return about how many bytes rows have as text, from what headers tell of them.

    Names of columns and fields are repeated in the text, and some values need no bytes in a file.
    """
    names = sum(len(field.name) + 4 for field in _wanted(schema, columns))
    longest = max((_longest_name(field.type) for field in _wanted(schema, columns)), default=0)
    return int(max(least, rows * names, values * max(longest, 2)))


def _longest_name(kind: Any) -> int:
    """Return the length of the longest name of a field in a type."""
    fields = [kind.field(k) for k in range(kind.num_fields)]
    return max((max(len(field.name), _longest_name(field.type)) for field in fields), default=0)


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
    """The rows of a record batch as lines of JSON; see `iter_table_lines`."""
    return b"".join(iter_table_lines(batch, schema, wanted))


def iter_table_lines(batch: Any, schema: Any, wanted: Columns = None) -> Iterator[bytes]:
    """Yield the rows of a record batch as lines of JSON, in runs of about `_SLICE` bytes.

    A row of which the text is longer than LARGEST_LINE becomes a line that is rejected.

    schema: all columns of the table; those that are no JSON stand in each row as what cannot be
    read, if they are not in the batch. wanted: the columns that anybody looks at; None for all.
    JSON that is stored as text (`arrow.json`, the Json feature of `datasets`) is written as it is,
    so numbers keep their text and absent keys stay absent.
    """
    for first in range(0, batch.num_rows, _ROWS):
        part = batch.slice(first, _ROWS)
        sizes = _sizes(part, wanted)
        for begin, end in runs_of_rows(sizes, _SLICE):
            run = part.slice(begin, end - begin)
            # Numbers may be shorter than they were taken for.
            if sizes[begin] > LARGEST_LINE and _sizes(run, wanted, 2.0)[0] > LARGEST_LINE:
                what = f"the row is longer than {LARGEST_LINE >> 20} MiB"
                yield unusable_line("line_too_long", what, batch.schema.names)
            else:
                yield _lines(run, schema, wanted)


def _sizes(batch: Any, wanted: Columns, scalar: float = _SCALAR) -> Floats:
    """Return about how many bytes rows have as text; those that are not JSON are short."""
    names = [
        name
        for name, kind in zip(batch.schema.names, batch.schema.types, strict=True)
        if (wanted is None or name in wanted) and _opaque(kind) is None
    ]
    return row_sizes({name: batch.column(name) for name in names}, batch.num_rows, scalar)


def _lines(batch: Any, schema: Any, wanted: Columns) -> bytes:
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


@contextmanager
def _parquet(file: str, **options: Any) -> Iterator[Any]:
    import pyarrow.parquet as pq

    options = {"pre_buffer": False, "buffer_size": 1 << 20, **options}
    with open_regular(file) as source, pq.ParquetFile(source, **options) as parquet:
        yield parquet


def _wanted(schema: Any, wanted: Columns) -> list[Any]:
    """Return the fields of the wanted columns."""
    return [field for field in schema if wanted is None or field.name in wanted]


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
        return _dictionary_values(array)
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


def _dictionary_values(array: Any) -> list[Any]:
    """The values of a dictionary array, each made once however often it occurs."""
    import pyarrow as pa

    if len(array) == array.null_count:
        return [None] * len(array)
    indices = array.indices.drop_null().to_numpy(zero_copy_only=False)
    used, places = np.unique(indices, return_inverse=True)
    values = _values(array.dictionary.take(pa.array(used)))
    found = (values[place] for place in places.tolist())
    if array.indices.null_count == 0:
        return list(found)
    return [next(found) if there else None for there in array.indices.is_valid().to_pylist()]


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

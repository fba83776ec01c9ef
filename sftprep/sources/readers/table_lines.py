"""Record batches of Arrow as lines of JSON, in runs of rows of a bounded size.

1. The size of each row as text is estimated without making the text (`row_sizes`), because a few
   bytes of a table can represent a lot of text.
2. The rows are divided into runs of about `SLICE_BYTES`.
3. The columns of a run become lists of Python objects, column by column at every depth, which is
   ten times faster than value by value.
4. The rows are assembled from the lists and written by `to_jsonl`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from sftprep.errors import InputUnreadable
from sftprep.sources.readers.lines import LARGEST_LINE, FilePart, convert_os_errors
from sftprep.sources.readers.row_sizes import Floats, row_sizes, runs_of_rows
from sftprep.sources.readers.to_jsonl import OPAQUE, rows_to_lines, unusable_line

Columns = frozenset[str] | None
"""The columns that any format reads; None for all."""

SLICE_BYTES = 16 << 20
"""The approximate size, as text, of the rows that are converted together."""

SLICE_ROWS = 1 << 16
"""The largest number of rows that are measured together: rows of some types need no bytes, so that
a size in bytes does not limit their number."""

SCALAR_BYTES = 16.0
"""The estimated size of a value and of the characters around it, as text or as a Python object."""


def table_lines(batch: Any, schema: Any, columns: Columns = None) -> bytes:
    """Return the rows of a record batch as lines of JSON; see `iter_table_lines`."""
    return b"".join(iter_table_lines(batch, schema, columns))


def iter_table_lines(batch: Any, schema: Any, columns: Columns = None) -> Iterator[bytes]:
    """Yield the rows of a record batch as lines of JSON, in runs.

    A run has about `SLICE_BYTES`. A row whose text is longer than LARGEST_LINE becomes a line that
    is rejected. JSON that is stored as text (`arrow.json`, the `Json` feature of `datasets`) is
    copied, so that numbers keep their text and absent keys stay absent.

    Args:
        batch: A `pyarrow.RecordBatch`.
        schema: All columns of the table. Columns that are not JSON occur in each row as an opaque
            value, also if they are not in the batch.
        columns: The columns to write; None for all.
    """
    for first in range(0, batch.num_rows, SLICE_ROWS):
        part = batch.slice(first, SLICE_ROWS)
        sizes = estimate_sizes(part, columns)
        for begin, end in runs_of_rows(sizes, SLICE_BYTES):
            run = part.slice(begin, end - begin)
            # The estimate is an upper bound: a long row is measured again by the lower bound.
            if sizes[begin] > LARGEST_LINE and estimate_sizes(run, columns, 2.0)[0] > LARGEST_LINE:
                message = f"the row is longer than {LARGEST_LINE >> 20} MiB"
                yield unusable_line("line_too_long", message, batch.schema.names)
            else:
                yield _to_lines(run, schema, columns)


def parts_of_batches(
    batches: Iterable[Any], schema: Any, start: int, target: int, columns: Columns
) -> Iterator[FilePart]:
    """Yield the rows of batches as parts of about `target` bytes each.

    The parts have a payload.

    Args:
        batches: Record batches.
        schema: All columns of the table.
        start: The row of the table at which the batches start.
        target: The size of a part in bytes.
        columns: The columns to write; None for all.
    """
    for batch in batches:
        first = 0
        for rows, _ in runs_of_batch(batch, min(target, SLICE_BYTES), columns):
            part = batch.slice(first, rows)
            yield start, start + rows, table_lines(part, schema, columns)
            first, start = first + rows, start + rows


def runs_of_batch(batch: Any, target: int, columns: Columns) -> Iterator[tuple[int, int]]:
    """Yield runs of about `target` bytes: the rows and their estimated bytes."""
    for first in range(0, batch.num_rows, SLICE_ROWS):
        sizes = estimate_sizes(batch.slice(first, SLICE_ROWS), columns)
        for begin, end in runs_of_rows(sizes, target):
            yield end - begin, int(sizes[begin:end].sum())


def estimate_sizes(batch: Any, columns: Columns, scalar: float = SCALAR_BYTES) -> Floats:
    """Return the approximate size of each row as text, in bytes: float64 [rows].

    Args:
        batch: A record batch; columns that are not JSON count nothing.
        columns: The columns to measure; None for all.
        scalar: See `row_sizes`.
    """
    names = [
        name
        for name, kind in zip(batch.schema.names, batch.schema.types, strict=True)
        if (columns is None or name in columns) and _opaque_kind(kind) is None
    ]
    return row_sizes({name: batch.column(name) for name in names}, batch.num_rows, scalar)


def text_bytes(least: int, rows: int, values: int, schema: Any, columns: Columns) -> int:
    """Return the approximate size of rows as text, in bytes, from their headers.

    Args:
        least: The number of bytes of the rows in the file, decompressed.
        rows: The number of rows.
        values: The number of values, nested ones included.
        schema: All columns of the table.
        columns: The columns to write; None for all.
    """
    # The names of columns and fields are repeated in each row, and some values need no bytes in a
    # file.
    names = sum(len(field.name) + 4 for field in wanted_fields(schema, columns))
    longest = max(
        (_longest_name(field.type) for field in wanted_fields(schema, columns)), default=0
    )
    return int(max(least, rows * names, values * max(longest, 2)))


def _longest_name(kind: Any) -> int:
    """Return the length of the longest name of a field in a type."""
    fields = [kind.field(k) for k in range(kind.num_fields)]
    return max((max(len(field.name), _longest_name(field.type)) for field in fields), default=0)


def check_column_names(name: str, schema: Any) -> None:
    """Reject a table with two columns of the same name.

    One of them would be lost.

    Args:
        name: The file or dataset, for the message.
        schema: The `pyarrow.Schema`.

    Raises:
        InputUnreadable: Two columns have the same name.
    """
    repeated = [column for column, count in Counter(schema.names).items() if count > 1]
    if repeated:
        raise InputUnreadable(
            f"{name} has several columns named {repeated[0]!r}", remedy="rename or remove them"
        )


def wanted_fields(schema: Any, columns: Columns) -> list[Any]:
    """Return the fields of the wanted columns.

    Columns of images are always wanted: a record with an image must not be read without notice.
    """
    return [
        field for field in schema if columns is None or field.name in columns or _is_image(field)
    ]


def json_columns(schema: Any, columns: Columns) -> list[str]:
    """Return the names of the wanted JSON columns; others need not be decoded."""
    return [
        field.name for field in wanted_fields(schema, columns) if _opaque_kind(field.type) is None
    ]


def image_columns(schema: Any) -> set[str]:
    """Return the names of the columns of images; only their presence is read."""
    return {field.name for field in schema if _is_image(field)}


def check_row_count(file: str, rows: int, end: int) -> None:
    """Check the number of rows of a file against its partitions.

    Raises:
        InputUnreadable: It has fewer than `end`.
    """
    if rows < end:
        raise InputUnreadable(
            f"{file} has {rows:,} rows, and had {end:,} or more when it was opened",
            remedy="run the command again when no other process writes to the file",
        )


@contextmanager
def convert_arrow_errors(file: str) -> Iterator[None]:
    """Raise an error of pyarrow in the enclosed code as InputUnreadable."""
    import pyarrow as pa

    with convert_os_errors(file):
        try:
            yield
        # Values that Python cannot represent, such as dates after year 9999, are ValueErrors.
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputUnreadable(
                f"{file} is damaged, or is not what its name says: {what}",
                remedy="download or create the file again",
            ) from error


# --- values of a run of rows ----------------------------------------------------------------------


def _to_lines(batch: Any, schema: Any, read_columns: Columns) -> bytes:
    kinds = {field.name: _opaque_kind(field.type) for field in wanted_fields(schema, read_columns)}
    names = [name for name in batch.schema.names if name in kinds]
    columns = [
        _to_objects(batch.column(name))
        if (kind := kinds[name]) is None
        else _to_opaque(batch.column(name), kind)
        for name in names
    ]
    # The batch lacks only columns that are not JSON; see `json_columns`.
    opaque = {name: {OPAQUE: kind} for name, kind in kinds.items() if name not in names}
    if not columns:
        return rows_to_lines(opaque for _ in range(batch.num_rows))
    rows = (dict(zip(names, cells, strict=True), **opaque) for cells in zip(*columns, strict=True))
    return rows_to_lines(rows)


def _opaque_kind(kind: Any) -> str | None:
    """Return the kind of a type's non-JSON content, or None for JSON."""
    import pyarrow as pa

    if (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    ):
        return "bytes"
    # `datasets` stores images and audio in this form.
    if pa.types.is_struct(kind) and {kind.field(k).name for k in range(kind.num_fields)} == {
        "bytes",
        "path",
    }:
        return "image"
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and (
        inner := _opaque_kind(kind.value_type)
    ):
        return f"list of {inner}"
    return None


def _is_image(field: Any) -> bool:
    return "image" in (_opaque_kind(field.type) or "")


def _to_objects(array: Any) -> list[Any]:
    """Return the values of an array as Python objects."""
    import pyarrow as pa

    kind = array.type
    if kind.equals(pa.json_(pa.string())) or kind.equals(pa.json_(pa.large_string())):
        return [None if text is None else _copy_json(text) for text in array.storage.to_pylist()]
    if (opaque := _opaque_kind(kind)) is not None:
        return _to_opaque(array, opaque)
    if isinstance(array, pa.ExtensionArray):
        return _to_objects(array.storage)
    if pa.types.is_dictionary(kind):
        return _dictionary_to_objects(array)
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        # Python's datetime has no nanoseconds.
        array = array.cast(pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_duration(kind):
        return [
            None if value is None else str(value)
            for value in array.cast(pa.duration("us"), safe=False).to_pylist()
        ]
    convert = next((c for test, c in _CONVERTERS if getattr(pa.types, test)(kind)), None)
    objects: list[Any] = convert(array) if convert is not None else array.to_pylist()
    return objects


def _to_opaque(array: Any, kind: str) -> list[Any]:
    """Return placeholders for the values of a non-JSON array.

    A placeholder is null or an empty list for a value without content, or its kind.
    """
    import pyarrow as pa

    empty: list[Any] | None = (
        [] if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) else None
    )
    objects: list[Any] = [
        {OPAQUE: kind} if has_content else empty for has_content in _has_content(array).tolist()
    ]
    return _restore_nulls(objects, array)


def _has_content(array: Any) -> NDArray[np.bool_]:
    """Return which values of a non-JSON array have content: bool [values].

    An image without bytes and path has none, nor has a list without an item with content.
    """
    import pyarrow as pa

    has_content: NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False).copy()
    kind = array.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        fields = [_has_content(array.field(k)) for k in range(kind.num_fields)]
        has_content &= np.logical_or.reduce(fields)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = array.offsets.to_numpy()
        items = array.values.slice(offsets[0], offsets[-1] - offsets[0])
        num_filled = np.concatenate(([0], np.cumsum(_has_content(items))))[offsets - offsets[0]]
        has_content &= num_filled[1:] > num_filled[:-1]
    return has_content


def _dictionary_to_objects(array: Any) -> list[Any]:
    """Return the values of a dictionary array, with one object per distinct value."""
    import pyarrow as pa

    if len(array) == array.null_count:
        return [None] * len(array)
    indices = array.indices.drop_null().to_numpy(zero_copy_only=False)
    used, positions = np.unique(indices, return_inverse=True)
    values = _to_objects(array.dictionary.take(pa.array(used)))
    found = (values[position] for position in positions.tolist())
    if array.indices.null_count == 0:
        return list(found)
    return [next(found) if valid else None for valid in array.indices.is_valid().to_pylist()]


def _struct_to_objects(array: Any) -> list[Any]:
    names = [array.type.field(k).name for k in range(array.type.num_fields)]
    fields = [_to_objects(array.field(k)) for k in range(array.type.num_fields)]
    objects: list[Any] = (
        [dict(zip(names, cells, strict=True)) for cells in zip(*fields, strict=True)]
        if names
        else [{}] * len(array)
    )
    return _restore_nulls(objects, array)


def _list_to_objects(array: Any) -> list[Any]:
    offsets = array.offsets.to_pylist()
    # The values of a slice are only a part of the values of the array.
    flat = _to_objects(array.values.slice(offsets[0], offsets[-1] - offsets[0]))
    base = offsets[0]
    lists = [flat[begin - base : end - base] for begin, end in pairwise(offsets)]
    return _restore_nulls(lists, array)


def _map_to_objects(array: Any) -> list[Any]:
    return [None if pairs is None else dict(pairs) for pairs in array.to_pylist()]


_CONVERTERS: tuple[tuple[str, Callable[[Any], list[Any]]], ...] = (
    ("is_struct", _struct_to_objects),
    ("is_list", _list_to_objects),
    ("is_large_list", _list_to_objects),
    ("is_map", _map_to_objects),
)
"""A predicate of `pyarrow.types`, and the converter for the types that fulfil it."""


def _restore_nulls(values: list[Any], array: Any) -> list[Any]:
    if array.null_count == 0:
        return values
    return [
        value if valid else None
        for value, valid in zip(values, array.is_valid().to_pylist(), strict=True)
    ]


def _copy_json(text: str) -> Any:
    return orjson.Fragment(text.replace("\n", " ").encode("utf-8", "replace"))

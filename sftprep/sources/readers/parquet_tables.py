"""Parquet files: runs of row groups, and rows as lines of JSON.

Workers read the runs of row groups. A dictionary page can represent far more text than its bytes: a
row group of a few kilobytes may expand to gigabytes. Therefore the length of the longest value of
each dictionary is read before a row group is decoded; it limits the rows that are decoded together
(`_RowGroup.batch`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sftprep.sources.readers.lines import FilePart, open_regular
from sftprep.sources.readers.table_lines import (
    SCALAR_BYTES,
    SLICE_BYTES,
    SLICE_ROWS,
    Columns,
    check_column_names,
    check_row_count,
    convert_arrow_errors,
    estimate_sizes,
    image_columns,
    json_columns,
    parts_of_batches,
    table_lines,
    text_bytes,
)

_STREAMED = 8
"""A row group of more than this many targets is read by the driver: workers that read ranges of its
rows would each decode the whole group."""

_LARGEST_EXPANSION = 16
"""A row group whose text is longer than its bytes by more than this factor is read by the driver,
which cuts it by the sizes of its rows."""

_SAMPLED_ROWS = 64
"""The rows of a row group that are read at a time to find its dictionaries."""

_SMALL_GROUP = 8 << 20
"""Up to this size in bytes, a row group that may expand is decoded with its dictionaries kept."""


def parquet_parts(file: str, target: int, columns: Columns = None) -> Iterator[FilePart]:
    """Yield runs of row groups of about `target` decompressed bytes.

    A row group that is too large for a worker is yielded as parts with a payload.

    Args:
        file: The path.
        target: The size of a part in bytes.
        columns: The columns to read; None for all.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    with convert_arrow_errors(file), _open_parquet(file) as parquet:
        schema = parquet.schema_arrow
        check_column_names(file, schema)
        start = end = size = 0  # rows of the run, and its bytes
        for number in range(parquet.metadata.num_row_groups):
            group = _inspect_group(file, parquet, number, columns)
            if group.text > _STREAMED * target or _expands(file, parquet, group, columns):
                if end > start:
                    yield start, end, None
                batches = _read_batches(file, parquet, group, columns)
                yield from parts_of_batches(batches, schema, end, target, columns)
                start = end = end + group.rows
                size = 0
                continue
            end, size = end + group.rows, size + group.text
            if size >= target:
                yield start, end, None
                start, size = end, 0
        if end > start:
            yield start, end, None


def count_parquet_rows(file: str) -> int:
    """Return the number of rows of a Parquet file.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    with convert_arrow_errors(file), _open_parquet(file) as parquet:
        return int(parquet.metadata.num_rows)


def read_parquet_rows(file: str, start: int, end: int, columns: Columns = None) -> bytes:
    """Return the rows [start, end) as lines of JSON.

    Raises:
        InputUnreadable: The file is damaged, has fewer rows, or cannot be read.
    """
    lines = []
    with convert_arrow_errors(file), _open_parquet(file) as parquet:
        row = 0  # the first row of the group
        for number in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(number).num_rows
            if row < end and row + rows > start:
                group = _inspect_group(file, parquet, number, columns)
                batch_row = row
                for batch in _read_batches(file, parquet, group, columns):
                    part = batch[max(start - batch_row, 0) : max(end - batch_row, 0)]
                    lines.append(table_lines(part, parquet.schema_arrow, columns))
                    batch_row += batch.num_rows
                    if batch_row >= end:
                        break
            row += rows
        check_row_count(file, row, end)
    return b"".join(lines)


def parquet_columns(file: str) -> dict[str, bool]:
    """Return the columns of a Parquet file except images, and whether they may have content.

    The statistics in its footer decide. Without them, a column may have content.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    import pyarrow as pa

    with convert_arrow_errors(file), _open_parquet(file) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        images, columns = image_columns(schema), {}
        leaf = 0
        for field in schema:
            leaves = range(leaf, leaf := leaf + _count_leaves(field.type))
            if field.name not in images:
                columns[field.name] = not pa.types.is_null(field.type) and any(
                    _may_have_content(metadata.row_group(number).column(k))
                    for number in range(metadata.num_row_groups)
                    for k in leaves
                )
        return columns


def _count_leaves(kind: Any) -> int:
    """Return the number of columns in which a file stores a type."""
    kind = getattr(kind, "storage_type", kind)
    fields = [kind.field(k).type for k in range(kind.num_fields)]
    return sum(map(_count_leaves, fields)) if fields else 1


def _may_have_content(chunk: Any) -> bool:
    """Return whether a column chunk may have a value besides null and ""."""
    statistics = chunk.statistics
    if statistics is None:
        return bool(chunk.num_values)
    if statistics.has_null_count and statistics.null_count == chunk.num_values:
        return False
    return not (statistics.has_min_max and statistics.max in ("", b""))


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowGroup:
    """A row group of a Parquet file, from its metadata and dictionaries.

    Attributes:
        number: Its number in the file.
        rows: Its number of rows.
        bytes: Its size in bytes, decompressed.
        text: A lower bound of its size as text, in bytes, without dictionaries.
        longest: The bytes that dictionaries may add to a row; an average where a row has several
            values.
        batch: The number of rows that may be decoded together.
    """

    number: int
    rows: int
    bytes: int
    text: int
    longest: float
    batch: int


def _inspect_group(file: str, parquet: Any, number: int, columns: Columns) -> _RowGroup:
    metadata = parquet.metadata.row_group(number)
    rows = max(metadata.num_rows, 1)
    values = sum(metadata.column(k).num_values for k in range(metadata.num_columns))
    longest = _longest_values(file, parquet, number, columns)
    row_bytes = longest + SCALAR_BYTES * values / rows + 1
    image_bytes = sum(_images_to_decode(parquet, number).values()) / rows
    return _RowGroup(
        number=number,
        rows=metadata.num_rows,
        bytes=metadata.total_byte_size,
        text=text_bytes(metadata.total_byte_size, rows, values, parquet.schema_arrow, columns),
        longest=longest,
        batch=max(1, min(SLICE_ROWS, int(4 * SLICE_BYTES / (row_bytes + image_bytes)))),
    )


def _longest_values(file: str, parquet: Any, number: int, columns: Columns) -> float:
    """Return the possible bytes per row from dictionaries; see `_RowGroup.longest`."""
    import pyarrow.compute as pc

    metadata = parquet.metadata.row_group(number)
    # Text outside of dictionaries is as long as its bytes in the file, so only columns with a
    # dictionary can expand, and only those with many values can expand by much.
    paths = {
        path: metadata.column(k).num_values / metadata.num_rows
        for k, path in _dictionary_columns(parquet, number, columns)
        if metadata.column(k).num_values * metadata.column(k).total_uncompressed_size > SLICE_BYTES
    }
    total = 0.0
    for path, values in paths.items():
        # Extension types are read as their storage types.
        options = {"read_dictionary": [path], "arrow_extensions_enabled": False}
        selection = {"row_groups": [number], "columns": [path]}
        dictionary = None
        with _open_parquet(file, metadata=parquet.metadata, **options) as dictionaries:
            # The whole dictionary is read with the first values that refer to it.
            for batch in dictionaries.iter_batches(_SAMPLED_ROWS, **selection):
                dictionary = _find_dictionary(batch.column(0))
                if dictionary is None or len(dictionary):
                    break
        longest = 0 if dictionary is None else pc.max(pc.binary_length(dictionary)).as_py() or 0
        total += longest * max(values, 1.0)
    return total


def _dictionary_columns(parquet: Any, number: int, columns: Columns) -> list[tuple[int, str]]:
    """Return number and path of the wanted columns of text with a dictionary."""
    metadata = parquet.metadata.row_group(number)
    wanted = set(json_columns(parquet.schema_arrow, columns))
    kinds = ("STRING", "JSON", "ENUM")
    return [
        (k, described.path)
        for k in range(metadata.num_columns if metadata.num_rows else 0)
        if (described := parquet.schema.column(k)).physical_type == "BYTE_ARRAY"
        and described.logical_type.type in kinds
        and described.path.split(".")[0] in wanted
        and metadata.column(k).has_dictionary_page
    ]


def _find_dictionary(array: Any) -> Any:
    """Return the dictionary of an array or of a nested array, or None."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_dictionary(kind):
        return array.dictionary
    if pa.types.is_map(kind):
        nested = [array.keys, array.items]
    elif pa.types.is_struct(kind):
        nested = [array.field(k) for k in range(kind.num_fields)]
    else:
        nested = [array.values] if kind.num_fields else []
    return next((found for item in nested if (found := _find_dictionary(item)) is not None), None)


def _expands(file: str, parquet: Any, group: _RowGroup, columns: Columns) -> bool:
    """Return whether the text of a row group is much longer than its bytes."""
    limit = max(4 * SLICE_BYTES, _LARGEST_EXPANSION * group.bytes)
    if group.longest * group.rows <= limit:
        return False
    # It may expand: the sizes of its rows decide.
    size = 0.0
    for batch in _read_batches(file, parquet, group, columns):
        size += estimate_sizes(batch, columns).sum()
        if size > limit:
            return True
    return False


def _read_batches(file: str, parquet: Any, group: _RowGroup, columns: Columns) -> Iterator[Any]:
    """Yield the rows of a row group as record batches small enough for memory."""
    decoded_columns = _decoded_columns(parquet, group.number, columns)
    selection = {"row_groups": [group.number], "columns": decoded_columns}
    if group.longest * group.rows <= 4 * SLICE_BYTES or group.bytes > _SMALL_GROUP:
        yield from parquet.iter_batches(group.batch, **selection)
        return
    # All long values may be in one batch. Arrays that keep their dictionary take little memory, but
    # more time.
    paths = [
        path
        for k, path in _dictionary_columns(parquet, group.number, columns)
        if parquet.schema.column(k).logical_type.type != "JSON"
    ]
    with _open_parquet(file, metadata=parquet.metadata, read_dictionary=paths) as dictionaries:
        yield from dictionaries.iter_batches(group.batch, **selection)


def _decoded_columns(parquet: Any, number: int, columns: Columns) -> list[str]:
    """Return the columns of a row group to decode; of images only what shows whether they exist.

    This is the path; and where an image may have no bytes, the bytes.
    """
    paths = [path for _, path in _image_leaves(parquet, ".path")]
    return [
        *json_columns(parquet.schema_arrow, columns),
        *paths,
        *_images_to_decode(parquet, number),
    ]


def _images_to_decode(parquet: Any, number: int) -> dict[str, int]:
    """Return the paths of the bytes of images that may be null in a row group, with their sizes."""
    metadata = parquet.metadata.row_group(number)
    leaves = [(metadata.column(k), path) for k, path in _image_leaves(parquet, ".bytes")]
    return {
        path: column.total_uncompressed_size
        for column, path in leaves
        if column.statistics is None
        or not column.statistics.has_null_count
        or column.statistics.null_count
    }


def _image_leaves(parquet: Any, suffix: str) -> list[tuple[int, str]]:
    """Return number and path of the columns with the paths, or the bytes, of images."""
    images = image_columns(parquet.schema_arrow)
    leaves = ((k, parquet.schema.column(k).path) for k in range(len(parquet.schema)))
    return [(k, p) for k, p in leaves if p.endswith(suffix) and p.split(".")[0] in images]


@contextmanager
def _open_parquet(file: str, **options: Any) -> Iterator[Any]:
    import pyarrow.parquet as pq

    # By default, pyarrow reads whole column chunks into memory.
    options = {"pre_buffer": False, "buffer_size": 1 << 20, **options}
    with open_regular(file) as source, pq.ParquetFile(source, **options) as parquet:
        yield parquet

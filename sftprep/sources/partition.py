"""Partitions of the inputs: parts of a fixed size, as lines of JSON.

How an input is cut depends on the input alone, never on the number of workers. A plain file of
lines is cut into byte ranges and a Parquet or Arrow file into ranges of rows; workers read these
ranges themselves. Everything that can only be read from its start (compressed files, JSON arrays,
CSV, data in memory) is read by the driver, and such a partition carries its lines as a payload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from sftprep.config.validation import TextUnit, is_url
from sftprep.errors import FormatError, InputUnreadable
from sftprep.sources.discovery.file_types import kind_of
from sftprep.sources.discovery.files import find_files
from sftprep.sources.readers.arrow_tables import (
    arrow_columns,
    arrow_parts,
    count_arrow_rows,
    read_arrow_rows,
)
from sftprep.sources.readers.delimited import delimited_parts
from sftprep.sources.readers.json_array import document_parts
from sftprep.sources.readers.lines import (
    FilePart,
    compression,
    convert_os_errors,
    line_parts,
    open_input,
    plain_size,
    read_line_range,
    reject_other_kinds,
    unpacked_blocks,
)
from sftprep.sources.readers.parquet_tables import (
    count_parquet_rows,
    parquet_columns,
    parquet_parts,
    read_parquet_rows,
)
from sftprep.sources.readers.plain_text import text_file_parts, text_line_parts
from sftprep.sources.readers.table_lines import Columns
from sftprep.sources.readers.to_jsonl import strip_null_lines
from sftprep.stores.cache import copy_of_input

__all__ = [
    "KINDS",
    "PARTITION_BYTES",
    "Kind",
    "Partition",
    "Source",
    "cut",
    "find_files",
    "first_lines",
    "open_input",
    "range_length",
    "read_partition",
    "source_of",
    "table_columns",
]

PARTITION_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Partition:
    """A range of one input.

    Attributes:
        index: The number of the partition among all partitions of the build.
        input: The number of the input.
        file: The path of the file, or the name of the data in memory.
        start: The first byte of the range, or its first row in a table. A line belongs to the
            partition in which it starts.
        end: The byte or row after the range.
        payload: The lines, where workers cannot read the range themselves.
        kind: How the file is read; a key of `KINDS`.
        strip_nulls: Whether keys with null are left out.
        columns: The columns of a table that are read; None for all.
    """

    index: int
    input: int
    file: str
    start: int
    end: int
    payload: bytes | None = None
    kind: str = "lines"
    strip_nulls: bool = False
    columns: Columns = None


@dataclass(frozen=True, slots=True)
class Source:
    """One input: a file, or data in memory.

    Attributes:
        name: The name of the input in logs and in the manifest.
        kind: How the file is read; a key of `KINDS`.
        limit: The largest number of records to read from all sources of the group together.
        group: The number of the group that shares the limit.
        strip_nulls: Whether keys with null are left out.
        blocks: For data in memory, a function that yields blocks of whole lines of JSON, the same
            blocks in each call.
        path: The path of the file, where it differs from the name.
        columns: The columns of a table that are read; None for all.
        has_schema: Whether data in memory has the types of a table.
        start: The first byte of the range of the file to read, or its first row in a table.
        end: The byte or row after the range; None for the end of the file.
        size: The size of an object in a store, from the listing; None for other inputs.
    """

    name: str
    kind: str = "lines"
    limit: int | None = None
    group: int = 0
    strip_nulls: bool = False
    blocks: Callable[[], Iterator[bytes]] | None = None
    path: str | None = None
    columns: Columns = None
    has_schema: bool = False
    start: int = 0
    end: int | None = None
    size: int | None = None

    @property
    def is_table(self) -> bool:
        """Return whether the records have the types of a table.

        Every object then has all keys.
        """
        return self.has_schema or self.kind in ("parquet", "arrow")

    @property
    def file(self) -> str:
        """Return the path of the file, or the name of data in memory."""
        return self.path or self.name


@dataclass(frozen=True, slots=True)
class Kind:
    """The functions for one kind of file.

    Attributes:
        parts: Cuts a file into parts of about a size in bytes.
        read: Reads the lines of a part that has no payload.
        length: Returns the number of bytes or rows of a file, if its parts are ranges of them; None
            if it can only be read from its start.
        columns: Returns the columns of a table, and whether each may have content; None for files
            whose columns are not known before they are read.
    """

    parts: Callable[[str, int, Columns], Iterator[FilePart]]
    read: Callable[[str, int, int, Columns], bytes]
    length: Callable[[str], int | None] = lambda _: None
    columns: Callable[[str], dict[str, bool]] | None = None


def _ignore_columns(
    parts: Callable[[str, int], Iterator[FilePart]],
) -> Callable[[str, int, Columns], Iterator[FilePart]]:
    # Only tables can skip columns cheaply: to remove keys from lines, they would have to be parsed.
    return lambda file, target, _: parts(file, target)


def _read_lines(file: str, start: int, end: int, columns: Columns) -> bytes:
    return read_line_range(file, start, end)


KINDS: dict[str, Kind] = {
    "lines": Kind(_ignore_columns(line_parts), _read_lines, plain_size),
    "document": Kind(_ignore_columns(document_parts), _read_lines),
    "delimited": Kind(_ignore_columns(delimited_parts), _read_lines),
    "text": Kind(_ignore_columns(text_line_parts), _read_lines),
    "text-file": Kind(_ignore_columns(text_file_parts), _read_lines),
    "parquet": Kind(parquet_parts, read_parquet_rows, count_parquet_rows, parquet_columns),
    "arrow": Kind(arrow_parts, read_arrow_rows, count_arrow_rows, arrow_columns),
}


def source_of(file: str, text_unit: TextUnit | None = None) -> Source:
    """Return the source for a file.

    Args:
        file: The path.
        text_unit: What a record of plain text is; None if such files are not read.
    """
    return Source(file, kind_of(file, text_unit) or "lines")


def table_columns(source: Source) -> dict[str, bool] | None:
    """Return the columns of a table except images, and whether each may have content.

    Returns:
        None for a source of which no column can be skipped.
    """
    columns = KINDS[source.kind].columns
    if columns is None or source.blocks is not None:
        return None
    with _readable(source.file, source.kind) as file:
        return columns(file)


def range_length(source: Source) -> int | None:
    """Return the number of bytes or rows of a file that can be read in ranges; None for others."""
    if source.blocks is not None or _is_object_of_lines(source.file, source.kind):
        return source.size
    with _readable(source.file, source.kind) as file:
        return KINDS[source.kind].length(file)


def cut(inputs: Iterable[str | Source], target: int = PARTITION_BYTES) -> Iterator[Partition]:
    """Cut files and sources into partitions, in order, without reading ahead.

    Of a source with a range, these are the partitions that start in the range.

    Args:
        inputs: The files and sources.
        target: The size of a partition in bytes; a partition ends with the line or row that
            reaches it.

    Raises:
        InputUnreadable: A file is damaged or cannot be read.
    """
    index = 0
    remaining: dict[int, int] = {}  # group -> records that may still be read
    for number, entry in enumerate(inputs):
        source = source_of(entry) if isinstance(entry, str) else entry
        if source.limit is not None and remaining.setdefault(source.group, source.limit) == 0:
            continue
        for complete in _file_parts(source, target):
            part = complete
            # The last part within the limit is shortened to the records that may still be read.
            if source.limit is not None:
                part, remaining[source.group] = _limit_records(
                    complete, remaining[source.group], source
                )
            yield Partition(
                index, number, source.file, *part, source.kind, source.strip_nulls, source.columns
            )
            index += 1
            if source.limit is not None and remaining[source.group] == 0:
                break


def read_partition(partition: Partition) -> bytes:
    """Return the lines of a partition, each a JSON value.

    A line longer than LARGEST_LINE is cut off one byte after that limit, so that `parse_line`
    rejects it.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
        InputChanged: The file became shorter.
    """
    data = partition.payload
    if data is None:
        data = _read(partition, partition.start, partition.end)
    return strip_null_lines(data) if partition.strip_nulls else data


def first_lines(entry: str | Source) -> Iterator[bytes]:
    """Yield the lines of an input from its start, read as the iterator advances.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    source = source_of(entry) if isinstance(entry, str) else entry
    if _is_object_of_lines(source.file, source.kind):
        with convert_os_errors(source.file):
            reject_other_kinds(source.file)
    # Parts smaller than a partition: a format is detected from a few records.
    for start, end, payload in _file_parts(source, 1 << 20):
        data = _read(source, start, end) if payload is None else payload
        yield from (strip_null_lines(data) if source.strip_nulls else data).split(b"\n")


def _file_parts(source: Source, target: int) -> Iterator[FilePart]:
    if source.blocks is not None:
        return _number_rows(source.blocks())
    if source.limit is not None and source.kind == "lines":
        return _counted_parts(source, target)
    if source.size is not None and _is_object_of_lines(source.file, source.kind):
        starts = range(0, source.size, target)
        parts: Iterator[FilePart] = (
            (start, min(start + target, source.size), None) for start in starts
        )
    else:
        parts = _parts_of_kind(source, target)
    if source.start == 0 and source.end is None:
        return parts
    return (
        part
        for part in parts
        if source.start <= part[0] and (source.end is None or part[0] < source.end)
    )


def _counted_parts(source: Source, target: int) -> Iterator[FilePart]:
    """Yield the parts of a file of lines with their content, to count the records."""
    with _readable(source.file, source.kind) as file:
        for start, block in unpacked_blocks(file, target):
            yield start, start + len(block), block


def _parts_of_kind(source: Source, target: int) -> Iterator[FilePart]:
    with _readable(source.file, source.kind) as file:
        yield from KINDS[source.kind].parts(file, target, source.columns)


def _read(source: Source | Partition, start: int, end: int) -> bytes:
    """Return the lines of a range."""
    with _readable(source.file, source.kind) as file:
        return KINDS[source.kind].read(file, start, end, source.columns)


def _is_object_of_lines(file: str, kind: str) -> bool:
    """Return whether a file is an object in a store of which ranges are read."""
    return is_url(file) and kind == "lines" and compression(file) is None


@contextmanager
def _readable(file: str, kind: str) -> Iterator[str]:
    """Yield a path of a file for the functions of its kind.

    An object in a store is copied to the cache, unless ranges of it are read.
    """
    if not is_url(file) or _is_object_of_lines(file, kind):
        yield file
        return
    with ExitStack() as stack:
        with convert_os_errors(file):
            path = stack.enter_context(copy_of_input(file))
        try:
            yield str(path)
        except (FormatError, InputUnreadable) as error:  # they name the copy
            raise type(error)(f"{file}: {error.text}", remedy=error.remedies) from error


def _number_rows(blocks: Iterator[bytes]) -> Iterator[FilePart]:
    rows = 0
    for block in blocks:
        end = rows + block.count(b"\n")
        yield rows, end, block
        rows = end


def _limit_records(part: FilePart, limit: int, source: Source) -> tuple[FilePart, int]:
    """Return the first `limit` records of a part, and the number still permitted.

    Lines that contain only whitespace are not records.
    """
    start, end, data = part
    if data is None and source.kind in ("parquet", "arrow"):
        rows = min(end - start, limit)
        return (start, start + rows, None), limit - rows
    if data is None:
        data = _read(source, start, end)
    lines = data.split(b"\n")
    records = 0
    for number, line in enumerate(lines):
        records += bool(line.strip())
        if records == limit:
            return (start, end, b"\n".join(lines[: number + 1]) + b"\n"), 0
    return (start, end, data), limit - records

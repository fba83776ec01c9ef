"""Inputs cut into partitions of a fixed size, the same whatever the number of workers, and
partitions read as lines of JSON.

A plain file of lines is cut by byte ranges, a Parquet or Arrow file by ranges of rows, and workers
read them by themselves. What can only be read from its start (compressed files, JSON arrays, CSV,
data in memory) is read here, and its partitions carry their lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sftprep.sources.discovery.file_types import kind_of
from sftprep.sources.discovery.files import find_files
from sftprep.sources.readers.arrow_tables import (
    Columns,
    arrow_pieces,
    parquet_pieces,
    read_arrow_rows,
    read_parquet_rows,
)
from sftprep.sources.readers.delimited import delimited_pieces
from sftprep.sources.readers.json_array import document_pieces
from sftprep.sources.readers.lines import (
    Piece,
    line_pieces,
    open_input,
    read_line_range,
    unpacked_blocks,
)
from sftprep.sources.readers.to_jsonl import strip_null_lines

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
]
__all__ += ["read_partition", "source_of"]

PARTITION_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Partition:
    """The lines of one input that start in [start, end), in bytes, or its rows start .. end - 1,
    where it is a table.

    payload: those lines, where they cannot be read again; kind: how the file is read; strip_nulls:
    keys with null are left out; columns: of a table, those that are wanted.
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
    """One input: a file, or data in memory, for which `blocks` gives runs of whole lines of JSON,
    the same each time.

    name: what to call it; path: the file, where it is not the name; limit: records to read at most
    from all sources of the same group together; strip_nulls: leave out keys with null; columns: of
    a table, those that are wanted.
    """

    name: str
    kind: str = "lines"
    limit: int | None = None
    group: int = 0
    strip_nulls: bool = False
    blocks: Callable[[], Iterator[bytes]] | None = None
    path: str | None = None
    columns: Columns = None

    @property
    def file(self) -> str:
        """Where it is read; the name of what is in memory."""
        return self.path or self.name


@dataclass(frozen=True, slots=True)
class Kind:
    """pieces: cuts a file; read: the lines of a piece that came without them, both for the columns
    that are wanted."""

    pieces: Callable[[str, int, Columns], Iterator[Piece]]
    read: Callable[[str, int, int, Columns], bytes]


def _whole(
    pieces: Callable[[str, int], Iterator[Piece]],
) -> Callable[[str, int, Columns], Iterator[Piece]]:
    """Of what is no table, lines are read whole: taking them apart would cost more."""
    return lambda file, target, _: pieces(file, target)


def _read_lines(file: str, start: int, end: int, columns: Columns) -> bytes:
    return read_line_range(file, start, end)


KINDS: dict[str, Kind] = {
    "lines": Kind(_whole(line_pieces), _read_lines),
    "document": Kind(_whole(document_pieces), _read_lines),
    "delimited": Kind(_whole(delimited_pieces), _read_lines),
    "parquet": Kind(parquet_pieces, read_parquet_rows),
    "arrow": Kind(arrow_pieces, read_arrow_rows),
}


def source_of(file: str) -> Source:
    """A file as a source."""
    return Source(file, kind_of(file) or "lines")


def cut(inputs: Iterable[str | Source], target: int = PARTITION_BYTES) -> Iterator[Partition]:
    """Cut files and sources into partitions of about `target` bytes, in order, reading no further
    ahead than it must.

    Raises InputUnreadable.
    """
    index = 0
    left: dict[int, int] = {}
    for number, given in enumerate(inputs):
        source = source_of(given) if isinstance(given, str) else given
        if source.limit is not None and left.setdefault(source.group, source.limit) == 0:
            continue
        for whole in _pieces(source, target):
            piece = whole
            if source.limit is not None:
                piece, left[source.group] = _first_records(whole, left[source.group], source)
            yield Partition(
                index, number, source.file, *piece, source.kind, source.strip_nulls, source.columns
            )
            index += 1
            if source.limit is not None and left[source.group] == 0:
                break


def read_partition(partition: Partition) -> bytes:
    """The lines of a partition, JSON each. A line beyond LARGEST_LINE comes cut one byte after
    that. Raises InputUnreadable."""
    data = partition.payload
    if data is None:
        data = KINDS[partition.kind].read(
            partition.file, partition.start, partition.end, partition.columns
        )
    return strip_null_lines(data) if partition.strip_nulls else data


def first_lines(given: str | Source) -> Iterator[bytes]:
    """The lines of an input from its start, read as the iterator advances. Raises
    InputUnreadable."""
    source = source_of(given) if isinstance(given, str) else given
    for start, end, payload in _pieces(source, 1 << 20):
        data = (
            KINDS[source.kind].read(source.file, start, end, source.columns)
            if payload is None
            else payload
        )
        yield from data.split(b"\n")


def _pieces(source: Source, target: int) -> Iterator[Piece]:
    if source.blocks is not None:
        return _positioned(source.blocks())
    if source.limit is not None and source.kind == "lines":
        # Records can only be counted by reading them.
        return (
            (start, start + len(block), block)
            for start, block in unpacked_blocks(source.file, target)
        )
    return KINDS[source.kind].pieces(source.file, target, source.columns)


def _positioned(blocks: Iterator[bytes]) -> Iterator[Piece]:
    rows = 0
    for block in blocks:
        end = rows + block.count(b"\n")
        yield rows, end, block
        rows = end


def _first_records(piece: Piece, limit: int, source: Source) -> tuple[Piece, int]:
    """A piece cut after so many records, and how many may still come; lines that are blank are no
    records."""
    start, end, data = piece
    if data is None and source.kind in ("parquet", "arrow"):
        taken = min(end - start, limit)
        return (start, start + taken, None), limit - taken
    if data is None:
        data = KINDS[source.kind].read(source.file, start, end, source.columns)
    lines = data.split(b"\n")
    records = 0
    for number, line in enumerate(lines):
        records += bool(line.strip())
        if records == limit:
            return (start, end, b"\n".join(lines[: number + 1]) + b"\n"), 0
    return (start, end, data), limit - records

"""Arrow IPC files and streams, read batch by batch into memory and validated before use.

A map of a file that is truncated while it is read terminates the process, and the offsets of a
hostile file lead anywhere in its memory. Therefore the positions of the batches are taken from
their headers, each batch is read as a whole, and Arrow validates it in full.

Source: https://arrow.apache.org/docs/format/Columnar.html, Message.fbs and File.fbs.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from sftprep.errors import InputUnreadable

_MAGIC = b"ARROW1"
_CONTINUATION = b"\xff\xff\xff\xff"
"""Start of a message; Arrow before 0.15 did not write it."""
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


@dataclass(frozen=True, slots=True)
class Batch:
    """Where a record batch is: byte offset and length of its message, header included; its rows."""

    offset: int
    length: int
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class ArrowFile:
    """The batches of a file or stream, in order.

    first_rows: number of the first row of each batch, and at the end of all rows.
    has_dictionaries: columns refer to dictionaries in messages of their own, so that a batch cannot
    be read by itself.
    """

    path: str
    schema: Any
    batches: tuple[Batch, ...]
    first_rows: tuple[int, ...]
    has_dictionaries: bool

    def read(self, number: int) -> Any:
        """Read a batch as a `pyarrow.RecordBatch`, and validate it.

        Raises:
            pyarrow.ArrowException: it is damaged.
            InputUnreadable: the file became shorter.
        """
        import pyarrow as pa

        batch = self.batches[number]
        with open(self.path, "rb") as file:
            message = pa.ipc.read_message(pa.py_buffer(_read(file, batch.offset, batch.length)))
        return _validated(pa.ipc.read_record_batch(message, self.schema))

    def read_in_order(self) -> Iterator[Any]:
        """Yield all batches, with their dictionaries; each is read when it is asked for.

        Raises:
            pyarrow.ArrowException: a batch is damaged.
        """
        import pyarrow as pa

        with pa.OSFile(self.path) as source:
            if source.read(len(_MAGIC)) == _MAGIC:
                reader = pa.ipc.open_file(source)
                yield from (_validated(reader.get_batch(k)) for k in range(len(self.batches)))
            else:
                source.seek(0)
                yield from map(_validated, pa.ipc.open_stream(source))


def open_arrow(path: str) -> ArrowFile:
    """Find the batches of a file or stream; reads their headers only.

    Raises:
        InputUnreadable: it is neither, or damaged.
        pyarrow.ArrowException: its schema is damaged.
    """
    status = os.stat(path)
    return _open_arrow(path, status.st_size, status.st_mtime_ns)


# A file is opened for each of its partitions.
@lru_cache(maxsize=16)
def _open_arrow(path: str, size: int, _mtime: int) -> ArrowFile:
    import pyarrow as pa

    if size == 0:
        return ArrowFile(path, pa.schema([]), (), (0,), has_dictionaries=False)
    with open(path, "rb") as file:
        is_file = _read(file, 0, min(size, len(_MAGIC))) == _MAGIC
        try:
            found = _messages_of_file(file, size) if is_file else _messages_of_stream(file, size)
        except (struct.error, IndexError) as error:
            raise _damaged(path, "a header leads out of the file") from error
    with pa.OSFile(path) as source:
        schema = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).schema
    batches = tuple(batch for kind, batch in found if kind == _RECORD_BATCH)
    first_rows = tuple(accumulate((batch.rows for batch in batches), initial=0))
    has_dictionaries = any(kind == _DICTIONARY_BATCH for kind, _ in found)
    return ArrowFile(path, schema, batches, first_rows, has_dictionaries)


def _messages_of_stream(file: Any, size: int) -> list[tuple[int, Batch]]:
    """Return the kinds and positions of the messages of a stream, which ends with an end mark."""
    found = []
    at = 0
    while (message := _message_at(file, at)) is not None:
        found.append(message)
        at = message[1].offset + message[1].length
        if at >= size:
            raise _damaged(file.name, "it is cut short: the mark at the end of a stream is missing")
    end = at + (8 if _read(file, at, 4) == _CONTINUATION else 4)
    if end != size:
        raise _damaged(
            file.name,
            f"{size - end:,} bytes follow the mark at the end of the stream, as in files that were"
            " joined"
            if end < size
            else "it is cut short in the mark at the end of the stream",
        )
    return found


def _messages_of_file(file: Any, size: int) -> list[tuple[int, Batch]]:
    """Return the kinds and positions of the messages that the footer of a file lists."""
    tail = len(_MAGIC) + 4
    length, magic = struct.unpack("<i6s", _read(file, size - tail, tail))
    if magic != _MAGIC or length < 0:
        raise _damaged(file.name, "it has no footer")
    footer = _read(file, size - tail - length, length)
    root = struct.unpack_from("<I", footer)[0]
    found = []
    for field in (2, 3):  # dictionaries, record batches: vectors of (offset, metadata, body) blocks
        at = _field(footer, root, field)
        if at is None:
            continue
        start = at + struct.unpack_from("<I", footer, at)[0]
        for k in range(struct.unpack_from("<I", footer, start)[0]):
            offset, metadata, body = struct.unpack_from("<qi4xq", footer, start + 4 + 24 * k)
            message = _message_at(file, offset)
            if message is None or message[1].length != metadata + body:
                raise _damaged(file.name, "its footer does not match its batches")
            found.append(message)
    return found


def _message_at(file: Any, offset: int) -> tuple[int, Batch] | None:
    """Return the kind of the message at an offset, and where it is; None for an end mark."""
    head = 8
    mark, length = struct.unpack("<II", _read(file, offset, head, may_end=True).ljust(head, b"\0"))
    if mark != 0xFFFFFFFF:  # written before Arrow 0.15
        head, length = 4, mark
    if length == 0:
        return None
    metadata = _read(file, offset + head, length)
    root = struct.unpack_from("<I", metadata)[0]
    kind_at, header_at, body_at = (_field(metadata, root, field) for field in (1, 2, 3))
    kind = metadata[kind_at] if kind_at is not None else 0
    body = struct.unpack_from("<q", metadata, body_at)[0] if body_at is not None else 0
    rows = 0
    if kind == _RECORD_BATCH and header_at is not None:
        header = header_at + struct.unpack_from("<I", metadata, header_at)[0]
        rows_at = _field(metadata, header, 0)
        rows = struct.unpack_from("<q", metadata, rows_at)[0] if rows_at is not None else 0
    if body < 0 or not 0 <= rows < 2**31:
        raise _damaged(file.name, f"a batch claims {body:,} bytes and {rows:,} rows")
    return kind, Batch(offset, head + length + body, rows)


def _field(buffer: bytes, table: int, number: int) -> int | None:
    """Return the position of a field of a flatbuffer table, None where it has its default."""
    entries = table - struct.unpack_from("<i", buffer, table)[0]
    size = struct.unpack_from("<H", buffer, entries)[0]
    slot = 4 + 2 * number
    offset = struct.unpack_from("<H", buffer, entries + slot)[0] if slot < size else 0
    return table + offset if offset else None


def _read(file: Any, offset: int, length: int, *, may_end: bool = False) -> bytes:
    """Read bytes of a file. Raises InputUnreadable where it ends before, unless it may."""
    size = os.fstat(file.fileno()).st_size
    if offset < 0 or (offset + length > size and not may_end):
        raise _damaged(file.name, f"it ends before byte {offset + length:,}")
    parts = []
    while length > 0 and (part := os.pread(file.fileno(), min(length, 1 << 30), offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    if length > 0 and not may_end:
        raise _damaged(file.name, "it became shorter while it was read")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _validated(batch: Any) -> Any:
    batch.validate(full=True)
    return batch


def _damaged(path: str, what: str) -> InputUnreadable:
    return InputUnreadable(
        f"{path} is not an Arrow file that can be read: {what}",
        remedy="fetch or make the file again",
    )

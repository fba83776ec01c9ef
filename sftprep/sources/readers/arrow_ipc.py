"""Arrow IPC files and streams, read batch by batch into memory and validated before use.

A map of a file that is truncated while it is read terminates the process, and the offsets of a
hostile file lead anywhere in its memory. Therefore the positions of the batches are taken from
their headers, each batch is read as a whole, and Arrow validates it in full. A message that is
neither the schema nor a batch is damage: skipping it would lose the rows that it held.

Source: https://arrow.apache.org/docs/format/Columnar.html, Message.fbs, Schema.fbs and File.fbs.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from sftprep.errors import InputUnreadable
from sftprep.sources.readers.lines import open_regular

LARGEST_BATCH = 2 << 30
"""Bytes of a batch when its buffers are decompressed."""

_MAGIC = b"ARROW1"
_SCHEMA, _DICTIONARY_BATCH, _RECORD_BATCH = 1, 2, 3
_VERSIONS = (3, 4)
"""Metadata versions V4 (since Arrow 0.8) and V5 (since Arrow 1.0)."""

_CONTINUATION = b"\xff\xff\xff\xff"
_END = _CONTINUATION + b"\0\0\0\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Position and size of the message of a batch.

    offset, length: in bytes, header included; rows: of a record batch; expanded: bytes of its
    buffers when they are decompressed; values: number of values, nested ones included.
    """

    kind: int
    offset: int
    length: int
    rows: int = 0
    expanded: int = 0
    values: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class ArrowFile:
    """The batches of a file or stream, in order.

    schema_message: that of a stream, and None for a file; first_rows: number of the first row of
    each batch, and at the end of all rows; has_dictionaries: columns refer to dictionaries in
    messages of their own, so that a batch cannot be read by itself.
    """

    path: str
    schema: Any
    schema_message: bytes | None
    batches: tuple[Batch, ...]
    first_rows: tuple[int, ...]
    has_dictionaries: bool

    def read(self, number: int) -> Any:
        """Read a batch as a `pyarrow.RecordBatch`, and validate it.

        Raises:
            pyarrow.ArrowException: it is damaged.
            InputUnreadable: it is damaged, or the file became shorter.
        """
        import pyarrow as pa

        batch = self.batches[number]
        if self.schema_message is None:
            with _open_arrow_file(self.path) as reader:
                return self._validated(reader.get_batch(number), batch)
        with open_regular(self.path) as file:
            message = _read(file, batch.offset, batch.length)
        with pa.ipc.open_stream(pa.py_buffer(self.schema_message + message + _END)) as reader:
            return self._validated(reader.read_next_batch(), batch)

    def read_in_order(self) -> Iterator[Any]:
        """Yield all batches, with their dictionaries; each is read when it is asked for.

        Raises:
            pyarrow.ArrowException: a batch is damaged.
            InputUnreadable: it is damaged, or the file became shorter.
        """
        import pyarrow as pa

        if self.schema_message is None:
            with _open_arrow_file(self.path) as reader:
                for number, batch in enumerate(self.batches):
                    yield self._validated(reader.get_batch(number), batch)
            return
        with open_regular(self.path) as file, pa.ipc.open_stream(file) as reader:
            for batch in self.batches:
                yield self._validated(reader.read_next_batch(), batch)
            # Dictionaries may follow the last batch.
            if next(iter(reader), None) is not None:
                raise _damaged(self.path, "it has more batches than headers of batches")

    def _validated(self, read: Any, batch: Batch) -> Any:
        if read.num_rows != batch.rows:
            raise _damaged(
                self.path, f"a batch has {read.num_rows:,} rows, and its header says {batch.rows:,}"
            )
        read.validate(full=True)
        return read


def open_arrow(path: str) -> ArrowFile:
    """Find the batches of a file or stream; reads their headers only.

    Raises:
        InputUnreadable: it is neither, damaged or cut short, or a batch of it is too large.
        pyarrow.ArrowException: its schema is damaged.
    """
    status = os.stat(path)
    return _open_arrow(path, status.st_size, status.st_mtime_ns)


# A file is opened for each of its partitions.
@lru_cache(maxsize=16)
def _open_arrow(path: str, size: int, _mtime: int) -> ArrowFile:
    import pyarrow as pa

    with open_regular(path) as file:
        if size == 0:
            return ArrowFile(path, pa.schema([]), None, (), (0,), has_dictionaries=False)
        is_file = _read(file, 0, min(size, len(_MAGIC))) == _MAGIC
        try:
            if is_file:
                schema_message, found = None, _messages_of_file(file, size)
            else:
                schema_message, found = _messages_of_stream(file, size)
        except (struct.error, IndexError, ValueError) as error:
            raise _damaged(path, "a header leads out of the file") from error
    if schema_message is None:
        with _open_arrow_file(path) as reader:
            schema, listed = reader.schema, reader.num_record_batches
    else:
        with pa.ipc.open_stream(pa.py_buffer(schema_message + _END)) as reader:
            schema, listed = reader.schema, None
    batches = tuple(batch for batch in found if batch.kind == _RECORD_BATCH)
    if listed not in (None, len(batches)):
        raise _damaged(path, "its footer does not match its batches")
    first_rows = tuple(accumulate((batch.rows for batch in batches), initial=0))
    has_dictionaries = len(batches) < len(found)
    return ArrowFile(path, schema, schema_message, batches, first_rows, has_dictionaries)


@contextmanager
def _open_arrow_file(path: str) -> Iterator[Any]:
    import pyarrow as pa

    with open_regular(path) as file, pa.ipc.open_file(file) as reader:
        yield reader


def _messages_of_stream(file: Any, size: int) -> tuple[bytes, list[Batch]]:
    """Return the message of the schema, and the batches up to the end of the stream."""
    schema = _message_at(file, 0)
    if schema is None or schema.kind != _SCHEMA:
        raise _damaged(file.name, "it does not start with a schema")
    found = []
    at = schema.length
    while (message := _message_at(file, at)) is not None:
        if message.kind == _SCHEMA:
            raise _damaged(file.name, f"a second schema follows at byte {at:,}")
        found.append(message)
        at += message.length
    # The mark of the end was shorter before Arrow 0.15.
    at += len(_END) if _read(file, at, 4) == _CONTINUATION else 4
    if at != size:
        raise _damaged(file.name, f"{size - at:,} bytes follow the end of its stream")
    return _read(file, 0, schema.length), found


def _messages_of_file(file: Any, size: int) -> list[Batch]:
    """Return the batches that the footer of a file lists, dictionaries first."""
    tail = len(_MAGIC) + 4
    length, magic = struct.unpack("<i6s", _read(file, size - tail, tail))
    if magic != _MAGIC or length < 0:
        raise _damaged(file.name, "it has no footer")
    footer = _read(file, size - tail - length, length)
    root = struct.unpack_from("<I", footer)[0]
    found = {}
    # Vectors of blocks: offset, bytes of metadata, bytes of the body.
    for field, kind in ((2, _DICTIONARY_BATCH), (3, _RECORD_BATCH)):
        at = _field(footer, root, field)
        if at is None:
            continue
        start = at + struct.unpack_from("<I", footer, at)[0]
        for k in range(struct.unpack_from("<I", footer, start)[0]):
            offset, metadata, body = struct.unpack_from("<qi4xq", footer, start + 4 + 24 * k)
            message = _message_at(file, offset)
            if message is None or message.length != metadata + body or message.kind != kind:
                raise _damaged(file.name, "its footer does not match its batches")
            if offset in found:
                raise _damaged(file.name, "its footer lists a batch twice")
            found[offset] = message
    _refuse_unlisted(file, found)
    return list(found.values())


def _refuse_unlisted(file: Any, listed: dict[int, Batch]) -> None:
    """Raise InputUnreadable where a batch follows the others that the footer does not list.

    Most writers put the messages one after the other, behind a schema; where there is something
    else between them, the footer alone counts.
    """
    at = 8
    while True:
        try:
            message = listed.get(at) or _message_at(file, at)
        except (InputUnreadable, struct.error, IndexError, ValueError):
            return
        if message is None:
            return
        if message.kind != _SCHEMA and at not in listed:
            raise _damaged(file.name, f"its footer does not list the batch at byte {at:,}")
        at += message.length


def _message_at(file: Any, offset: int) -> Batch | None:
    """Return the message at an offset; None for the mark of the end."""
    start = _read(file, offset, 4)
    # Before Arrow 0.15 a message began with its length.
    head = 8 if start == _CONTINUATION else 4
    length = struct.unpack("<I", _read(file, offset + head - 4, 4))[0]
    if length == 0:
        return None
    metadata = _read(file, offset + head, length)
    root = struct.unpack_from("<I", metadata)[0]
    version_at, kind_at, header_at, body_at = (_field(metadata, root, field) for field in range(4))
    version = struct.unpack_from("<h", metadata, version_at)[0] if version_at is not None else 0
    kind = metadata[kind_at] if kind_at is not None else 0
    body = struct.unpack_from("<q", metadata, body_at)[0] if body_at is not None else 0
    if version not in _VERSIONS or kind not in (_SCHEMA, _DICTIONARY_BATCH, _RECORD_BATCH):
        raise _damaged(
            file.name, f"byte {offset:,} starts a message of kind {kind}, version {version}"
        )
    if header_at is None or body < 0:
        raise _damaged(file.name, f"a message claims {body:,} bytes")
    message = {"kind": kind, "offset": offset, "length": head + length + body}
    _read(file, offset + message["length"], 0)  # the message ends within the file
    header = header_at + struct.unpack_from("<I", metadata, header_at)[0]
    if kind == _DICTIONARY_BATCH:
        data_at = _field(metadata, header, 1)
        if data_at is None:
            raise _damaged(file.name, "a dictionary has no values")
        header = data_at + struct.unpack_from("<I", metadata, data_at)[0]
    if kind != _SCHEMA:
        message |= _sizes_of_batch(file, metadata, header, offset + head + length)
    return Batch(**message)


def _sizes_of_batch(file: Any, metadata: bytes, table: int, body: int) -> dict[str, int]:
    """Return the rows, values and bytes of a batch whose buffers start at `body`.

    A compressed buffer starts with its length when it is decompressed; -1 stands for a buffer that
    is not compressed.
    """
    rows_at, nodes_at, buffers_at, compression_at = (
        _field(metadata, table, field) for field in range(4)
    )
    rows = struct.unpack_from("<q", metadata, rows_at)[0] if rows_at is not None else 0
    nodes, buffers = _pairs(metadata, nodes_at), _pairs(metadata, buffers_at)
    if not 0 <= rows < 2**31 or (nodes < 0).any() or (buffers < 0).any():
        raise _damaged(file.name, f"a batch claims {rows:,} rows")
    expanded = sum(buffers[:, 1].tolist())
    if compression_at is not None:
        expanded = 0
        for start, length in buffers.tolist():
            if length >= 8:
                declared = struct.unpack("<q", _read(file, body + start, 8))[0]
                expanded += length - 8 if declared < 0 else declared
    if expanded > LARGEST_BATCH:
        raise InputUnreadable(
            f"{file.name} has a batch of {expanded:,} bytes, and {LARGEST_BATCH:,} are the limit",
            remedy="write the file again with fewer rows in each batch",
        )
    values = sum(nodes[:, 0].tolist())
    return {"rows": rows, "expanded": expanded, "values": values}


def _pairs(metadata: bytes, at: int | None) -> Any:
    """Return a vector of structs of two integers: int64 [n, 2]."""
    if at is None:
        return np.empty((0, 2), np.int64)
    start = at + struct.unpack_from("<I", metadata, at)[0]
    count = struct.unpack_from("<I", metadata, start)[0]
    return np.frombuffer(metadata, "<i8", 2 * count, start + 4).reshape(-1, 2)


def _field(buffer: bytes, table: int, number: int) -> int | None:
    """Return the position of a field of a flatbuffer table, None where it has its default."""
    entries = table - struct.unpack_from("<i", buffer, table)[0]
    size = struct.unpack_from("<H", buffer, entries)[0]
    slot = 4 + 2 * number
    offset = struct.unpack_from("<H", buffer, entries + slot)[0] if slot < size else 0
    return table + offset if offset else None


def _read(file: Any, offset: int, length: int) -> bytes:
    """Read bytes of a file. Raises InputUnreadable where it ends before."""
    size = os.fstat(file.fileno()).st_size
    if offset < 0 or offset + length > size:
        raise _damaged(file.name, f"it ends before byte {offset + max(length, 1):,}")
    parts = []
    while length > 0 and (part := os.pread(file.fileno(), min(length, 1 << 30), offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    if length > 0:
        raise _damaged(file.name, "it became shorter while it was read")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _damaged(path: str, what: str) -> InputUnreadable:
    return InputUnreadable(
        f"{path} is not an Arrow file that can be read: {what}",
        remedy="fetch or make the file again",
    )

"""Arrow IPC files and streams, validated and read batch by batch into memory.

Memory-mapping is not safe here: a mapped file that is truncated while it is read terminates the
process (SIGBUS), and the offsets in a malicious file can point anywhere in the memory of the
process. Therefore:

1. The headers of the messages are parsed, which gives the position and size of each batch.
2. A batch is read into memory as a whole.
3. Arrow validates it in full before any value is used.

A message that is neither the schema nor a batch is treated as damage: skipping it could lose rows
without notice. The tests compare the result with `pyarrow.ipc` on files with flipped bits.

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
"""The largest size of a batch in bytes, decompressed: a small file may claim terabytes."""

_MAGIC = b"ARROW1"
_SCHEMA, _DICTIONARY_BATCH, _RECORD_BATCH = 1, 2, 3
_VERSIONS = (3, 4)
"""Metadata versions V4 (since Arrow 0.8) and V5 (since Arrow 1.0)."""

_CONTINUATION = b"\xff\xff\xff\xff"
_END = _CONTINUATION + b"\0\0\0\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The position and size of a message.

    Attributes:
        kind: `_SCHEMA`, `_DICTIONARY_BATCH` or `_RECORD_BATCH`.
        offset: The position of its header in the file, in bytes.
        length: The size of header and body, in bytes.
        rows: The number of rows of a record batch.
        expanded: The size of its buffers in bytes, decompressed.
        values: The number of values, nested ones included.
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

    Attributes:
        path: The path of the file.
        schema: The `pyarrow.Schema`.
        schema_message: The message with the schema of a stream; None for a file.
        batches: The record batches.
        first_rows: The number of the first row of each batch, and at the end the number of all
            rows.
        has_dictionaries: Whether columns refer to dictionaries in separate messages, so that a
            batch cannot be read without the earlier ones.
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
            pyarrow.ArrowException: The batch is damaged.
            InputUnreadable: The batch is damaged, or the file became shorter.
        """
        import pyarrow as pa

        batch = self.batches[number]
        if self.schema_message is None:
            with _open_arrow_file(self.path) as reader:
                return self._validate(reader.get_batch(number), batch)
        with open_regular(self.path) as file:
            message = _read_bytes(file, batch.offset, batch.length)
        # A stream of one batch, in memory: the schema, the batch and the end mark.
        with pa.ipc.open_stream(pa.py_buffer(self.schema_message + message + _END)) as reader:
            return self._validate(reader.read_next_batch(), batch)

    def read_in_order(self) -> Iterator[Any]:
        """Yield all batches with their dictionaries, read as the iterator advances.

        Raises:
            pyarrow.ArrowException: A batch is damaged.
            InputUnreadable: A batch is damaged, or the file became shorter.
        """
        import pyarrow as pa

        if self.schema_message is None:
            with _open_arrow_file(self.path) as reader:
                for number, batch in enumerate(self.batches):
                    yield self._validate(reader.get_batch(number), batch)
            return
        with open_regular(self.path) as file, pa.ipc.open_stream(file) as reader:
            for batch in self.batches:
                yield self._validate(reader.read_next_batch(), batch)
            # Dictionaries may follow the last batch.
            if next(iter(reader), None) is not None:
                raise _damaged_file(self.path, "it has more batches than headers of batches")

    def _validate(self, read: Any, batch: Batch) -> Any:
        if read.num_rows != batch.rows:
            raise _damaged_file(
                self.path, f"a batch has {read.num_rows:,} rows, and its header says {batch.rows:,}"
            )
        read.validate(full=True)
        return read


def open_arrow(path: str) -> ArrowFile:
    """Find the batches of an Arrow file or stream, reading only their headers.

    Raises:
        InputUnreadable: The file is not an Arrow file, is damaged or cut short, or has a batch
            that is too large.
        pyarrow.ArrowException: Its schema is damaged.
    """
    status = os.stat(path)
    return _open_arrow(path, status.st_size, status.st_mtime_ns)


# A file is opened for each of its partitions. Size and modification time are part of the key, so
# that a file that was changed is read again.
@lru_cache(maxsize=16)
def _open_arrow(path: str, size: int, _mtime: int) -> ArrowFile:
    import pyarrow as pa

    with open_regular(path) as file:
        if size == 0:
            return ArrowFile(path, pa.schema([]), None, (), (0,), has_dictionaries=False)
        is_file = _read_bytes(file, 0, min(size, len(_MAGIC))) == _MAGIC
        try:
            if is_file:
                schema_message, found = None, _read_footer(file, size)
            else:
                schema_message, found = _read_stream_headers(file, size)
        except (struct.error, IndexError, ValueError) as error:
            raise _damaged_file(path, "an offset in a header points outside of the file") from error
    if schema_message is None:
        with _open_arrow_file(path) as reader:
            schema, listed = reader.schema, reader.num_record_batches
    else:
        with pa.ipc.open_stream(pa.py_buffer(schema_message + _END)) as reader:
            schema, listed = reader.schema, None
    batches = tuple(batch for batch in found if batch.kind == _RECORD_BATCH)
    if listed not in (None, len(batches)):
        raise _damaged_file(path, "its footer does not match its batches")
    first_rows = tuple(accumulate((batch.rows for batch in batches), initial=0))
    has_dictionaries = len(batches) < len(found)
    return ArrowFile(path, schema, schema_message, batches, first_rows, has_dictionaries)


@contextmanager
def _open_arrow_file(path: str) -> Iterator[Any]:
    import pyarrow as pa

    with open_regular(path) as file, pa.ipc.open_file(file) as reader:
        yield reader


def _read_stream_headers(file: Any, size: int) -> tuple[bytes, list[Batch]]:
    """Return the message of the schema, and the batches up to the end of the stream.

    The stream must end with its end mark, because a stream that was cut off between two batches
    would otherwise be accepted with fewer rows.
    """
    schema = _read_message(file, 0)
    if schema is None or schema.kind != _SCHEMA:
        raise _damaged_file(file.name, "it does not start with a schema")
    found = []
    offset = schema.length
    while (message := _read_message(file, offset)) is not None:
        if message.kind == _SCHEMA:
            raise _damaged_file(file.name, f"a second schema follows at byte {offset:,}")
        found.append(message)
        offset += message.length
    # The end mark was shorter before Arrow 0.15.
    offset += len(_END) if _read_bytes(file, offset, 4) == _CONTINUATION else 4
    if offset != size:
        raise _damaged_file(file.name, f"{size - offset:,} bytes follow the end of its stream")
    return _read_bytes(file, 0, schema.length), found


def _read_footer(file: Any, size: int) -> list[Batch]:
    """Return the batches listed in the footer of a file, dictionaries first."""
    tail = len(_MAGIC) + 4
    length, magic = struct.unpack("<i6s", _read_bytes(file, size - tail, tail))
    if magic != _MAGIC or length < 0:
        raise _damaged_file(file.name, "it has no footer")
    footer = _read_bytes(file, size - tail - length, length)
    root = struct.unpack_from("<I", footer)[0]
    found = {}
    # Two vectors of blocks; a block is an offset, the size of the metadata and that of the body.
    for field, kind in ((2, _DICTIONARY_BATCH), (3, _RECORD_BATCH)):
        vector = _field_position(footer, root, field)
        if vector is None:
            continue
        start = vector + struct.unpack_from("<I", footer, vector)[0]
        for k in range(struct.unpack_from("<I", footer, start)[0]):
            offset, metadata, body = struct.unpack_from("<qi4xq", footer, start + 4 + 24 * k)
            message = _read_message(file, offset)
            if message is None or message.length != metadata + body or message.kind != kind:
                raise _damaged_file(file.name, "its footer does not match its batches")
            if offset in found:
                raise _damaged_file(file.name, "its footer lists a batch twice")
            found[offset] = message
    _reject_unlisted(file, found)
    return list(found.values())


def _reject_unlisted(file: Any, listed: dict[int, Batch]) -> None:
    """Raise InputUnreadable if a batch is missing in the footer.

    Most writers put the messages one after the other, behind a schema. The search ends where
    something else is between them; then the footer alone counts.
    """
    offset = 8  # the magic bytes, padded
    while True:
        try:
            message = listed.get(offset) or _read_message(file, offset)
        except (InputUnreadable, struct.error, IndexError, ValueError):
            return
        if message is None:
            return
        if message.kind != _SCHEMA and offset not in listed:
            raise _damaged_file(file.name, f"its footer does not list the batch at byte {offset:,}")
        offset += message.length


def _read_message(file: Any, offset: int) -> Batch | None:
    """Return the message at an offset, or None for the end mark."""
    # 1. The prefix: a continuation marker and the length of the metadata. Before Arrow 0.15 a
    # message started with the length.
    start = _read_bytes(file, offset, 4)
    head = 8 if start == _CONTINUATION else 4
    length = struct.unpack("<I", _read_bytes(file, offset + head - 4, 4))[0]
    if length == 0:
        return None
    # 2. The metadata, a flatbuffer table `Message`: version, kind, header and size of the body.
    metadata = _read_bytes(file, offset + head, length)
    root = struct.unpack_from("<I", metadata)[0]
    version_at, kind_at, header_at, body_at = (
        _field_position(metadata, root, field) for field in range(4)
    )
    version = struct.unpack_from("<h", metadata, version_at)[0] if version_at is not None else 0
    kind = metadata[kind_at] if kind_at is not None else 0
    body = struct.unpack_from("<q", metadata, body_at)[0] if body_at is not None else 0
    if version not in _VERSIONS or kind not in (_SCHEMA, _DICTIONARY_BATCH, _RECORD_BATCH):
        raise _damaged_file(
            file.name,
            f"the message at byte {offset:,} has the kind {kind} and the version {version}",
        )
    if header_at is None or body < 0:
        raise _damaged_file(file.name, f"a message claims {body:,} bytes")
    message = {"kind": kind, "offset": offset, "length": head + length + body}
    _read_bytes(file, offset + message["length"], 0)  # checks that the file contains the message
    # 3. The header of the batch; that of a dictionary contains it as a field.
    header = header_at + struct.unpack_from("<I", metadata, header_at)[0]
    if kind == _DICTIONARY_BATCH:
        data_at = _field_position(metadata, header, 1)
        if data_at is None:
            raise _damaged_file(file.name, "a dictionary has no values")
        header = data_at + struct.unpack_from("<I", metadata, data_at)[0]
    if kind != _SCHEMA:
        message |= _read_batch_sizes(file, metadata, header, offset + head + length)
    return Batch(**message)


def _read_batch_sizes(file: Any, metadata: bytes, table: int, body: int) -> dict[str, int]:
    """Return the rows, values and decompressed bytes of a batch.

    Args:
        file: The open file.
        metadata: The metadata of the message.
        table: The position of the header of the batch in it.
        body: The position of the buffers in the file.
    """
    rows_at, nodes_at, buffers_at, compression_at = (
        _field_position(metadata, table, field) for field in range(4)
    )
    rows = struct.unpack_from("<q", metadata, rows_at)[0] if rows_at is not None else 0
    nodes, buffers = _read_pairs(metadata, nodes_at), _read_pairs(metadata, buffers_at)
    if not 0 <= rows < 2**31 or (nodes < 0).any() or (buffers < 0).any():
        raise _damaged_file(file.name, f"a batch claims {rows:,} rows")
    expanded = sum(buffers[:, 1].tolist())
    if compression_at is not None:
        # A compressed buffer starts with its decompressed length; -1 means that this buffer is not
        # compressed.
        expanded = 0
        for start, length in buffers.tolist():
            if length >= 8:
                declared = struct.unpack("<q", _read_bytes(file, body + start, 8))[0]
                expanded += length - 8 if declared < 0 else declared
    if expanded > LARGEST_BATCH:
        raise InputUnreadable(
            f"{file.name} has a batch of {expanded:,} bytes; the limit is {LARGEST_BATCH:,}",
            remedy="write the file again with fewer rows in each batch",
        )
    values = sum(nodes[:, 0].tolist())
    return {"rows": rows, "expanded": expanded, "values": values}


def _read_pairs(metadata: bytes, position: int | None) -> Any:
    """Return a vector of structs of two integers: int64 [n, 2]."""
    if position is None:
        return np.empty((0, 2), np.int64)
    start = position + struct.unpack_from("<I", metadata, position)[0]
    count = struct.unpack_from("<I", metadata, start)[0]
    return np.frombuffer(metadata, "<i8", 2 * count, start + 4).reshape(-1, 2)


def _field_position(buffer: bytes, table: int, number: int) -> int | None:
    """Return the position of a field of a flatbuffer table, or None for its default."""
    # The table starts with the distance to its vtable, which has the offset of each field.
    entries = table - struct.unpack_from("<i", buffer, table)[0]
    size = struct.unpack_from("<H", buffer, entries)[0]
    slot = 4 + 2 * number
    offset = struct.unpack_from("<H", buffer, entries + slot)[0] if slot < size else 0
    return table + offset if offset else None


def _read_bytes(file: Any, offset: int, length: int) -> bytes:
    """Read bytes of a file. Raises InputUnreadable where the file is too short."""
    size = os.fstat(file.fileno()).st_size
    if offset < 0 or offset + length > size:
        raise _damaged_file(file.name, f"it ends before byte {offset + max(length, 1):,}")
    # A single call reads at most 2 GiB on Linux.
    parts = []
    file.seek(offset)
    while length > 0 and (part := file.read(min(length, 1 << 30))):
        parts.append(part)
        length -= len(part)
    if length > 0:
        raise _damaged_file(file.name, "it became shorter while it was being read")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _damaged_file(path: str, what: str) -> InputUnreadable:
    return InputUnreadable(
        f"{path} is not a valid Arrow file: {what}",
        remedy="download or create the file again",
    )

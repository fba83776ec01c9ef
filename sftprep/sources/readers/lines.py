"""Files of lines: opened, decompressed, and read in runs of whole lines."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from sftprep.config.validation import is_url
from sftprep.core.chunking import in_groups
from sftprep.core.regular_files import NotRegularError, open_regular_file
from sftprep.errors import InputChanged, InputUnreadable, source_name
from sftprep.stores.folder import size_of_object
from sftprep.stores.range_file import least_size, open_object

LARGEST_LINE = 64 * 1024 * 1024
"""Longer lines, in bytes, are rejected and never held in memory as a whole."""

FilePart = tuple[int, int, "bytes | None"]
"""The start and end of a part of a file, in bytes or rows, and its lines where workers cannot read
them themselves."""

LINE_AHEAD = 64 << 10
"""Bytes that are read of an object after a range, for the end of the last line in it."""
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def plain_size(file: str) -> int | None:
    """Return the size of a file of lines in bytes; None if it is compressed.

    Raises:
        InputUnreadable: The file was removed, or is not accessible.
    """
    return None if compression(file) else file_size(file)


def line_parts(file: str, target: int) -> Iterator[FilePart]:
    """Yield the parts of a file of lines, of about `target` bytes each.

    A compressed file is read as the iterator advances, and its parts have a payload.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    if compression(file):
        for start, block in unpacked_blocks(file, target):
            yield start, start + len(block), block
    else:
        size = file_size(file)
        with convert_os_errors(file):
            reject_other_kinds(file)
        for start in range(0, size, target):
            yield start, min(start + target, size), None


def read_line_range(file: str, start: int, end: int) -> bytes:
    """Return the whole lines with a start in [start, end).

    A line longer than LARGEST_LINE is cut off one byte after that limit.

    Raises:
        InputChanged: The file is shorter than `end`.
        InputUnreadable: The file cannot be read.

    Example:
        The file has the lines "aaa", "bbb" and "ccc". Range [2, 6) -> b"bbb\\n".
    """
    return locate_lines(file, start, end)[1]


def locate_lines(file: str, start: int, end: int) -> tuple[int, bytes]:
    """Return the position of the first line of a range, and the lines of the range.

    See `read_line_range`.
    """
    # Of an object, one request reads the range, and usually the rest of its last line.
    read_ahead = end - start + LINE_AHEAD
    with convert_os_errors(file), open_regular(file, read_ahead=read_ahead) as stream:
        # A line that starts at `start` is part of the range: the newline before it is searched.
        begin = 0 if start == 0 else _find_line_start(stream, start - 1, end - 1)
        if begin is None:
            begin, data = end, b""
        else:
            stream.seek(begin)
            data = stream.read(end - begin)
            data = data if data.endswith(b"\n") else data + _read_rest_of_line(stream, data)
        # The size is checked after the reading: what was read before is complete then.
        size = least_size(stream) if is_url(file) else os.fstat(stream.fileno()).st_size
        reject_shorter(file, size, end)
        return begin, data


def reject_shorter(file: str, size: int, size_before: int) -> None:
    """Reject a file shorter than before.

    Args:
        file: Its path.
        size: Its size in bytes.
        size_before: An earlier size, or a position that it reached.

    Raises:
        InputChanged: The file is shorter.
    """
    if size < size_before:
        raise InputChanged(
            f"{source_name(file)} became shorter while it was being read: it has {size:,} bytes,"
            f" and had {size_before:,} or more before",
            remedy="run the command again when no other process writes to the file",
        )


def unpacked_blocks(file: str, target: int) -> Iterator[tuple[int, bytes]]:
    """Yield runs of whole lines of about `target` decompressed bytes, with positions.

    Run k has the lines that start in the bytes [k * target, (k + 1) * target), so the runs of a
    compressed file are the parts of the plain file. A run is empty if a line covers all of it. A
    line longer than LARGEST_LINE is cut off one byte after that limit, in a run of its own.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    return whole_lines(unpacked_chunks(file, target))


def whole_lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield runs of whole lines of chunks, with positions, as `unpacked_blocks` does.

    Args:
        chunks: The chunks, and b"" at the end.
    """
    position, pending = 0, b""  # the position of the first byte of `pending`
    num_open = 0  # runs that have begun: that of `pending`, and those that its last line covers
    in_cut_line = False  # whether the next bytes are the rest of a line that was cut off
    for chunk in chunks:
        following = chunk
        if in_cut_line:
            rest, newline, following = chunk.partition(b"\n")
            position += len(rest) + len(newline)
            in_cut_line = not newline
        elif pending and not pending.endswith(b"\n"):
            line_end = chunk.find(b"\n") + 1
            pending, following = pending + chunk[:line_end], chunk[line_end:]
            if chunk and not line_end:
                pending, num_open = pending + chunk, num_open + 1
                line_start = pending.rfind(b"\n") + 1
                if len(pending) - line_start > LARGEST_LINE:
                    if line_start:
                        yield position, pending[:line_start]
                    yield position + line_start, pending[line_start:][: LARGEST_LINE + 1]
                    position, pending, in_cut_line = position + len(pending), b"", True
                    num_open = 0
                continue
        for number in range(num_open):
            yield (position, pending) if not number else (position + len(pending), b"")
        position, pending, num_open = position + len(pending), following, 1


def unpacked_chunks(file: str, target: int) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in chunks, and b"" at its end.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    with open_input(file) as stream:
        yield from chunks_of(stream, file, target)


def chunks_of(stream: BinaryIO, name: str, size: int) -> Iterator[bytes]:
    """Yield the bytes of a stream in chunks, and b"" at its end.

    Args:
        stream: The stream.
        name: Its name, for errors.
        size: The size of a chunk in bytes.

    Raises:
        InputUnreadable: It is damaged.
    """
    position = 0
    while True:
        try:
            chunk = stream.read(size)
        except OSError as error:
            raise InputUnreadable(
                f"{name} is damaged or cut short: {error.strerror or error}, after {position:,}"
                " bytes",
                remedy="download or create the file again",
            ) from error
        position += len(chunk)
        yield chunk
        if not chunk:
            return


def open_input(file: str) -> BinaryIO:
    """Open a file for reading, decompressed.

    Raises:
        InputUnreadable: It cannot be opened, or it is of another kind than its name says.
    """
    import pyarrow as pa

    with convert_os_errors(file):
        reject_other_kinds(file)
        kind = compression(file)
        if kind is None:
            return open_regular(file)
        # pyarrow is a dependency already, and decompresses both formats.
        stream: BinaryIO = pa.CompressedInputStream(pa.PythonFile(open_regular(file), "r"), kind)
        return stream


def open_regular(file: str, *, read_ahead: int = 8 << 20) -> BinaryIO:
    """Open a file for reading without blocking.

    An input may have been replaced by a named pipe, and opening that would wait for a writer.

    Args:
        file: The path, or the URL of an object.
        read_ahead: The least number of bytes of a request for an object.

    Raises:
        InputUnreadable: It is not a regular file.
        OSError: It cannot be opened.
    """
    if is_url(file):
        return open_object(file, read_ahead=read_ahead)
    try:
        return open_regular_file(file)
    except NotRegularError as error:
        raise InputUnreadable(
            f"cannot read {file}: {error.strerror}",
            remedy="use a regular file: first write the content of a pipe or device to one",
        ) from error


_SIGNATURES: dict[bytes, tuple[str, str]] = {
    b"\x1f\x8b": ("compressed with gzip", "its name must end in .gz: mv {0} {0}.gz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "its name must end in .zst: mv {0} {0}.zst"),
    b"PAR1": ("in Parquet format", "its name must end in .parquet: mv {0} {0}.parquet"),
    b"ARROW1": ("in Arrow format", "its name must end in .arrow: mv {0} {0}.arrow"),
    b"PK\x03\x04": ("a zip archive (such as an Excel file)", "unpack it, or export it as CSV"),
}
"""The first bytes of files that are not text -> what the file is, and the remedy."""


def reject_other_kinds(file: str) -> None:
    """Reject a file with the signature of another kind than its name says.

    Raises:
        InputUnreadable: It has one.
        OSError: It cannot be opened.
    """
    with open_regular(file, read_ahead=LINE_AHEAD) as raw:
        start = raw.read(8)
    # Both byte orders. Windows programs write UTF-16, and every line of it would be a bad record.
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputUnreadable(
            f"{file} is UTF-16",
            remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {file} > {file}.utf8.jsonl",
        )
    for signature, (what, remedy) in _SIGNATURES.items():
        if start.startswith(signature) and not what.endswith(str(compression(file))):
            raise InputUnreadable(
                f"{file} is {what}, but its name does not say so", remedy=remedy.format(file)
            )


def compression(file: str) -> str | None:
    """Return the compression implied by a file name, in pyarrow's terms."""
    return COMPRESSION.get(os.path.splitext(file)[1])


@contextmanager
def convert_os_errors(file: str) -> Iterator[None]:
    """Raise an OSError of the enclosed code as InputUnreadable for the file."""
    try:
        yield
    except OSError as error:
        raise InputUnreadable(
            f"cannot read {file}: {error.strerror or error}",
            remedy="check that the file exists and that you may read it",
        ) from error


def file_size(file: str) -> int:
    """Return the size of a file in bytes.

    Raises:
        InputUnreadable: It does not exist any more, or may not be accessed.
    """
    with convert_os_errors(file):
        return size_of_object(file) if is_url(file) else os.path.getsize(file)


def _find_line_start(file: BinaryIO, first: int, last: int) -> int | None:
    """Return the position after the first newline in [first, last), or None."""
    file.seek(first)
    position = first
    while position < last:
        chunk = file.read(min(1 << 20, last - position))
        newline = chunk.find(b"\n")
        if newline >= 0:
            return position + newline + 1
        if not chunk:
            return None
        position += len(chunk)
    return None


def _read_rest_of_line(file: BinaryIO, data: bytes) -> bytes:
    """Read the rest of the last line of `data`, up to one byte after LARGEST_LINE."""
    available = LARGEST_LINE + 1 - (len(data) - (data.rfind(b"\n") + 1))
    return file.readline(available) if available > 0 else b""


def join_to_size(parts: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the parts, joined to at least `size` bytes each.

    Only consecutive parts are joined.
    """
    return map(b"".join, in_groups(parts, size))

"""Files of lines: opened, unpacked, and read in runs of whole lines."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from sftprep.core.chunking import in_groups
from sftprep.core.regular_files import NotRegularError, open_regular_file
from sftprep.errors import InputChanged, InputUnreadable

LARGEST_LINE = 64 * 1024 * 1024
"""Bytes; longer lines are rejected, and never held in memory whole."""

Piece = tuple[int, int, "bytes | None"]
"""Where a partition starts and ends, in bytes or rows, and its lines where workers cannot read them
by themselves."""

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def line_pieces(file: str, target: int) -> Iterator[Piece]:
    """A file of lines in pieces of about `target` bytes; a compressed one is read as the iterator
    advances."""
    if compression(file):
        for start, block in unpacked_blocks(file, target):
            yield start, start + len(block), block
    else:
        size = file_size(file)
        with unreadable(file):
            _refuse_other_kinds(file)
        for start in range(0, size, target):
            yield start, min(start + target, size), None


def read_line_range(file: str, start: int, end: int) -> bytes:
    """The whole lines that start in [start, end). A line beyond LARGEST_LINE comes cut one byte
    after that. Raises InputChanged where the file is shorter than `end`."""
    return locate_lines(file, start, end)[1]


def locate_lines(file: str, start: int, end: int) -> tuple[int, bytes]:
    """As `read_line_range`, and before it the position of the first of the lines."""
    with unreadable(file), open_regular(file) as stream:
        begin = 0 if start == 0 else _line_start(stream, start - 1, end - 1)
        if begin is None:
            begin, data = end, b""
        else:
            stream.seek(begin)
            data = stream.read(end - begin)
            data = data if data.endswith(b"\n") else data + _rest_of_line(stream, data)
        # After the reading: what was read before is complete then.
        reject_shorter(file, os.fstat(stream.fileno()).st_size, end)
        return begin, data


def reject_shorter(file: str, size: int, size_before: int) -> None:
    """Raise InputChanged where a file has fewer bytes than it had before."""
    if size < size_before:
        raise InputChanged(
            f"{file} became shorter while it was read: it has {size:,} bytes, and had"
            f" {size_before:,} or more",
            remedy="run the command again when nothing writes to the file",
        )


def unpacked_blocks(file: str, target: int) -> Iterator[tuple[int, bytes]]:
    """Yield runs of whole lines of about `target` unpacked bytes, with the position of the first.

    A line beyond LARGEST_LINE comes cut one byte after that, in a run of its own.
    """
    position, pending = 0, b""
    in_cut_line = False  # the line of which the start was yielded goes on
    for chunk in unpacked_chunks(file, target):
        at_end = not chunk
        if in_cut_line:
            rest, newline, following = chunk.partition(b"\n")
            position += len(rest) + len(newline)
            in_cut_line = not newline
        else:
            following = chunk
        pending += following
        last = len(pending) if at_end else pending.rfind(b"\n") + 1
        if last:
            yield position, pending[:last]
            position, pending = position + last, pending[last:]
        if len(pending) > LARGEST_LINE:
            yield position, pending[: LARGEST_LINE + 1]
            position, pending, in_cut_line = position + len(pending), b"", True


def unpacked_chunks(file: str, target: int) -> Iterator[bytes]:
    """The unpacked bytes of a file in chunks of `target`, and an empty one at its end. Raises
    InputUnreadable."""
    position = 0
    with open_input(file) as stream:
        while True:
            try:
                chunk = stream.read(target)
            except OSError as error:
                raise InputUnreadable(
                    f"{file} is damaged or cut short: {error.strerror or error}, after {position:,}"
                    " bytes",
                    remedy="fetch or make the file again",
                ) from error
            position += len(chunk)
            yield chunk
            if not chunk:
                return


def open_input(file: str) -> BinaryIO:
    """Open a file for reading, unpacked. Raises InputUnreadable where it cannot be opened, or is of
    a kind that its name does not tell."""
    import pyarrow as pa

    with unreadable(file):
        _refuse_other_kinds(file)
        kind = compression(file)
        if kind is None:
            return open_regular(file)
        stream: BinaryIO = pa.CompressedInputStream(pa.PythonFile(open_regular(file), "r"), kind)
        return stream


def open_regular(file: str) -> BinaryIO:
    """Open a file for reading without waiting: an input may have been replaced by a named pipe.

    Raises:
        InputUnreadable: it is not a regular file.
        OSError: it cannot be opened.
    """
    try:
        return open_regular_file(file)
    except NotRegularError as error:
        raise InputUnreadable(
            f"cannot read {file}: {error.strerror}",
            remedy="give a regular file: write what a pipe or device gives to one first",
        ) from error


_BEGINNINGS: dict[bytes, tuple[str, str]] = {
    b"\x1f\x8b": ("packed with gzip", "its name has to end in .gz: mv {0} {0}.gz"),
    b"\x28\xb5\x2f\xfd": ("packed with zstd", "its name has to end in .zst: mv {0} {0}.zst"),
    b"PAR1": ("Parquet", "its name has to end in .parquet: mv {0} {0}.parquet"),
    b"ARROW1": ("Arrow", "its name has to end in .arrow: mv {0} {0}.arrow"),
    b"PK\x03\x04": ("a zip archive (as are Excel's files)", "unpack it, or export it as CSV"),
}
"""How files that are no text start: what they are, and what to do."""


def _refuse_other_kinds(file: str) -> None:
    with open_regular(file) as raw:
        start = raw.read(8)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputUnreadable(
            f"{file} is UTF-16",
            remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {file} > {file}.utf8.jsonl",
        )
    for beginning, (what, remedy) in _BEGINNINGS.items():
        if start.startswith(beginning) and not what.endswith(str(compression(file))):
            raise InputUnreadable(
                f"{file} is {what}, which its name does not tell", remedy=remedy.format(file)
            )


def compression(file: str) -> str | None:
    """How a file is packed, by its name, as pyarrow calls it."""
    return COMPRESSION.get(os.path.splitext(file)[1])


@contextmanager
def unreadable(file: str) -> Iterator[None]:
    """Turn an error of the system into InputUnreadable, which names the file."""
    try:
        yield
    except OSError as error:
        raise InputUnreadable(
            f"cannot read {file}: {error.strerror or error}",
            remedy="check that it exists and may be read",
        ) from error


def file_size(file: str) -> int:
    """Return the bytes of a file. Raises InputUnreadable, also where it was removed meanwhile."""
    with unreadable(file):
        return os.path.getsize(file)


def _line_start(file: BinaryIO, first: int, last: int) -> int | None:
    """Position after the first newline in [first, last), or None where there is none."""
    file.seek(first)
    position = first
    while position < last:
        chunk = file.read(min(1 << 20, last - position))
        at = chunk.find(b"\n")
        if at >= 0:
            return position + at + 1
        if not chunk:
            return None
        position += len(chunk)
    return None


def _rest_of_line(file: BinaryIO, data: bytes) -> bytes:
    """What follows `data` up to the end of its last line, cut one byte after LARGEST_LINE."""
    room = LARGEST_LINE + 1 - (len(data) - (data.rfind(b"\n") + 1))
    return file.readline(room) if room > 0 else b""


def grouped(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Pieces put together until they have `size` bytes."""
    return map(b"".join, in_groups(pieces, size))

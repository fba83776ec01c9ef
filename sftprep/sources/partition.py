"""Inputs cut into partitions: runs of whole lines of a fixed size, the same whatever the number of workers.

A plain file is cut by byte ranges that workers read by themselves. A compressed file can only be read from its start, so
it is unpacked here, and its partitions carry their bytes.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sftprep.errors import ConfigError, FormatError, InputNotFound, InputUnreadable

PARTITION_BYTES = 8 * 1024 * 1024
LARGEST_LINE = 64 * 1024 * 1024
"""Bytes; longer lines are rejected, and never held in memory whole."""

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_LINES = (".jsonl", ".ndjson")
_SUFFIXES = tuple(line + packed for line in _LINES for packed in ("", *_COMPRESSION))


@dataclass(frozen=True, slots=True)
class Partition:
    """The lines of one input that start in [start, end), in bytes; payload: those lines, where they cannot be read again."""

    index: int
    input: int
    file: str
    start: int
    end: int
    payload: bytes | None = None


def find_files(inputs: tuple[str, ...]) -> list[str]:
    """The files that paths, globs and folders name, in the order given, sorted within each.

    Raises InputNotFound, FormatError (a kind of file that is not read), ConfigError (the same file twice).
    """
    if not inputs:
        raise ConfigError("no input is given", remedy="name a .jsonl file, a glob or a folder: sftprep build data.jsonl ...")
    files = [file for name in inputs for file in _expand(name)]
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            raise ConfigError(
                f"{file} is named twice among the inputs", remedy="name it once; its records would be trained twice as often"
            )
        seen.add(real)
    return files


def cut(files: list[str], target: int = PARTITION_BYTES) -> Iterator[Partition]:
    """Cut files into partitions of about `target` bytes, in order; compressed files are read as the iterator advances.

    Raises InputUnreadable.
    """
    index = 0
    for number, file in enumerate(files):
        if _compression(file):
            for start, block in _unpacked_blocks(file, target):
                yield Partition(index, number, file, start, start + len(block), block)
                index += 1
        else:
            size = os.path.getsize(file)
            for start in range(0, size, target):
                yield Partition(index, number, file, start, min(start + target, size))
                index += 1


def read_partition(partition: Partition) -> bytes:
    """The whole lines of a partition. A line beyond LARGEST_LINE comes cut one byte after that. Raises InputUnreadable."""
    if partition.payload is not None:
        return partition.payload
    try:
        with open(partition.file, "rb") as file:
            begin = 0 if partition.start == 0 else _line_start(file, partition.start - 1, partition.end - 1)
            if begin is None:
                return b""
            file.seek(begin)
            data = file.read(partition.end - begin)
            return data if data.endswith(b"\n") else data + _rest_of_line(file, data)
    except OSError as error:
        raise InputUnreadable(
            f"cannot read {partition.file}: {error.strerror or error}", remedy="check that it exists and may be read"
        ) from error


def first_lines(file: str) -> Iterator[bytes]:
    """The lines of a file from its start, unpacked, read as the iterator advances. Raises InputUnreadable."""
    for _, block in _unpacked_blocks(file, 1 << 20):
        yield from block.split(b"\n")


def open_input(file: str) -> BinaryIO:
    """Open a file for reading, unpacked. Raises InputUnreadable where it cannot be opened or is UTF-16."""
    import pyarrow as pa

    try:
        with open(file, "rb") as raw:
            head = raw.read(4)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputUnreadable(f"{file} is UTF-16", remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {file} > {file}.utf8.jsonl")
        kind = _compression(file)
        if kind is None:
            return open(file, "rb")
        stream: BinaryIO = pa.CompressedInputStream(pa.OSFile(file), kind)
        return stream
    except OSError as error:
        raise InputUnreadable(
            f"cannot read {file}: {error.strerror or error}", remedy="check that it exists and may be read"
        ) from error


def _expand(name: str) -> list[str]:
    path = Path(name)
    if path.is_dir():
        inside = (str(p) for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file())
        found = sorted(p for p in inside if not any(part.startswith(".") for part in Path(p).relative_to(path).parts))
        if not found:
            raise InputNotFound(
                f"the folder {name} holds no {', '.join(_SUFFIXES)} file",
                remedy="name a folder with JSON lines, or convert the files",
            )
        return found
    if path.exists():
        if not name.endswith(_SUFFIXES):
            raise FormatError(
                f"{name} is not a kind of file that is read: {', '.join(_SUFFIXES)}",
                remedy="convert it to JSON lines, one object a line (a JSON array: jq -c '.[]' FILE > FILE.jsonl), "
                "or rename it if it is that already",
            )
        return [name]
    matches = sorted(match for match in glob.glob(name, recursive=True) if os.path.isfile(match))
    if not matches:
        raise InputNotFound(
            f"{name} does not exist, and matches no file as a pattern", remedy="check the path; quote patterns: 'data/*.jsonl'"
        )
    wrong = [match for match in matches if not match.endswith(_SUFFIXES)]
    if wrong:
        raise FormatError(
            f"{name} matches {wrong[0]}, which is not a kind of file that is read: {', '.join(_SUFFIXES)}",
            remedy="narrow the pattern",
        )
    return matches


def _compression(file: str) -> str | None:
    return _COMPRESSION.get(os.path.splitext(file)[1])


def _unpacked_blocks(file: str, target: int) -> Iterator[tuple[int, bytes]]:
    """Runs of whole lines of about `target` unpacked bytes, each with the unpacked position of its first."""
    position, pending = 0, b""
    with open_input(file) as stream:
        while True:
            try:
                chunk = stream.read(target)
            except OSError as error:
                raise InputUnreadable(
                    f"{file} is damaged or cut short: {error.strerror or error}, after {position + len(pending):,} bytes",
                    remedy="fetch or make the file again",
                ) from error
            if len(pending) > LARGEST_LINE and b"\n" not in chunk and chunk:
                position += len(chunk)  # the rest of a line that is rejected for its length anyway
                continue
            pending += chunk
            last = len(pending) if not chunk else pending.rfind(b"\n") + 1
            if last:
                yield position, pending[:last]
                position, pending = position + last, pending[last:]
            if not chunk:
                return


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

"""Uncompressed files of lines, as independent blocks of byte ranges."""

from __future__ import annotations

import os
import threading
from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.hashing import hash64
from sftprep.errors import InputChanged, source_name
from sftprep.sources.lanes import line_starts
from sftprep.sources.readers.lines import (
    convert_os_errors,
    file_size,
    locate_lines,
    open_regular,
    reject_shorter,
)
from sftprep.stream.sources.base import PART_BITS, Block, Cursor, LaneAssignment, LineGroup, Reader


@dataclass(frozen=True)
class LineFiles:
    """Uncompressed files of lines.

    Attributes:
        files: The paths to read.
        names: The name of each file in errors and in `locate`.
        formats: The format of each file.
        sizes: The size of each file in bytes when the stream was created.
        block: The size of a block in bytes.
        first_part: The number of the first file among all inputs.
    """

    files: tuple[str, ...]
    names: tuple[str, ...]
    formats: tuple[str, ...]
    sizes: tuple[int, ...]
    block: int
    first_part: int = 0

    @property
    def identity(self) -> Any:
        """Return the sizes of the files and of a block.

        The names may differ after a resume.
        """
        return [list(self.sizes), self.block]

    def open(self, assignment: LaneAssignment) -> Reader:
        """Start or resume a pass.

        Raises:
            InputChanged: The size of a file has changed since the stream was created.
            InputUnreadable: A file was removed.
        """
        for file, size in zip(self.files, self.sizes, strict=True):
            if (found := file_size(file)) != size:
                raise InputChanged(
                    f"{source_name(file)} has {found:,} bytes, and had {size:,}",
                    remedy="start a new stream of the new file",
                )
        return _LineReader(self, assignment)

    def locate(self, origin: int) -> tuple[str, int]:
        """Return the name of the file and the line, from 1."""
        number = (origin >> PART_BITS) - self.first_part
        file, position = self.files[number], origin & ((1 << PART_BITS) - 1)
        with convert_os_errors(file):
            status = os.stat(file)
            index = _line_index(file, status.st_size, status.st_mtime_ns)
            return self.names[number], index.newlines_before(position) + 1


class _LineIndex:
    """The number of newlines before any byte of a file.

    They are counted once, up to the last byte that was asked for, and kept for every 64 KiB.
    """

    _STEP = 1 << 16

    def __init__(self, file: str) -> None:
        self._file = file
        self._counts = array("q", [0])  # newlines before each multiple of _STEP
        self._lock = threading.Lock()

    def newlines_before(self, position: int) -> int:
        """Return the number of newlines before a byte.

        For a byte after the end, return the number of all newlines.
        """
        with self._lock, open_regular(self._file) as stream:
            step = position // self._STEP
            if step >= len(self._counts):
                stream.seek((len(self._counts) - 1) * self._STEP)
            while step >= len(self._counts) and (chunk := stream.read(self._STEP)):
                self._counts.append(self._counts[-1] + chunk.count(b"\n"))
            known = min(step, len(self._counts) - 1)
            stream.seek(known * self._STEP)
            rest = stream.read(position - known * self._STEP)
            return self._counts[known] + rest.count(b"\n")


@lru_cache(maxsize=256)
def _line_index(file: str, _size: int, _mtime: int) -> _LineIndex:
    # The size and the time of change are a part of the key, so a changed file gets a new index.
    return _LineIndex(file)


class _LineReader:
    """A reader of byte ranges of files.

    A cursor is the number of earlier blocks of the lane.
    """

    queued = 0  # each lane reads its own blocks

    def __init__(self, source: LineFiles, assignment: LaneAssignment) -> None:
        self.source, self.assignment = source, assignment
        self.reading = ", ".join(map(source_name, source.names))
        self._blocks = {lane: self._blocks_of(lane) for lane in assignment.lanes}

    def has_queued(self, _lane: int, _cursor: Cursor) -> bool:
        return False

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        at, source = cursor or 0, self.source
        parts, numbers = self._blocks[lane]
        if at >= len(parts):
            return None
        part, number = int(parts[at]), int(numbers[at])
        self.reading = source_name(source.names[part])
        file, start = source.files[part], number * source.block
        begin, data = locate_lines(file, start, min(start + source.block, source.sizes[part]))
        # Checked against the whole file, since the last line of a block ends after the block.
        reject_shorter(file, file_size(file), source.sizes[part])
        origins = line_starts(data, begin) + ((part + source.first_part) << PART_BITS)
        return Block((LineGroup(data, source.formats[part]),), origins, at + 1)

    def _blocks_of(self, lane: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the file of each block of a lane, and its number in the file.

        The blocks are in the order of the pass.

        Returns:
            Two arrays, int64 [blocks].
        """
        source, assignment = self.source, self.assignment
        # The blocks of a file are assigned to the lanes in turn; each file starts one lane later.
        numbers_of_files = []
        for part, size in enumerate(source.sizes):
            first = (lane - part - source.first_part) % assignment.num_lanes
            numbers_of_files.append(
                np.arange(first, -(-size // source.block), assignment.num_lanes, dtype=np.int64)
            )
        parts = np.repeat(np.arange(len(numbers_of_files)), [len(n) for n in numbers_of_files])
        numbers = np.concatenate([np.empty(0, np.int64), *numbers_of_files])
        if assignment.shuffle:
            key = hash64(assignment.seed, assignment.epoch, lane)
            order = np.random.Generator(np.random.Philox(key=key)).permutation(len(numbers))
            parts, numbers = parts[order], numbers[order]
        return parts, numbers

"""Uncompressed files of lines, as independent blocks of byte ranges."""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.config.validation import is_url
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
from sftprep.stores.folder import Mark, marks_of
from sftprep.stream.sources.base import PART_BITS, Block, Cursor, LaneAssignment, LineGroup, Reader

_NEW_STREAM = "start a new stream of the new file"


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
        marks: For objects in a store, the mark of each when the stream was created; None for files.
    """

    files: tuple[str, ...]
    names: tuple[str, ...]
    formats: tuple[str, ...]
    sizes: tuple[int, ...]
    block: int
    first_part: int = 0
    marks: tuple[Mark | None, ...] = ()

    @property
    def identity(self) -> Any:
        """Return the sizes of the files and of a block, and the tags of objects.

        The names may differ after a resume.
        """
        tags = [mark.tag for mark in self.marks if mark is not None]
        return [list(self.sizes), self.block, *([tags] if tags else [])]

    def open(self, assignment: LaneAssignment) -> Reader:
        """Start or resume a pass.

        Raises:
            InputChanged: A file or object has changed since the stream was created.
            InputUnreadable: A file was removed.
            StorageError: The store cannot be reached.
        """
        objects = {}
        for file, size, mark in zip(self.files, self.sizes, self._all_marks, strict=True):
            if mark is not None:
                objects[file] = mark
            elif (found := file_size(file)) != size:
                raise InputChanged(
                    f"{source_name(file)} has {found:,} bytes, and had {size:,}", remedy=_NEW_STREAM
                )
        reject_changed(objects)
        return _LineReader(self, assignment)

    def locate(self, origin: int) -> tuple[str, int]:
        """Return the name of the file and the line, from 1."""
        number = (origin >> PART_BITS) - self.first_part
        file, position = self.files[number], origin & ((1 << PART_BITS) - 1)
        version: object = self._all_marks[number]
        with convert_os_errors(file):
            if version is None:
                status = os.stat(file)
                version = status.st_size, status.st_mtime_ns
            index = _line_index(file, version)
            return self.names[number], index.newlines_before(position) + 1

    @property
    def _all_marks(self) -> tuple[Mark | None, ...]:
        return self.marks or (None,) * len(self.files)


def reject_changed(objects: Mapping[str, Mark]) -> None:
    """Raise InputChanged if an object in a store has another mark than before.

    Args:
        objects: The mark of each object when the stream was created, by URL.

    Raises:
        InputChanged: One was replaced or removed.
        StorageError: The store cannot be reached.
    """
    found = marks_of(objects)
    for url, mark in objects.items():
        if found.get(url) != mark:
            raise InputChanged(
                f"{source_name(url)} was {'replaced' if url in found else 'removed'} after the"
                " stream was created",
                remedy=_NEW_STREAM,
            )


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
def _line_index(file: str, _version: object) -> _LineIndex:
    # The version (size and time of change, or the mark) is a part of the key, so a changed file
    # gets a new index.
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
        # Checked against the whole file, since the last line of a block ends after the block. For
        # an object, that would be a second request, and objects never grow or shrink in place.
        if not is_url(file):
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

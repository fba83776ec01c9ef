"""What a stream reads: blocks of records dealt to lanes, each of which can be read again at its
cursor."""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sftprep.core.hashing import hash64
from sftprep.errors import InputChanged, SftprepError, SourceError
from sftprep.sources.lanes import line_starts
from sftprep.sources.readers.lines import (
    convert_os_errors,
    file_size,
    locate_lines,
    open_regular,
    reject_shorter,
)

Cursor = Any
"""Where a block is read: JSON, to be kept and given back; None is the first of its lane."""

Result = TypeVar("Result")

BLOCK_BYTES = 1 << 20
"""A block of records that have no size known beforehand ends with the record that reaches it."""

_MISTAKES = (TypeError, AttributeError, NameError, ImportError, AssertionError)

PART_BITS = 44
"""An origin is the number of its part (file, shard) times 2**44, plus the position in it: the first
byte of a line, or a row."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Lines of JSON of one format. places: int64 [lines], the number of each in its block; None
    where they are all of it."""

    data: bytes
    format: str
    places: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Some records of one lane, in pieces of one format each. origins: int64 [lines]; after: cursor
    of the lane's next block."""

    pieces: tuple[Piece, ...]
    origins: NDArray[np.int64]
    after: Cursor


@dataclass(frozen=True, slots=True)
class LaneAssignment:
    """Which lanes of how many are read, in which pass. start: where each begins, from which it
    never goes back. on_queued: called with a lane, while its block is collected, whenever another
    `BLOCK_BYTES` were queued for other lanes; it may read blocks of these, and may raise."""

    lanes: tuple[int, ...]
    of: int
    epoch: int = 0
    seed: int = 0
    shuffle: bool = False
    start: Mapping[int, Cursor] = field(default_factory=dict)
    on_queued: Callable[[int], None] = lambda _lane: None


class Reader(Protocol):
    """The lanes of one pass. What a cursor gives depends on nothing that was read before."""

    @property
    def reading(self) -> str:
        """What is being read, or was last, by name: for the message where reading raises."""
        ...

    @property
    def queued(self) -> int:
        """Bytes of records that were read and wait for their lanes; 0 where every lane reads by
        itself."""
        ...

    def has_queued(self, lane: int, cursor: Cursor) -> bool:
        """Whether the block at a cursor is in a queue, so that `read` takes it from there."""
        ...

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        """The block at a cursor, None after the last. What it raises may be met again: the block is
        then read once more."""
        ...


class Source(Protocol):
    """Where records come from. A part is a file, a shard or the whole; its number is in the
    origins."""

    @property
    def identity(self) -> Any:
        """JSON that differs where a state does not fit."""
        ...

    def open(self, dealt: LaneAssignment) -> Reader:
        """Begin a pass, or go on with one."""
        ...

    def locate(self, origin: int) -> tuple[str, int]:
        """The part an origin is in, by name, and line or row in it, from 1."""
        ...


def retry_with_backoff(
    call: Callable[[], Result], retries: int, pause: float, *, what: Callable[[], str]
) -> Result:
    """What `call` returns; where it raises, it is called again, up to `retries` times, after
    `pause` seconds, doubled each time.

    Errors of ours say what is wrong already, and mistakes in a user's code do not go away by
    waiting: these are raised as they are. what: called for what was tried. Raises SourceError, with
    the last error as its cause, where nothing helps.
    """
    for attempt in range(retries + 1):
        try:
            return call()
        except (SftprepError, *_MISTAKES):
            raise
        except Exception as error:
            if attempt == retries:
                raise _given_up(error, what(), retries, pause) from error
            time.sleep(pause * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _given_up(error: Exception, what: str, retries: int, pause: float) -> SourceError:
    tried = (
        f"{retries + 1} times with {pause * (2**retries - 1):g} s of waiting in between"
        if retries
        else "once"
    )
    return SourceError(
        f"{what} cannot be read; tried {tried}, and it raised {type(error).__name__}: {error}",
        remedy=(
            "mend the source, or give the stream larger retries= and retry_wait=; iterated again,"
            " it goes on where it stood"
        ),
    )


@dataclass(frozen=True)
class LineFiles:
    """Plain files of lines, cut by byte ranges: any block is read by itself.

    names: what to call the files; sizes: theirs when the stream was made; block: bytes; first_part:
    number of the first file among all inputs.
    """

    files: tuple[str, ...]
    names: tuple[str, ...]
    formats: tuple[str, ...]
    sizes: tuple[int, ...]
    block: int
    first_part: int = 0

    @property
    def identity(self) -> Any:
        """Sizes of the files, and of a block."""
        return [list(self.sizes), self.block]

    def open(self, dealt: LaneAssignment) -> Reader:
        """Raises InputChanged where a file has another size than when the stream was made, and
        InputUnreadable where it was removed."""
        for file, size in zip(self.files, self.sizes, strict=True):
            if (found := file_size(file)) != size:
                raise InputChanged(
                    f"{file} has {found:,} bytes, and had {size:,}",
                    remedy="begin a new stream over the new file",
                )
        return _LineReader(self, dealt)

    def locate(self, origin: int) -> tuple[str, int]:
        """File and line."""
        number = (origin >> PART_BITS) - self.first_part
        file, position = self.files[number], origin & ((1 << PART_BITS) - 1)
        with convert_os_errors(file):
            status = os.stat(file)
            index = _line_index(file, status.st_size, status.st_mtime_ns)
            return self.names[number], index.newlines_before(position) + 1


class _LineIndex:
    """Numbers of newlines before positions of a file.

    They are counted once, as far as they are asked for, and remembered for every 64 KiB.
    """

    _STEP = 1 << 16

    def __init__(self, file: str) -> None:
        self._file = file
        self._counts = array("q", [0])  # of newlines before each multiple of _STEP
        self._lock = threading.Lock()

    def newlines_before(self, position: int) -> int:
        """Return how many there are before a byte; behind the end, as before the end."""
        with self._lock, open_regular(self._file) as stream:
            wanted = position // self._STEP
            if wanted >= len(self._counts):
                stream.seek((len(self._counts) - 1) * self._STEP)
            while wanted >= len(self._counts) and (chunk := stream.read(self._STEP)):
                self._counts.append(self._counts[-1] + chunk.count(b"\n"))
            known = min(wanted, len(self._counts) - 1)
            rest = os.pread(stream.fileno(), position - known * self._STEP, known * self._STEP)
            return self._counts[known] + rest.count(b"\n")


@lru_cache(maxsize=256)
def _line_index(file: str, _size: int, _mtime: int) -> _LineIndex:
    return _LineIndex(file)


class _LineReader:
    """Cursor: how many blocks of the lane come before."""

    queued = 0

    def __init__(self, source: LineFiles, dealt: LaneAssignment) -> None:
        self.source, self.dealt = source, dealt
        self.reading = ", ".join(source.names)
        self._blocks = {lane: self._blocks_of(lane) for lane in dealt.lanes}

    def has_queued(self, _lane: int, _cursor: Cursor) -> bool:
        return False

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        at, source = cursor or 0, self.source
        parts, numbers = self._blocks[lane]
        if at >= len(parts):
            return None
        part, number = int(parts[at]), int(numbers[at])
        self.reading = source.names[part]
        file, start = source.files[part], number * source.block
        begin, data = locate_lines(file, start, min(start + source.block, source.sizes[part]))
        # Also behind the block: the last line of it may have been cut there.
        reject_shorter(file, file_size(file), source.sizes[part])
        origins = line_starts(data, begin) + ((part + source.first_part) << PART_BITS)
        return Block((Piece(data, source.formats[part]),), origins, at + 1)

    def _blocks_of(self, lane: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """File and number of each block of a lane, in the order of the pass: int64 [blocks]
        each."""
        source, dealt = self.source, self.dealt
        numbers = []
        for part, size in enumerate(source.sizes):
            first = (lane - part - source.first_part) % dealt.of
            numbers.append(np.arange(first, -(-size // source.block), dealt.of, dtype=np.int64))
        parts = np.repeat(np.arange(len(numbers)), [len(n) for n in numbers])
        every = np.concatenate([np.empty(0, np.int64), *numbers])
        if dealt.shuffle:
            order = np.random.Generator(
                np.random.Philox(key=hash64(dealt.seed, dealt.epoch, lane))
            ).permutation(len(every))
            parts, every = parts[order], every[order]
        return parts, every

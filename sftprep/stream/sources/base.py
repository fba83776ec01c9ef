"""The interface of the sources of a stream, and the retry of failed reads.

A source assigns its records to lanes. Each lane reads its records as blocks, one after the other.
A block is identified by its cursor, a small JSON value, so that any block can be read again: after
an error, or in another process after a resume.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sftprep.config.user_functions import LoadedFunction
from sftprep.core.types import TokenBatch
from sftprep.errors import SftprepError, SourceError, setting
from sftprep.shards.schema import ORIGIN_BITS

Cursor = Any
"""The start of a block: JSON that a reader created; None is the first block of a lane."""

Result = TypeVar("Result")

BLOCK_BYTES = 1 << 20
"""A block of records whose sizes are not known in advance ends with the record that reaches this
size."""

PART_BITS = ORIGIN_BITS
"""An origin is `part << PART_BITS | position`: the number of an input (file, shard), and in it the
first byte of the line, or the row."""

# Errors that are mistakes in the code of a user, which waiting does not fix.
_MISTAKES = (TypeError, AttributeError, NameError, ImportError, AssertionError)


@dataclass(frozen=True, slots=True)
class LineGroup:
    """Lines of JSON with one format and one transform.

    Attributes:
        data: The lines, each with its newline.
        format: The name of the format.
        positions: int64 [lines], the index of each line in its block; None if the group is the
            whole block.
        transform: The transform of the records, if it is not that of the stream.
    """

    data: bytes
    format: str
    positions: NDArray[np.int64] | None = None
    transform: LoadedFunction | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive records of one lane.

    Attributes:
        groups: The lines, one group per format.
        origins: int64 [lines], the origin of each line; see `PART_BITS`.
        next_cursor: The cursor of the next block of the lane.
        count: Returns this cursor for the sequences of the block, if it depends on them.
    """

    groups: tuple[LineGroup, ...]
    origins: NDArray[np.int64]
    next_cursor: Cursor
    count: Callable[[TokenBatch], Cursor] | None = None

    def cursor_after(self, batch: TokenBatch) -> Cursor:
        """Return the cursor of the next block of the lane.

        Args:
            batch: The sequences of this block.
        """
        return self.next_cursor if self.count is None else self.count(batch)


@dataclass(frozen=True, slots=True)
class LaneAssignment:
    """The lanes of a reader, and its pass.

    Attributes:
        lanes: The lanes to read.
        num_lanes: The number of all lanes, including those of other ranks and workers.
        epoch: The number of the pass.
        seed, shuffle: The order of the blocks, if the source can be read in any order.
        start: The first cursor of each lane; a lane without one starts at its first block. A lane
            never goes back before its start.
        on_queued: Called with a lane while its block is collected, whenever another `BLOCK_BYTES`
            were queued for other lanes. It may read blocks of these lanes, and may raise.
    """

    lanes: tuple[int, ...]
    num_lanes: int
    epoch: int = 0
    seed: int = 0
    shuffle: bool = False
    start: Mapping[int, Cursor] = field(default_factory=dict)
    on_queued: Callable[[int], None] = lambda _lane: None


class Reader(Protocol):
    """A reader of lanes in one pass.

    The block at a cursor never depends on earlier reads.
    """

    @property
    def reading(self) -> str:
        """Return the current or last input, for the text of an error.

        It may contain references of `sftprep.errors.source_name`.
        """
        ...

    @property
    def queued(self) -> int:
        """Return the bytes of queued records; 0 if lanes read separately.

        Queued records were read and wait for their lanes.
        """
        ...

    def has_queued(self, lane: int, cursor: Cursor) -> bool:
        """Return whether the block at a cursor is queued.

        `read` then needs no further input.
        """
        ...

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        """Return the block at a cursor, or None after the last block.

        Any error of the input is raised; the same block can then be read again.
        """
        ...


class Source(Protocol):
    """The records of a stream, in numbered parts: files, shards, or the whole input."""

    @property
    def identity(self) -> Any:
        """Return JSON, different for sources without interchangeable states."""
        ...

    def open(self, assignment: LaneAssignment) -> Reader:
        """Start or resume a pass."""
        ...

    def locate(self, origin: int) -> tuple[str, int]:
        """Return the name of an origin's part, and the line or row there, from 1."""
        ...


def retry_with_backoff(
    call: Callable[[], Result],
    retries: int,
    pause: float,
    *,
    describe: Callable[[], str],
    transient: tuple[type[SftprepError], ...] = (),
) -> Result:
    """Call a function, repeatedly if it raises, and return its result.

    Errors of this project and mistakes in the code of a user are raised at once, since waiting does
    not fix them.

    Args:
        call: The function.
        retries: The maximum number of further calls.
        pause: Seconds before the first retry; the pause doubles each time.
        describe: Returns the description of what is read, for the error.
        transient: Errors of this project for which the function is called again all the same.

    Raises:
        SourceError: All calls raised; the last error is its cause.
    """
    for attempt in range(retries + 1):
        try:
            return call()
        except Exception as error:  # a source may raise anything: network, file system, user code
            if isinstance(error, (SftprepError, *_MISTAKES)) and not isinstance(error, transient):
                raise
            if attempt == retries:
                raise _exhausted_error(error, describe(), retries, pause) from error
            time.sleep(pause * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _exhausted_error(error: Exception, description: str, retries: int, pause: float) -> SourceError:
    attempts = (
        f"{retries + 1} times with {pause * (2**retries - 1):g} s of waiting in between"
        if retries
        else "once"
    )
    return SourceError(
        f"{description} cannot be read; tried {attempts}, and it raised"
        f" {type(error).__name__}: {error}",
        remedy=[
            "fix the source and iterate again, which resumes where the stream stopped",
            f"use larger {setting('retries')} and {setting('retry_wait')}",
        ],
    )


def early_end(description: str) -> SourceError:
    """Return the error for a source shorter than at its earlier reading.

    Args:
        description: The description of what is read.
    """
    return SourceError(
        f"{description} was read again from its start and ended early, so records would be missing",
        remedy="use a source that returns the same records whenever it is iterated: a list, or a"
        " function that creates a new iterator at each call",
    )

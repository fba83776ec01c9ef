"""Sources readable only from their start, assigned to lanes by record.

1. One iterator serves all lanes. Record r belongs to lane r modulo the number of lanes.
2. The iterator advances until the reading lane has its block. Records of other lanes are queued;
   `sftprep.stream.backlog` keeps the queues bounded.
3. If a lane needs a record that was already passed, or the iterator raised, the iterator starts
   again at the first record that any lane still needs, or at the last *mark* before that.
4. A mark is a state of the source from which it can continue, kept every few records.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sftprep.errors import source_name
from sftprep.sources.lanes import lane_of
from sftprep.stream.sources.base import (
    BLOCK_BYTES,
    PART_BITS,
    Block,
    Cursor,
    LaneAssignment,
    LineGroup,
    Reader,
    early_end,
)

BLOCK_ROWS = 64
"""Maximum number of records in a block; a block also ends at `BLOCK_BYTES`. The end of a block
depends only on the records of its lane, so it is the same after a resume."""
_ENTRY_BYTES = 64
"""Memory of a queued record in addition to its bytes: its object and its entry in the queue."""

Lines = Callable[[int, int], Iterator[bytes]]
"""A function of an epoch and a number; returns the records from that number on, as lines of
JSON."""

Mark = tuple[int, Any]
"""The number of a record, and the state of the source before it."""


@runtime_checkable
class Markable(Protocol):
    """`Lines` with a resumable iterator."""

    def mark(self) -> Any:
        """Return the state of the latest iterator as JSON.

        Return None if it cannot resume exactly.
        """
        ...

    def resume(self, epoch: int, state: Any) -> Iterator[bytes]:
        """Return the records after a state."""
        ...


@dataclass(frozen=True)
class Rows:
    """Records read from the start, and divided among the lanes in turn.

    Attributes:
        lines: Returns the records from any number on.
        name: The name of the input in errors; a part of the identity.
        format: The format of the records.
        part: The number of this input.
        facts: JSON that differs between inputs with the same name, such as a size.
    """

    lines: Lines
    name: str
    format: str
    part: int = 0
    facts: Any = None

    @property
    def identity(self) -> Any:
        """Return the name, and all known facts about the records."""
        return [self.name, self.facts]

    def open(self, assignment: LaneAssignment) -> Reader:
        """Start or resume a pass."""
        return _RowReader(self, assignment)

    def locate(self, origin: int) -> tuple[str, int]:
        """Return the name of the input, and the number of the record, from 1."""
        return self.name, (origin & ((1 << PART_BITS) - 1)) + 1


class _RowReader:
    """A reader of rows, with one iterator for all lanes.

    A cursor is the number of earlier records of the lane; with a mark, `[number, *mark]`.
    """

    def __init__(self, source: Rows, assignment: LaneAssignment) -> None:
        self.source, self.assignment = source, assignment
        self.reading = source_name(source.name)
        starts = {lane: _parse(assignment.start.get(lane)) for lane in assignment.lanes}
        # By lane: the number of its record that is first in its queue. It can be read again.
        self._first_kept = {lane: at for lane, (at, _) in starts.items()}
        self._marks: list[Mark] = sorted(
            (mark for _, mark in starts.values() if mark is not None), key=lambda mark: mark[0]
        )
        self._queues: dict[int, deque[bytes]] = {}  # by lane, from its record `_first_kept`
        self.queued = 0  # bytes in all queues
        self._unreported = 0  # bytes that were queued since the last call of `on_queued`
        self._iterator: Iterator[bytes] | None = None
        self._next = 0  # the row that the iterator returns next
        # A dataset has a state of its own iterator only after the first record.
        self._has_begun = self._has_ended = False
        self._delivered = 0  # rows that the source has returned, over all of its iterators
        self._error: Exception | None = None  # the last one that the source raised

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        at, mark = _parse(cursor)
        if at < self._first_kept[lane]:  # already passed: start again
            self._iterator = None
            self._marks = [] if mark is None else [mark]
        # Drop the records of the block before, which can no longer be asked for.
        queue = self._queues.get(lane)
        if self._iterator is not None and queue is not None:
            for _ in range(min(at - self._first_kept[lane], len(queue))):
                self.queued -= len(queue.popleft()) + _ENTRY_BYTES
        self._first_kept[lane] = at
        if self._iterator is None:
            self._restart()
        # Collect the block. Its records stay in the queue, in case that the source raises.
        lines: list[bytes] = []
        size = 0
        while len(lines) < BLOCK_ROWS and size < BLOCK_BYTES and self._advance_to(lane, len(lines)):
            lines.append(self._queues[lane][len(lines)])
            size += len(lines[-1])
        if not lines:
            return None
        step = self.assignment.num_lanes
        rows = self._row_of(lane, at) + np.arange(len(lines), dtype=np.int64) * step
        groups = (LineGroup(b"".join(lines), self.source.format),)
        origins = rows + (self.source.part << PART_BITS)
        return Block(groups, origins, self._to_cursor(lane, at + len(lines)))

    def has_queued(self, lane: int, cursor: Cursor) -> bool:
        at, queue = _parse(cursor)[0], self._queues.get(lane)
        if self._iterator is None or queue is None or at < self._first_kept[lane]:
            return False
        first = at - self._first_kept[lane]
        size = 0
        for number in range(first, min(first + BLOCK_ROWS, len(queue))):
            size += len(queue[number])
            if size >= BLOCK_BYTES:
                return True
        return len(queue) >= first + BLOCK_ROWS

    def _advance_to(self, lane: int, position: int) -> bool:
        """Advance until the queue of a lane has this position; return False at the end."""
        while len(self._queues[lane]) <= position and not self._has_ended:
            self._advance()
            if self._unreported >= BLOCK_BYTES:
                self._unreported = 0
                # Other lanes may read here, and may even restart the source with new queues: that
                # is why the queue is looked up again in each step.
                self.assignment.on_queued(lane)
        return len(self._queues[lane]) > position

    def _to_cursor(self, lane: int, at: int) -> Cursor:
        row = self._row_of(lane, at)
        earlier = [mark for mark in self._marks if mark[0] <= row]
        return [at, *earlier[-1]] if earlier else at

    def _restart(self) -> None:
        """Start the iterator at the first row needed by any lane."""
        self._queues = {lane: deque() for lane in self.assignment.lanes}
        self.queued = 0
        self._next = self._first_needed_row()
        if self._delivered:  # one that was returned before is read again: see `_reject_early_end`
            self._next = min(self._next, self._delivered - 1)
        self._marks = [mark for mark in self._marks if mark[0] <= self._next]
        lines, epoch = self.source.lines, self.assignment.epoch
        if self._marks and isinstance(lines, Markable):
            row, state = self._marks[-1]
            self._iterator = lines.resume(epoch, state)
            for _ in range(self._next - row):
                next(self._iterator, None)
        else:
            self._iterator = lines(epoch, self._next)
        self._has_begun = self._has_ended = False

    def _advance(self) -> None:
        """Read one record, and queue it for its lane."""
        iterator = self._iterator
        assert iterator is not None
        if self._has_begun and self._next % (BLOCK_ROWS * self.assignment.num_lanes) == 0:
            self._add_mark()
        try:
            line = next(iterator, None)
            self._has_begun = True
        except BaseException as error:
            self._iterator = None  # a generator that raised is exhausted
            self._error = error if isinstance(error, Exception) else self._error
            raise
        if line is None:
            self._reject_early_end()
            self._has_ended = True
            return
        row, self._next = self._next, self._next + 1
        self._delivered = max(self._delivered, self._next)
        lane = lane_of(row, self.source.part, self.assignment.num_lanes)
        if lane in self._queues and row >= self._row_of(lane, self._first_kept[lane]):
            # A copy, since orjson leaves its output in a larger buffer, of at least a kilobyte.
            self._queues[lane].append(bytes(memoryview(line)))
            self.queued += len(line) + _ENTRY_BYTES
            self._unreported += len(line) + _ENTRY_BYTES

    def _reject_early_end(self) -> None:
        """Raise SourceError if the source ends before an already returned row.

        This may happen after the source raised an error. An iterator that can be read only once
        ends when it is started again.
        """
        if self._next < self._delivered or (self._error is not None and not self._delivered):
            self._iterator = None
            raise early_end(self.reading) from self._error

    def _add_mark(self) -> None:
        """Keep the state of the source, and drop marks of no further use.

        No lane will start again at a dropped mark.
        """
        if not isinstance(self.source.lines, Markable) or (
            self._marks and self._marks[-1][0] >= self._next
        ):
            return
        state = self.source.lines.mark()
        if state is None:
            return
        first = self._first_needed_row()
        usable = [k for k, mark in enumerate(self._marks) if mark[0] <= first]
        self._marks = [*self._marks[usable[-1] if usable else 0 :], (self._next, state)]

    def _first_needed_row(self) -> int:
        return min(self._row_of(lane, at) for lane, at in self._first_kept.items())

    def _row_of(self, lane: int, at: int) -> int:
        """Return the row in the input of record `at` of a lane."""
        first: int = (lane - self.source.part) % self.assignment.num_lanes
        return first + at * self.assignment.num_lanes


def _parse(cursor: Cursor) -> tuple[int, Mark | None]:
    if isinstance(cursor, list):
        at, row, state = cursor
        return at, (row, state)
    return cursor or 0, None

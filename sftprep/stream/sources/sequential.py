"""Sources that are read from their start: records dealt to lanes one by one, as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sftprep.sources.lanes import lane_of
from sftprep.stream.sources.base import (
    BLOCK_BYTES,
    PART_BITS,
    Block,
    Cursor,
    LaneAssignment,
    Piece,
    Reader,
)

ROWS = 64
"""Most records in a block. Large ones end it at `BLOCK_BYTES`: where a block ends depends on the
records of its lane only, so it is the same after a resume."""
_ENTRY_BYTES = 64
"""What a queued record costs beyond its own bytes: its object and its entry in the queue."""

Lines = Callable[[int, int], Iterator[bytes]]
"""Called with the epoch and a number, gives the records from that number on, a line of JSON
each."""

Mark = tuple[int, Any]
"""Number of a record, and the state of the source before it."""


@runtime_checkable
class Markable(Protocol):
    """Lines that tell where they stand, and go on from there."""

    def mark(self) -> Any:
        """State of the iterator that was made last, as JSON; None where it cannot go on exactly."""
        ...

    def go_on(self, epoch: int, state: Any) -> Iterator[bytes]:
        """The records after a state."""
        ...


@dataclass(frozen=True)
class Rows:
    """Every k-th record of something that gives its records again from any number on, at the cost
    of passing those before.

    part: number of this input; name, known: what to call it, and what tells it from others in a
    state.
    """

    lines: Lines
    name: str
    format: str
    part: int = 0
    known: Any = None

    @property
    def identity(self) -> Any:
        """Its name, and what is known of it."""
        return [self.name, self.known]

    def open(self, dealt: LaneAssignment) -> Reader:
        """One iterator serves all lanes."""
        return _RowReader(self, dealt)

    def locate(self, origin: int) -> tuple[str, int]:
        """Its name, and the number of the record."""
        return self.name, (origin & ((1 << PART_BITS) - 1)) + 1


class _RowReader:
    """Cursor: how many records of the lane come before; where the source can be marked, a list with
    a mark before it as well.

    The iterator runs as far as the lane that has read most; what comes by for the others waits in
    their queues, whose size `sftprep.stream.backlog` keeps bounded. Where a lane needs what has
    gone by, or the iterator broke, it begins again at the first record that any lane still wants,
    from the last mark before that.
    """

    def __init__(self, source: Rows, dealt: LaneAssignment) -> None:
        self.source, self.dealt = source, dealt
        self.reading = source.name
        begin = {lane: _parsed(dealt.start.get(lane)) for lane in dealt.lanes}
        self._wanted = {lane: at for lane, (at, _) in begin.items()}
        self._marks: list[Mark] = sorted(
            (mark for _, mark in begin.values() if mark is not None), key=lambda mark: mark[0]
        )
        self._queues: dict[int, deque[bytes]] = {}
        self.queued = 0
        self._unreported = 0  # bytes queued since the last call of `on_queued`
        self._rest: Iterator[bytes] | None = None
        self._next = 0
        self._begun = self._ended = (
            False  # an iterator says where it stands only when it has been asked for something
        )

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        at, mark = _parsed(cursor)
        if at < self._wanted[lane]:
            self._rest = None
            self._marks = [] if mark is None else [mark]
        queue = self._queues.get(lane)
        if self._rest is not None and queue is not None:
            for _ in range(min(at - self._wanted[lane], len(queue))):
                self.queued -= len(queue.popleft()) + _ENTRY_BYTES
        self._wanted[lane] = at
        if self._rest is None:
            self._restart()
        lines: list[bytes] = []
        size = 0
        while len(lines) < ROWS and size < BLOCK_BYTES and self._find_next(lane, len(lines)):
            lines.append(self._queues[lane][len(lines)])
            size += len(lines[-1])
        if not lines:
            return None
        rows = self._row(lane, at) + np.arange(len(lines), dtype=np.int64) * self.dealt.of
        after = self._cursor(lane, at + len(lines))
        return Block(
            (Piece(b"".join(lines), self.source.format),),
            rows + (self.source.part << PART_BITS),
            after,
        )

    def has_queued(self, lane: int, cursor: Cursor) -> bool:
        at, queue = _parsed(cursor)[0], self._queues.get(lane)
        if self._rest is None or queue is None or at < self._wanted[lane]:
            return False
        first = at - self._wanted[lane]
        size = 0
        for number in range(first, min(first + ROWS, len(queue))):
            size += len(queue[number])
            if size >= BLOCK_BYTES:
                return True
        return len(queue) >= first + ROWS

    def _find_next(self, lane: int, position: int) -> bool:
        """Advance until the queue of a lane has this position; False where the source has ended."""
        while len(self._queues[lane]) <= position and not self._ended:
            self._advance()
            if self._unreported >= BLOCK_BYTES:
                self._unreported = 0
                # Other lanes may read here, even the source from its start: the queues are new ones
                # then.
                self.dealt.on_queued(lane)
        return len(self._queues[lane]) > position

    def _cursor(self, lane: int, at: int) -> Cursor:
        row = self._row(lane, at)
        before = [mark for mark in self._marks if mark[0] <= row]
        return [at, *before[-1]] if before else at

    def _restart(self) -> None:
        self._queues = {lane: deque() for lane in self.dealt.lanes}
        self.queued = 0
        self._next = min(self._row(lane, wanted) for lane, wanted in self._wanted.items())
        self._marks = [mark for mark in self._marks if mark[0] <= self._next]
        lines, epoch = self.source.lines, self.dealt.epoch
        if self._marks and isinstance(lines, Markable):
            row, state = self._marks[-1]
            self._rest = lines.go_on(epoch, state)
            for _ in range(self._next - row):
                next(self._rest, None)
        else:
            self._rest = lines(epoch, self._next)
        self._begun = self._ended = False

    def _advance(self) -> None:
        rest = self._rest
        assert rest is not None
        if self._begun and self._next % (ROWS * self.dealt.of) == 0:
            self._put_mark()
        try:
            line = next(rest, None)
            self._begun = True
        except BaseException:
            self._rest = None  # an iterator that raised is at its end
            raise
        if line is None:
            self._ended = True
            return
        row, self._next = self._next, self._next + 1
        lane = lane_of(row, self.source.part, self.dealt.of)
        if lane in self._queues and row >= self._row(lane, self._wanted[lane]):
            # A copy: what orjson wrote keeps its first buffer, of a kilobyte and more.
            self._queues[lane].append(bytes(memoryview(line)))
            self.queued += len(line) + _ENTRY_BYTES
            self._unreported += len(line) + _ENTRY_BYTES

    def _put_mark(self) -> None:
        """Remember where the source stands, and forget the marks that no lane will begin at."""
        if not isinstance(self.source.lines, Markable) or (
            self._marks and self._marks[-1][0] >= self._next
        ):
            return
        state = self.source.lines.mark()
        if state is None:
            return
        first = min(self._row(lane, wanted) for lane, wanted in self._wanted.items())
        useful = [k for k, mark in enumerate(self._marks) if mark[0] <= first]
        self._marks = [*self._marks[useful[-1] if useful else 0 :], (self._next, state)]

    def _row(self, lane: int, at: int) -> int:
        """Number of a record of a lane among all."""
        first: int = (lane - self.source.part) % self.dealt.of
        return first + at * self.dealt.of


def _parsed(cursor: Cursor) -> tuple[int, Mark | None]:
    if isinstance(cursor, list):
        at, row, state = cursor
        return at, (row, state)
    return cursor or 0, None

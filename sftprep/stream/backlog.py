"""A bound on the records read by a stream before they can be used.

Lanes take turns, one pack each. A source that is read from its start serves all of them with one
iterator, so while one lane looks for its next sequence, the records of the other lanes are queued.

1. While few bytes are queued, nothing happens.
2. Above `READ_AHEAD_FROM`, the lanes whose next block is queued read it into their own windows,
   ahead of their turn: after each block of the reading lane, and within it after each `BLOCK_BYTES`
   that were queued. This changes no pack, since the window of a lane depends only on the records of
   that lane.
3. A lane whose window is full does not read ahead. If all other lanes are full and more than
   `MOST_QUEUED` is queued, the reading lane starves, which is an error.

While a window has room, the queues hold at most `READ_AHEAD_FROM`, or less than a block per lane.

In a source without any sequence no window is ever full. For such a source, consecutive records
without a sequence are counted, and their bytes, over all lanes.
"""

from __future__ import annotations

from collections.abc import Mapping

from sftprep.errors import EmptyInput, setting
from sftprep.stream.lane import Lane, LaneState
from sftprep.stream.settings import CHECK_SETTINGS
from sftprep.stream.sources.base import Block, Cursor, Reader

READ_AHEAD_FROM = 64 << 20
"""Bytes of queued records above which lanes read ahead."""
MOST_QUEUED = 256 << 20
"""Maximum bytes of queued records, in addition to the windows of the lanes."""
MOST_WITHOUT_SEQUENCE = 1_000_000
"""Maximum number of consecutive records without a sequence, over all lanes."""
MOST_BYTES_WITHOUT_SEQUENCE = 4 << 30
"""Maximum bytes of consecutive records without a sequence: a million records of 4 KiB."""


class Backlog:
    """The queued records of one reader, and a count of those without a sequence.

    Only consecutive records without a sequence are counted.

    Attributes:
        reader: The reader, which was opened with the method `on_queued` of this object.
        lanes: The lanes that may read ahead; none until all of them are restored.
    """

    reader: Reader

    def __init__(self) -> None:
        self.lanes: Mapping[int, Lane] = {}
        self._records, self._bytes = 0, 0  # consecutive records without a sequence
        self._is_reading_ahead = False  # guards against recursion through `on_queued`

    def restore(self, lanes: Mapping[int, Lane], states: Mapping[int, LaneState]) -> None:
        """Restore lanes from states, reading the blocks of their windows again.

        The lanes take turns, one block each, and lanes whose block is queued come first: restoring
        one lane after the other would queue the windows of all.
        """
        restoring = {
            number: lane.restore(states[number])
            for number, lane in lanes.items()
            if number in states
        }
        cursors: dict[int, Cursor] = {}  # by lane, of the block that it reads next
        turns = list(restoring)
        while restoring:
            for number in turns:
                try:
                    cursors[number] = next(restoring[number])
                except StopIteration:
                    del restoring[number]
            turns = list(restoring)
            if self.reader.queued > READ_AHEAD_FROM:
                queued = [n for n in turns if self.reader.has_queued(n, cursors[n])]
                turns = queued or turns
                self._read_ahead([lane for n, lane in lanes.items() if n not in restoring])

    def after_block(self, lane: Lane, block: Block, sequences: int) -> None:
        """Count a block of a lane, and let the other lanes read ahead.

        Raises:
            EmptyInput: Too many consecutive records have no sequence, or too much is queued.
        """
        if sequences:
            self._records, self._bytes = 0, 0
        else:
            self._records += len(block.origins)
            self._bytes += sum(len(group.data) for group in block.groups)
        if self._records >= MOST_WITHOUT_SEQUENCE or self._bytes >= MOST_BYTES_WITHOUT_SEQUENCE:
            raise EmptyInput(
                f"{self._records:,} records in a row of {self.reader.reading}"
                f" ({self._bytes / 2**20:,.0f} MiB) gave no sequence that can be trained on"
                f" ({dict(lane.counts)} in lane {lane.number})",
                remedy=CHECK_SETTINGS,
            )
        self.on_queued(lane.number)

    def on_queued(self, number: int) -> None:
        """Let the other lanes read ahead if much is queued for them.

        Args:
            number: The lane that is reading.

        Raises:
            EmptyInput: Too much is queued, and none of the other lanes has room for it.
        """
        lane = self.lanes.get(number)
        if lane is None or self._is_reading_ahead or self.reader.queued <= READ_AHEAD_FROM:
            return
        self._is_reading_ahead = True
        try:
            others = [other for other in self.lanes.values() if other is not lane]
            self._read_ahead(others)
        finally:
            self._is_reading_ahead = False
        if (
            others
            and self.reader.queued > MOST_QUEUED
            and not any(other.can_read_ahead() for other in others)
        ):
            raise self._starved_error(lane)

    def _read_ahead(self, lanes: list[Lane]) -> None:
        """Let lanes read what is queued for them, until few bytes are queued."""
        ready = lanes
        while ready and self.reader.queued > READ_AHEAD_FROM:
            # A lane with less than a block in its queue would read the source, which would add to
            # the queues.
            ready = [lane for lane in lanes if lane.can_read_ahead() and lane.has_queued()]
            for lane in ready:
                lane.read_ahead()

    def _starved_error(self, lane: Lane) -> EmptyInput:
        counts = lane.counts
        return EmptyInput(
            f"lane {lane.number} of {self.reader.reading} got"
            f" {counts['sequences']:,} sequences from {counts['records']:,} records, and while it"
            f" looked for more, {self.reader.queued / 2**20:,.0f} MiB of records were queued for"
            f" the other lanes, of at most {MOST_QUEUED >> 20} MiB",
            remedy=[
                "shuffle the source, so that every lane gets records that can be trained on",
                f"use {setting('lanes', 1)}, which needs no queue",
                CHECK_SETTINGS,
            ],
        )

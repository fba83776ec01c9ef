"""A bound on the records that a stream reads and cannot use yet.

Lanes take turns, a pack each. A source that is read from its start serves all of them with one
iterator, so while one lane looks for its next sequence, the records of the other lanes queue up.

1. While few bytes are queued, nothing happens.
2. Above `READ_AHEAD_FROM`, the lanes whose next block is queued read it into their own windows,
   ahead of their turn: after each block of the lane that is reading, and within it after each
   `BLOCK_BYTES` that were queued. The packs do not change, since the window of a lane depends on
   the records of that lane only.
3. A lane whose window is full reads nothing ahead. Where all others are full and more than
   `MOST_QUEUED` is queued, the lane that is reading starves: that is an error.

So the queues hold `READ_AHEAD_FROM` at most, or what is less than a block for each lane, as long as
a window has room.

A source that never gives a sequence has no lane with a full window; for it, the records in a row
that gave none are counted, and their bytes, over all lanes.
"""

from __future__ import annotations

from collections.abc import Mapping

from sftprep.errors import EmptyInput
from sftprep.stream.lane import Lane, LaneState
from sftprep.stream.sources.base import Block, Cursor, Reader

READ_AHEAD_FROM = 64 << 20
"""Bytes of queued records."""
MOST_QUEUED = 256 << 20
"""Bytes of queued records beyond what the windows of the lanes hold."""
MOST_WITHOUT_SEQUENCE = 1_000_000
"""Records in a row, over all lanes."""
MOST_BYTES_WITHOUT_SEQUENCE = 4 << 30
"""Bytes of records in a row, over all lanes: a million records of 4 KiB."""


class Backlog:
    """What the lanes of one reader have read for nothing, or before it was needed.

    lanes: those that may read ahead; none until all of them stand where the stream stands. reader:
    theirs, opened with `on_queued` of this.
    """

    reader: Reader

    def __init__(self) -> None:
        self.lanes: Mapping[int, Lane] = {}
        self._records, self._bytes = 0, 0  # in a row without a sequence
        self._reading_ahead = False

    def restore(self, lanes: Mapping[int, Lane], states: Mapping[int, LaneState]) -> None:
        """Let lanes stand where others stood, which takes the blocks that these held.

        The lanes take turns, a block each, and those whose block is queued come first: one lane
        after the other would queue the windows of all.
        """
        restored = {
            number: lane.restore(states[number])
            for number, lane in lanes.items()
            if number in states
        }
        cursors: dict[int, Cursor] = {}
        turns = list(restored)
        while restored:
            for number in turns:
                try:
                    cursors[number] = next(restored[number])
                except StopIteration:
                    del restored[number]
            turns = list(restored)
            if self.reader.queued > READ_AHEAD_FROM:
                queued = [n for n in turns if self.reader.has_queued(n, cursors[n])]
                turns = queued or turns
                self._read_ahead([lane for n, lane in lanes.items() if n not in restored])

    def after_block(self, lane: Lane, block: Block, sequences: int) -> None:
        """Count a block that a lane read, and let the others read where much is queued for them.

        Raises:
            EmptyInput: very many records in a row gave no sequence, or too much is queued.
        """
        if sequences:
            self._records, self._bytes = 0, 0
        else:
            self._records += len(block.origins)
            self._bytes += sum(len(piece.data) for piece in block.pieces)
        if self._records >= MOST_WITHOUT_SEQUENCE or self._bytes >= MOST_BYTES_WITHOUT_SEQUENCE:
            raise EmptyInput(
                f"{self._records:,} records in a row of {self.reader.reading}"
                f" ({self._bytes / 2**20:,.0f} MiB) gave no sequence that can be trained on"
                f" ({dict(lane.counts)} in lane {lane.number})",
                remedy="check --format, --train-on and --max-length, and that the source is the"
                " one you meant",
            )
        self.on_queued(lane.number)

    def on_queued(self, number: int) -> None:
        """Let the other lanes read where much is queued for them.

        Args:
            number: the lane that is reading.

        Raises:
            EmptyInput: too much is queued, and none of the others has room for it.
        """
        lane = self.lanes.get(number)
        if lane is None or self._reading_ahead or self.reader.queued <= READ_AHEAD_FROM:
            return
        self._reading_ahead = True
        try:
            others = [other for other in self.lanes.values() if other is not lane]
            self._read_ahead(others)
        finally:
            self._reading_ahead = False
        if (
            others
            and self.reader.queued > MOST_QUEUED
            and not any(other.can_read_ahead() for other in others)
        ):
            raise self._starved(lane)

    def _read_ahead(self, lanes: list[Lane]) -> None:
        """Let lanes read what is queued for them until few bytes are queued."""
        ready = lanes
        while ready and self.reader.queued > READ_AHEAD_FROM:
            # A lane with less than a block in its queue would read the source, and fill the queues
            # further.
            ready = [lane for lane in lanes if lane.can_read_ahead() and lane.has_queued()]
            for lane in ready:
                lane.read_ahead()

    def _starved(self, lane: Lane) -> EmptyInput:
        counts = lane.counts
        return EmptyInput(
            f"lane {lane.number} of {self.reader.reading} got"
            f" {counts['sequences']:,} sequences from {counts['records']:,} records, and while it"
            f" looked for more, {self.reader.queued / 2**20:,.0f} MiB of records were queued for"
            f" the other lanes ({MOST_QUEUED >> 20} MiB is the most)",
            remedy="shuffle the source, so that every lane gets records that can be trained on, or"
            " give --lanes 1, which needs no queue; check --format, --train-on and --max-length",
        )

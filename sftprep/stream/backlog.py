"""A bound on the records that a stream reads and cannot use yet.

Lanes take turns, a pack each. A source that is read from its start serves all of them with one
iterator, so while one lane looks for its next sequence, the records of the other lanes queue up.

1. While few bytes are queued, nothing happens.
2. Above `READ_AHEAD_FROM`, each block of the lane that is reading lets every other lane read one
   block into its own window, ahead of its turn. The packs do not change, since the window of a lane
   depends on the records of that lane only.
3. A lane whose window is full reads nothing ahead. Where all others are full and more than
   `MOST_QUEUED` is queued, the lane that is reading starves: that is an error.

A source that never gives a sequence has no lane with a full window; for it, the records in a row
that gave none are counted, over all lanes.
"""

from __future__ import annotations

from collections.abc import Mapping

from sftprep.errors import EmptyInput
from sftprep.stream.lane import Lane
from sftprep.stream.sources.base import Reader

READ_AHEAD_FROM = 64 << 20
"""Bytes of queued records."""
MOST_QUEUED = 256 << 20
"""Bytes of queued records beyond what the windows of the lanes hold."""
MOST_WITHOUT_SEQUENCE = 1_000_000
"""Records in a row, over all lanes."""


class Backlog:
    """What the lanes of one reader have read for nothing, or before it was needed.

    lanes: those that may read ahead; none until all of them stand where the stream stands.
    """

    def __init__(self, reader: Reader) -> None:
        self.lanes: Mapping[int, Lane] = {}
        self._reader = reader
        self._without_sequence = 0  # records in a row
        self._reading_ahead = False

    def after_block(self, lane: Lane, records: int, sequences: int) -> None:
        """Count a block that a lane read, and let the others read where much is queued for them.

        Raises:
            EmptyInput: very many records in a row gave no sequence, or too much is queued.
        """
        self._without_sequence = 0 if sequences else self._without_sequence + records
        if self._without_sequence >= MOST_WITHOUT_SEQUENCE:
            raise EmptyInput(
                f"{self._without_sequence:,} records in a row of {self._reader.reading} gave no"
                f" sequence that can be trained on ({dict(lane.counts)} in lane {lane.number})",
                remedy="check --format, --train-on and --max-length, and that the source is the"
                " one you meant",
            )
        if self._reading_ahead or self._reader.queued <= READ_AHEAD_FROM:
            return
        self._reading_ahead = True
        try:
            others = [other for other in self.lanes.values() if other is not lane]
            has_read = [other.read_ahead() for other in others]
        finally:
            self._reading_ahead = False
        if others and not any(has_read) and self._reader.queued > MOST_QUEUED:
            raise self._starved(lane)

    def _starved(self, lane: Lane) -> EmptyInput:
        counts = lane.counts
        return EmptyInput(
            f"lane {lane.number} of {self._reader.reading} got"
            f" {counts['sequences']:,} sequences from {counts['records']:,} records, and while it"
            f" looked for more, {self._reader.queued / 2**20:,.0f} MiB of records were queued for"
            f" the other lanes ({MOST_QUEUED >> 20} MiB is the most)",
            remedy="shuffle the source, so that every lane gets records that can be trained on, or"
            " give --lanes 1, which needs no queue; check --format, --train-on and --max-length",
        )

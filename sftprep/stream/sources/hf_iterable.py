"""A `datasets.IterableDataset` with many shards, assigned to the lanes.

Each lane resumes from the state of its own shards, so no record is read again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from sftprep.errors import source_name
from sftprep.sources.readers.to_jsonl import iter_lines
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
from sftprep.stream.sources.sequential import BLOCK_ROWS

DATASET_NAME = "the data set"
"""The name of every `datasets.IterableDataset` in errors and in the identity of a stream, so it
must not change: `sfttrain` and the states of earlier streams depend on it."""


@dataclass(frozen=True)
class ShardedDataset:
    """An IterableDataset with at least as many shards as there are lanes.

    Attributes:
        data: The dataset; lane k has the shards k, k + lanes, ...
        format: The format of the records.
        strip_nulls: Whether keys with the value null are removed.
        part: The number of the first part; each lane is a part.
    """

    data: Any
    format: str
    strip_nulls: bool = False
    part: int = 0

    @property
    def identity(self) -> Any:
        """Return the number of shards."""
        return ["shards", int(self.data.num_shards)]

    def open(self, assignment: LaneAssignment) -> Reader:
        """Start or resume a pass; each lane has its own iterator."""
        return _ShardReader(self, assignment)

    def locate(self, origin: int) -> tuple[str, int]:
        """Return the shards of the lane as a slice, and the number of the record in them."""
        lane = (origin >> PART_BITS) - self.part
        return f"shards {lane}::", (origin & ((1 << PART_BITS) - 1)) + 1


def can_resume_exactly(data: Any) -> bool:
    """Return whether an IterableDataset resumes from its `state_dict` exactly.

    An exact resume loses no records. Datasets with a shuffle buffer do not resume exactly:
    `datasets` loses the content of the buffer. The stream then iterates over the records again.
    """
    names: set[str] = set()
    # Datasets are nested: collect the types of all levels.
    waiting, seen = [getattr(data, "_ex_iterable", None)], set[int]()
    while waiting:
        iterable = waiting.pop()
        if id(iterable) in seen:
            continue
        seen.add(id(iterable))
        names.add(type(iterable).__name__)
        inner = getattr(iterable, "ex_iterable", None)
        waiting += [] if inner is None else [inner]
        waiting += getattr(iterable, "ex_iterables", None) or []
    # Formatted tables are batched again, which may lose rows according to `datasets`.
    is_formatted = getattr(data, "_formatting", None) is not None
    return (
        not is_formatted
        and hasattr(data, "load_state_dict")
        and not any("Shuffled" in name or name == "NoneType" for name in names)
    )


class _ShardReader:
    """A reader of shards, one dataset per lane.

    A cursor is the number of earlier records of the lane, and the state of its dataset there. The
    state is None if the dataset cannot resume exactly; the records are then iterated again.
    """

    queued = 0  # each lane reads its own shards

    def __init__(self, source: ShardedDataset, assignment: LaneAssignment) -> None:
        self.source, self.assignment = source, assignment
        self.reading = source_name(DATASET_NAME)
        self._is_exact = can_resume_exactly(source.data)
        # By lane: the number of records that its shards have returned before they raised.
        self._returned: dict[int, int] = {}
        # By lane: the number of records that were read, the dataset, and its iterator.
        self._open: dict[int, tuple[int, Any, Iterator[Any]]] = {}

    def has_queued(self, _lane: int, _cursor: Cursor) -> bool:
        return False

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        at, state = cursor or (0, None)
        num_lanes = self.assignment.num_lanes
        self.reading = f"shards {lane}::{num_lanes} of {source_name(DATASET_NAME)}"
        # Removed until the block is complete, so that an iterator that raises is not used again.
        position, data, rows = self._open.pop(lane, (-1, None, iter(())))
        if position != at:
            data = self._shards_of(lane)
            if state is not None:
                data.load_state_dict(copy.deepcopy(state))
            rows = iter(data) if state is not None else islice(iter(data), at, None)
        lines: list[bytes] = []
        size = 0
        try:
            for line in iter_lines(islice(rows, BLOCK_ROWS), strip_nulls=self.source.strip_nulls):
                lines.append(line)
                size += len(line)
                if size >= BLOCK_BYTES:
                    break
        except Exception:
            self._returned[lane] = max(at + len(lines), self._returned.get(lane, 0))
            raise
        if len(lines) < BLOCK_ROWS and size < BLOCK_BYTES and lane in self._returned:
            self._reject_early_end(lane, at, at + len(lines))
        if not lines:
            return None
        after = at + len(lines)
        self._open[lane] = (after, data, rows)
        origins = np.arange(at, after, dtype=np.int64) + ((self.source.part + lane) << PART_BITS)
        groups = (LineGroup(b"".join(lines), self.source.format),)
        next_state = copy.deepcopy(data.state_dict()) if self._is_exact else None
        return Block(groups, origins, [after, next_state])

    def _shards_of(self, lane: int) -> Any:
        """Return the dataset with the shards of a lane, in the order of the pass."""
        num_lanes = self.assignment.num_lanes
        data = self.source.data.shard(num_shards=num_lanes, index=lane, contiguous=False)
        if hasattr(data, "set_epoch"):
            data.set_epoch(self.assignment.epoch)
        return data

    def _reject_early_end(self, lane: int, at: int, end: int) -> None:
        """Raise SourceError if the shards end before an already returned record.

        This may happen after the shards raised an error.

        Args:
            lane: The lane of the shards.
            at: The number of records before the last block, which were all returned.
            end: The number of records at which the shards ended.
        """
        is_early = end < self._returned[lane]
        # Shards that resume from a state do not show whether the records before it still exist.
        if not is_early and end == at > 0:
            is_early = next(islice(iter(self._shards_of(lane)), at - 1, None), None) is None
        if is_early:
            raise early_end(self.reading)

"""A `datasets.IterableDataset` whose lanes are its shards: each goes on from its own state, so a
resume costs nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from sftprep.sources.readers.to_jsonl import iter_lines
from sftprep.stream.sources.base import (
    BLOCK_BYTES,
    PART_BITS,
    Block,
    Cursor,
    LaneAssignment,
    Piece,
    Reader,
)
from sftprep.stream.sources.sequential import ROWS


@dataclass(frozen=True)
class ShardedDataset:
    """data: an IterableDataset with at least as many shards as there are lanes; lane k has the
    shards k, k + lanes, ..."""

    data: Any
    format: str
    strip_nulls: bool = False
    part: int = 0

    @property
    def identity(self) -> Any:
        """How many shards it has."""
        return ["shards", int(self.data.num_shards)]

    def open(self, dealt: LaneAssignment) -> Reader:
        """Each lane has an iterator of its own."""
        return _ShardReader(self, dealt)

    def locate(self, origin: int) -> tuple[str, int]:
        """The lane, as the shards it has, and the number of the record in it."""
        lane = (origin >> PART_BITS) - self.part
        return f"shards {lane}::", (origin & ((1 << PART_BITS) - 1)) + 1


def goes_on_exactly(data: Any) -> bool:
    """Whether an IterableDataset goes on from its `state_dict` where it was.

    Shuffle buffers do not: `datasets` fills them anew and loses what they held. The stream then
    passes what was read once more.
    """
    waiting, names = [getattr(data, "_ex_iterable", None)], set()
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        names.add(type(one).__name__)
        inner = getattr(one, "ex_iterable", None)
        waiting += [] if inner is None else [inner]
        waiting += getattr(one, "ex_iterables", None) or []
    # Tables that are put together anew may lose some rows too, says `datasets`.
    plain = getattr(data, "_formatting", None) is None
    return (
        plain
        and hasattr(data, "load_state_dict")
        and not any("Shuffled" in name or name == "NoneType" for name in names)
    )


class _ShardReader:
    """Cursor: how many records of the lane come before, and the state of its data set there (None:
    pass them again)."""

    queued = 0

    def __init__(self, source: ShardedDataset, dealt: LaneAssignment) -> None:
        self.source, self.dealt = source, dealt
        self.reading = "the data set"
        self._exact = goes_on_exactly(source.data)
        self._open: dict[int, tuple[int, Any, Iterator[Any]]] = {}

    def has_queued(self, _lane: int, _cursor: Cursor) -> bool:
        return False

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        at, state = cursor or (0, None)
        self.reading = f"shards {lane}::{self.dealt.of} of the data set"
        position, data, rows = self._open.pop(lane, (-1, None, iter(())))
        if position != at:
            data = self.source.data.shard(num_shards=self.dealt.of, index=lane, contiguous=False)
            if hasattr(data, "set_epoch"):
                data.set_epoch(self.dealt.epoch)
            if state is not None:
                data.load_state_dict(copy.deepcopy(state))
            rows = iter(data) if state is not None else islice(iter(data), at, None)
        lines: list[bytes] = []
        size = 0
        # Raises what the source raises: the iterator is dropped then.
        for line in iter_lines(islice(rows, ROWS), strip_nulls=self.source.strip_nulls):
            lines.append(line)
            size += len(line)
            if size >= BLOCK_BYTES:
                break
        if not lines:
            return None
        after = at + len(lines)
        self._open[lane] = (after, data, rows)
        origins = np.arange(at, after, dtype=np.int64) + ((self.source.part + lane) << PART_BITS)
        pieces = (Piece(b"".join(lines), self.source.format),)
        return Block(
            pieces, origins, [after, copy.deepcopy(data.state_dict()) if self._exact else None]
        )

"""The rule by which records are dealt to lanes, the same for a stream and for a build that packs in
windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.sources.discovery.file_types import kind_of
from sftprep.sources.partition import Partition
from sftprep.sources.readers.lines import compression, open_regular, unreadable

_SMALLEST, _LARGEST = 4 * 1024, 256 * 1024
_BLOCKS_A_LANE = 8


def is_plain(file: str) -> bool:
    """Whether a file is dealt by byte ranges: lines that are not compressed."""
    return kind_of(file) == "lines" and compression(file) is None


def block_bytes(sizes: Sequence[int], lanes: int) -> int:
    """Bytes of a block of plain files: a power of two that gives each lane several, and 256 KiB for
    all that is large."""
    wanted = max(sum(sizes) // (lanes * _BLOCKS_A_LANE), 1)
    return min(max(1 << (wanted.bit_length() - 1), _SMALLEST), _LARGEST)


def lane_of(place: Any, part: int, lanes: int) -> Any:
    """The lane of block `place` of a plain file, or of row `place` of any other input: one after
    the other.

    part: number of the input; each begins one lane further.
    """
    return (place + part) % lanes


def line_starts(data: bytes, begin: int) -> NDArray[np.int64]:
    """Position of the first byte of each line: int64 [lines]. begin: that of the first."""
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10) + 1
    starts = np.concatenate((np.zeros(min(1, len(data)), np.int64), ends))
    return starts[starts < len(data)] + begin


@dataclass(frozen=True, slots=True)
class Places:
    """What decides the lanes of a partition's records: int64 [n], the block of a plain file that
    each one's line starts in, or (rows) its line in the partition, to which the lines of the
    partitions before are to be added."""

    numbers: NDArray[np.int64]
    rows: bool


def places_of(partition: Partition, data: bytes, lines: NDArray[np.int64], block: int) -> Places:
    """The places of records. data: the lines of the partition; lines: int64 [n], that of each
    record in it; block: bytes."""
    if partition.payload is not None or partition.strip_nulls or not is_plain(partition.file):
        return Places(lines, rows=True)
    begin = partition.start
    if begin:
        with unreadable(partition.file), open_regular(partition.file) as file:
            file.seek(begin - 1)
            begin += len(file.readline()) - 1
    return Places(line_starts(data, begin)[lines] // block, rows=False)

"""The assignment of records to lanes, for streams and for builds in windows.

A plain file of lines is cut into blocks of equal size, and a record belongs to the block in which
its line starts; the blocks are assigned to the lanes in turn. Of every other input, the rows are
assigned in turn. A build with the same lanes therefore gives each lane the records, in the order,
that a stream gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.sources.discovery.file_types import kind_of
from sftprep.sources.partition import Partition
from sftprep.sources.readers.lines import (
    LINE_AHEAD,
    compression,
    convert_os_errors,
    open_regular,
)

_SMALLEST, _LARGEST = 4 * 1024, 256 * 1024
_BLOCKS_PER_LANE = 8


def is_plain(file: str) -> bool:
    """Return whether the blocks of a file are byte ranges of uncompressed lines."""
    return kind_of(file) == "lines" and compression(file) is None


def block_bytes(sizes: Sequence[int], lanes: int) -> int:
    """Return the size of a block of plain files, in bytes.

    It is a power of two from 4 KiB to 256 KiB, small enough that each lane has several blocks.

    Args:
        sizes: The sizes of the plain files in bytes.
        lanes: The number of lanes.
    """
    wanted = max(sum(sizes) // (lanes * _BLOCKS_PER_LANE), 1)
    return min(max(1 << (wanted.bit_length() - 1), _SMALLEST), _LARGEST)


def lane_of(position: Any, part: int, lanes: int) -> Any:
    """Return the lane of a block or row, or of an array of them.

    Args:
        position: The number of a block of a plain file, or of a row of any other input.
        part: The number of the input; each input starts one lane later than the one before, so
            that many short inputs do not all go to the first lane.
        lanes: The number of lanes.
    """
    return (position + part) % lanes


def line_starts(data: bytes, begin: int) -> NDArray[np.int64]:
    """Return the position of the first byte of each line: int64 [lines].

    Args:
        data: Whole lines.
        begin: The position of their first byte in the file.
    """
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10) + 1
    starts = np.concatenate((np.zeros(min(1, len(data)), np.int64), ends))
    return starts[starts < len(data)] + begin


@dataclass(frozen=True, slots=True)
class LanePositions:
    """The positions of a partition's sequences for the choice of their lanes.

    Attributes:
        numbers: int64 [n]; for each sequence, the block in which the line of its record starts,
            or the row of its record within the partition.
        rows: Whether they are rows. The rows of earlier partitions must then be added.
    """

    numbers: NDArray[np.int64]
    rows: bool


def find_lane_positions(
    partition: Partition, data: bytes, lines: NDArray[np.int64], block: int
) -> LanePositions:
    """Return the positions of a partition's sequences for the choice of lanes.

    Args:
        partition: The partition.
        data: Its lines.
        lines: int64 [n]; for each sequence, the line of its record in the partition, 0-based.
        block: The size of a block in bytes.

    Raises:
        InputUnreadable: The file cannot be read.
    """
    if partition.payload is not None or partition.strip_nulls or not is_plain(partition.file):
        return LanePositions(lines, rows=True)
    begin = partition.start
    if begin:
        # A line across the start belongs to the previous partition, and is skipped.
        with (
            convert_os_errors(partition.file),
            open_regular(partition.file, read_ahead=LINE_AHEAD) as file,
        ):
            file.seek(begin - 1)
            begin += len(file.readline()) - 1
    return LanePositions(line_starts(data, begin)[lines] // block, rows=False)

"""Arrow IPC files and streams: runs of rows, and rows as lines of JSON.

Workers read the runs of rows. Unlike a row group of Parquet, a batch is cheap to read, so ranges of
rows may start and end within batches. `arrow_ipc` finds, reads and validates the batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from sftprep.sources.readers.array_content import has_content
from sftprep.sources.readers.arrow_ipc import ArrowFile, open_arrow
from sftprep.sources.readers.lines import FilePart
from sftprep.sources.readers.row_sizes import shares_values
from sftprep.sources.readers.table_lines import (
    Columns,
    check_column_names,
    check_row_count,
    convert_arrow_errors,
    image_columns,
    parts_of_batches,
    runs_of_batch,
    table_lines,
    text_bytes,
    wanted_fields,
)

_EXAMINED_BATCHES = 16
"""The batches of a file in which content is searched for; they are spread evenly over the file."""

_STREAMED = 8
"""A batch of more than this many targets is read by the driver: workers that read ranges of its
rows would each read the whole batch."""


def arrow_parts(file: str, target: int, columns: Columns = None) -> Iterator[FilePart]:
    """Yield runs of rows of about `target` bytes of an Arrow file or stream.

    Two kinds of batches are held in memory by the driver alone, as parts with a payload: those of
    more than `_STREAMED` targets, and all batches of a file whose columns refer to dictionaries.

    Args:
        file: The path.
        target: The size of a part in bytes.
        columns: The columns to read; None for all.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    with convert_arrow_errors(file):
        arrow = open_arrow(file)
        check_column_names(file, arrow.schema)
        if arrow.has_dictionaries:
            yield from parts_of_batches(arrow.read_in_order(), arrow.schema, 0, target, columns)
            return
        shares = any(shares_values(field.type) for field in wanted_fields(arrow.schema, columns))
        start = end = size = 0  # rows of the run, and its bytes
        for number, batch in enumerate(arrow.batches):
            if batch.rows == 0:
                # No range of rows includes it, so it is validated here: its header may claim to
                # have no rows because it is damaged.
                arrow.read(number)
            least = max(batch.length, batch.expanded)
            text = text_bytes(least, batch.rows, batch.values, arrow.schema, columns)
            if text > _STREAMED * target:
                if end > start:
                    yield start, end, None
                batches = [arrow.read(number)]
                yield from parts_of_batches(batches, arrow.schema, end, target, columns)
                start = end = arrow.first_rows[number + 1]
                size = 0
                continue
            for rows, run_bytes in (
                # Rows that share values may be much longer than the bytes of the batch.
                runs_of_batch(_read_batch(arrow, number), target, columns)
                if shares
                else _divide_evenly(batch.rows, text, target)
            ):
                end, size = end + rows, size + run_bytes
                if size >= target:
                    yield start, end, None
                    start, size = end, 0
        if end > start:
            yield start, end, None


def _divide_evenly(rows: int, size: int, target: int) -> Iterator[tuple[int, int]]:
    """Yield runs of about `target` bytes: the number of rows and their average bytes."""
    per_row = max(1, size // max(1, rows))
    step = max(1, target // per_row)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        yield count, count * per_row


def count_arrow_rows(file: str) -> int | None:
    """Return the number of rows of an Arrow file; None if it must be read from its start.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    with convert_arrow_errors(file):
        arrow = open_arrow(file)
        return None if arrow.has_dictionaries else int(arrow.first_rows[-1])


def read_arrow_rows(file: str, start: int, end: int, columns: Columns = None) -> bytes:
    """Return the rows [start, end) as lines of JSON.

    Raises:
        InputUnreadable: The file is damaged, has fewer rows, or cannot be read.
    """
    lines = []
    with convert_arrow_errors(file):
        arrow = open_arrow(file)
        check_row_count(file, arrow.first_rows[-1], end)
        for number in range(bisect_right(arrow.first_rows, start) - 1, len(arrow.batches)):
            first = arrow.first_rows[number]
            if first >= end:
                break
            part = _read_batch(arrow, number)[max(start - first, 0) : end - first]
            lines.append(table_lines(part, arrow.schema, columns))
    return b"".join(lines)


def arrow_columns(file: str) -> dict[str, bool]:
    """Return the columns of an Arrow file except images, and whether they may have content.

    A column without content in the batches that are examined may have content in others.

    Raises:
        InputUnreadable: The file is damaged or cannot be read.
    """
    with convert_arrow_errors(file):
        arrow = open_arrow(file)
        names = [name for name in arrow.schema.names if name not in image_columns(arrow.schema)]
        if arrow.has_dictionaries:  # its batches can only be read from the start
            return dict.fromkeys(names, True)
        number_of = len(arrow.batches)
        step = -(-number_of // _EXAMINED_BATCHES) or 1
        empty = set(names)
        for number in range(0, number_of, step):
            if not empty:
                break
            batch = _read_batch(arrow, number)
            empty = {name for name in empty if not has_content(batch.column(name))}
        return {name: name not in empty or step > 1 for name in names}


@lru_cache(maxsize=1)
def _read_batch(arrow: ArrowFile, number: int) -> Any:
    # The next partition usually starts in the batch in which this one ends.
    return arrow.read(number)

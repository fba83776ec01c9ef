"""The first records of an input, for the detection of its format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from sftprep.sources.readers.jsonl import parse_line

RECORDS_TO_INSPECT = 100
"""More than one, because the first records may be of another format."""


def first_records(lines: Iterable[bytes], limit: int) -> Iterator[dict[str, Any]]:
    """Yield the records among the first lines.

    Args:
        lines: The lines of an input.
        limit: The most lines that are read.
    """
    for line in islice(lines, limit):
        record = parse_line(line, 0)
        if isinstance(record, dict):
            yield record

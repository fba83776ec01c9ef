"""CSV and TSV files: every cell is text, exactly as it is written."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from sftprep.errors import InputUnreadable
from sftprep.sources.readers.lines import LARGEST_LINE, Piece, open_input
from sftprep.sources.readers.to_jsonl import UNUSABLE, rows_to_lines, unusable_line

_DELIMITERS = ",;\t|"
_JSON_COLUMNS = frozenset({"messages", "conversations"})
"""Columns that can hold nothing but JSON: their cells are read as such where they are an array."""


def delimited_pieces(file: str, target: int) -> Iterator[Piece]:
    """The rows below the header as lines of JSON, in pieces of about `target` bytes.

    The separator is a tab in .tsv files, else the first of , ; tab | that the header holds. Raises
    InputUnreadable where the file is damaged or its header names a column twice; a row with another
    number of cells is rejected by pass 1.
    """
    # A record may be as long as a line, and is checked as a whole; the limit is the library's own
    # and holds for the process.
    csv.field_size_limit(2 * LARGEST_LINE)
    with open_input(file) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        try:
            yield from _pieces(file, text, target)
        except csv.Error as error:
            raise InputUnreadable(
                f"{file} is no CSV that can be read: {error}", remedy="write the file again"
            ) from error
        except OSError as error:
            raise InputUnreadable(
                f"{file} is damaged or cut short: {error.strerror or error}",
                remedy="fetch or make the file again",
            ) from error


def _pieces(file: str, text: io.TextIOWrapper, target: int) -> Iterator[Piece]:
    first = text.readline(LARGEST_LINE)
    if len(first) == LARGEST_LINE:
        raise _long_header(file)
    delimiter = "\t" if ".tsv" in file else next((d for d in _DELIMITERS if d in first), ",")
    guard = _LineGuard(text, delimiter)
    # One reader for header and rows: a quoted name may hold a newline, so that the header goes on
    # behind the first line.
    reader = csv.reader(chain([first], guard), delimiter=delimiter, strict=True)
    header = next(reader, [])
    if guard.size > LARGEST_LINE:
        raise _long_header(file)
    guard.size = 0
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise InputUnreadable(
            f"{file} names the column {min(twice)!r} twice in its header",
            remedy="rename one of them",
        )
    lines: list[bytes] = []
    start = rows = size = 0
    for cells in reader:
        lines.append(_too_long(cells) if guard.size > LARGEST_LINE else _line(header, cells))
        guard.size = 0
        size += len(lines[-1])
        rows += 1
        if size >= target:
            yield start, rows, b"".join(lines)
            lines, size, start = [], 0, rows
    if lines:
        yield start, rows, b"".join(lines)


class _LineGuard(Iterator[str]):
    """The lines of a file for csv.reader, which bounds what it holds of a record.

    size: characters of the record so far; whoever takes a record sets it back. Beyond LARGEST_LINE,
    only what divides cells and records is handed on, with an x for everything in between.
    """

    def __init__(self, text: io.TextIOWrapper, delimiter: str) -> None:
        self.size = 0
        self._text = text
        self._ahead = ""
        """A character that was read after a \\r, and is not the \\n of the same line."""
        self._content = re.compile(f'[^"\\r\\n{re.escape(delimiter)}]+')
        self._quotes = re.compile('(?:"")+')

    def __next__(self) -> str:
        line = self._readline()
        if not line:
            raise StopIteration
        self.size += len(line)
        if len(line) < LARGEST_LINE and self.size <= LARGEST_LINE:
            return line
        self.size = LARGEST_LINE + 1
        parts = [self._outline(line)]
        while not line.endswith(("\n", "\r")) and (line := self._readline()):
            parts.append(self._outline(line))
        return "".join(parts)

    def _readline(self) -> str:
        """Read a line, or as much of it as may be held; never the first half of \\r\\n."""
        line, self._ahead = self._ahead, ""
        if line != "\r":
            line += self._text.readline(LARGEST_LINE)
        if line.endswith("\r"):
            self._ahead = self._text.read(1)
            if self._ahead == "\n":
                line, self._ahead = f"{line}\n", ""
        return line

    def _outline(self, line: str) -> str:
        # Two quotes are a quote in a cell, or a cell that is empty.
        return self._content.sub("x", self._quotes.sub("", line))


def _too_long(cells: list[str]) -> bytes:
    what = f"the row is longer than {LARGEST_LINE >> 20} MiB"
    return unusable_line("line_too_long", what, [cell[:40] for cell in cells[:8]])


def _long_header(file: str) -> InputUnreadable:
    return InputUnreadable(
        f"{file} has a header of more than {LARGEST_LINE >> 20} MiB",
        remedy="check that it is a CSV file, with names of columns in its first line",
    )


def _line(header: list[str], cells: list[str]) -> bytes:
    if not cells:
        return b"\n"
    if len(cells) != len(header):
        return unusable_line(
            "bad_row", f"the row has {len(cells)} cells, the header {len(header)}", cells
        )
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for name in _JSON_COLUMNS & row.keys():
        row[name] = _parsed(row[name])
    line = rows_to_lines([row])
    return _not_utf8(cells, header) or line if line.startswith(UNUSABLE) else line


def _not_utf8(cells: list[str], header: list[str]) -> bytes | None:
    """The line of a row with bytes that are no UTF-8, which were read as halves of surrogates; None
    for another."""
    for text in (*cells, *header):
        wrong = next((c for c in text if "\udc80" <= c <= "\udcff"), None)
        if wrong is not None:
            return unusable_line("bad_utf8", f"byte 0x{ord(wrong) - 0xDC00:02x} is not UTF-8", text)
    return None


def _parsed(cell: str) -> Any:
    import orjson

    try:
        return orjson.loads(cell) if cell.lstrip().startswith("[") else cell
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return cell

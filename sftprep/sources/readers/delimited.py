"""CSV and TSV files as lines of JSON, with cells as exact strings.

Types are not inferred: `007` would become 7, and `NA` would become null.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from sftprep.core.repeated_keys import find_repeated_key
from sftprep.errors import InputUnreadable
from sftprep.sources.readers.lines import LARGEST_LINE, FilePart, open_input
from sftprep.sources.readers.to_jsonl import UNUSABLE, rows_to_lines, unusable_line

_DELIMITERS = ",;\t|"
_BLANK_LINES = frozenset({"\n", "\r\n", "\r"})
"""Lines before the header that are skipped, as `csv` skips them between rows."""
_JSON_COLUMNS = frozenset({"messages", "conversations"})
"""Columns that can only contain JSON: their cells are parsed where they contain an array."""


def delimited_parts(file: str, target: int) -> Iterator[FilePart]:
    """Yield the rows below the header as lines of JSON, in parts.

    A part has about `target` bytes. The separator is a tab in .tsv files, else the first of , ;
    tab | that the header contains. A column without a name is named by its position, such as
    `column 3`. A row with another number of cells than the header is rejected in pass 1.

    Raises:
        InputUnreadable: The file is damaged, or its header names a column twice.
    """
    # The limit of the csv module is for a cell and for the whole process. It must not reject a cell
    # that `_LineGuard` accepts, because its error would end the reading of the file.
    csv.field_size_limit(2 * LARGEST_LINE)
    with open_input(file) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        try:
            yield from _file_parts(file, text, target)
        except csv.Error as error:
            raise InputUnreadable(
                f"{file} is not valid CSV: {error}", remedy="write the file again"
            ) from error
        except OSError as error:
            raise InputUnreadable(
                f"{file} is damaged or cut short: {error.strerror or error}",
                remedy="download or create the file again",
            ) from error


def _file_parts(file: str, text: io.TextIOWrapper, target: int) -> Iterator[FilePart]:
    first = text.readline(LARGEST_LINE)
    while first in _BLANK_LINES:
        first = text.readline(LARGEST_LINE)
    if len(first) == LARGEST_LINE:
        raise _header_too_long(file)
    delimiter = "\t" if ".tsv" in file else next((d for d in _DELIMITERS if d in first), ",")
    guard = _LineGuard(text, delimiter)
    # One reader for header and rows: a quoted name may contain a newline, so that the header may
    # continue after the first line.
    reader = csv.reader(chain([first], guard), delimiter=delimiter, strict=True)
    header = _name_columns(next(reader, []))
    if guard.size > LARGEST_LINE:
        raise _header_too_long(file)
    guard.size = 0
    duplicates = {name for name in header if header.count(name) > 1}
    if duplicates:
        raise InputUnreadable(
            f"{file} names the column {min(duplicates)!r} twice in its header",
            remedy="rename one of them",
        )
    lines: list[bytes] = []
    start = rows = size = 0
    for cells in reader:
        too_long = guard.size > LARGEST_LINE
        lines.append(_row_too_long(cells) if too_long else _to_line(header, cells))
        guard.size = 0
        size += len(lines[-1])
        rows += 1
        if size >= target:
            yield start, rows, b"".join(lines)
            lines, size, start = [], 0, rows
    if lines:
        yield start, rows, b"".join(lines)


class _LineGuard(Iterator[str]):
    """The lines of a file for csv.reader, with a limit on the memory for a record.

    Of a record longer than LARGEST_LINE, only the characters that separate cells and records are
    passed on, with an x for everything between them: csv.reader still finds the end of the record,
    without holding its content.
    """

    def __init__(self, text: io.TextIOWrapper, delimiter: str) -> None:
        self.size = 0  # characters of the current record; the caller resets it after each record
        self._text = text
        self._ahead = ""  # a character that was read after a \r and belongs to the next line
        self._content = re.compile(f'[^"\\r\\n{re.escape(delimiter)}]+')  # to be replaced by x
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
        """Read a line, up to LARGEST_LINE characters; never only the first half of \\r\\n."""
        line, self._ahead = self._ahead, ""
        if line != "\r":
            line += self._text.readline(LARGEST_LINE)
        if line.endswith("\r"):
            self._ahead = self._text.read(1)
            if self._ahead == "\n":
                line, self._ahead = f"{line}\n", ""
        return line

    def _outline(self, line: str) -> str:
        # Two quotes are a quote in a cell, or an empty cell: they separate nothing.
        return self._content.sub("x", self._quotes.sub("", line))


def _name_columns(header: list[str]) -> list[str]:
    """Return the names of the columns; one without a name gets its position, from 1.

    Example:
        ["", "question", " "]  ->  ["column 1", "question", "column 3"]
    """
    return [name if name.strip() else f"column {k}" for k, name in enumerate(header, 1)]


def _row_too_long(cells: list[str]) -> bytes:
    message = f"the row is longer than {LARGEST_LINE >> 20} MiB"
    return unusable_line("line_too_long", message, [cell[:40] for cell in cells[:8]])


def _header_too_long(file: str) -> InputUnreadable:
    return InputUnreadable(
        f"{file} has a header of more than {LARGEST_LINE >> 20} MiB",
        remedy="check that it is a CSV file whose first line has the names of the columns",
    )


def _to_line(header: list[str], cells: list[str]) -> bytes:
    if not cells:
        return b"\n"
    if len(cells) != len(header):
        return unusable_line(
            "bad_row", f"the row has {len(cells)} cells, the header {len(header)}", cells
        )
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for name in _JSON_COLUMNS & row.keys():
        row[name] = _parse_array(row[name])
    line = rows_to_lines([row])
    if line.startswith(UNUSABLE):
        return _reject_invalid_utf8(cells, header) or line
    return line


def _reject_invalid_utf8(cells: list[str], header: list[str]) -> bytes | None:
    """Return the rejection of a row with invalid UTF-8, or None."""
    for text in (*cells, *header):
        # The error handler `surrogateescape` decodes such bytes to these code points.
        wrong = next((c for c in text if "\udc80" <= c <= "\udcff"), None)
        if wrong is not None:
            return unusable_line("bad_utf8", f"byte 0x{ord(wrong) - 0xDC00:02x} is not UTF-8", text)
    return None


def _parse_array(cell: str) -> Any:
    import orjson

    try:
        if not cell.lstrip().startswith("["):
            return cell
        # Text that repeats a key stays text, so that the record is rejected where it is read.
        value = orjson.loads(cell)
        return value if find_repeated_key(cell, value) is None else cell
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return cell

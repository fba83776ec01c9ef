"""Lines of bytes as JSON objects, or as rejections with column and reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson

from sftprep.core.repeated_keys import count_keys_of_lines, find_repeated_keys
from sftprep.core.types import Rejected
from sftprep.sources.readers.lines import LARGEST_LINE
from sftprep.sources.readers.to_jsonl import OPAQUE, UNUSABLE

_BOM = b"\xef\xbb\xbf"
_EXCERPT_LENGTH = 200
_MOST_EXCERPT_BYTES = 4 * (_EXCERPT_LENGTH + 1)
"""Bytes that certainly contain the characters of an excerpt, and one more."""
_LINES_PARSED = 64
"""Lines that are parsed at once: few enough that their values stay in the cache of the processor
until they are read."""
_OPAQUE_VALUE = re.compile(r'\{"' + re.escape(OPAQUE) + r'":"([^"]*)"\}')
_OPAQUE_BYTES = OPAQUE.encode()


ParsedLine = tuple[int, bytes, dict[str, Any] | Rejected | None, str | None]


def split_lines(data: bytes) -> list[bytes]:
    """Return the lines of a partition, without their newlines.

    Only \\n ends a line: U+2028 and other line separators of Unicode are part of the text.
    """
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def parse_line(line: bytes, number: int) -> dict[str, Any] | Rejected | None:
    """Return the object on a line, its rejection, or None for whitespace.

    The JSON is strict: no NaN, no lone surrogates, at most 1,024 levels. A byte order mark before
    it is skipped. A list of objects is a conversation without the key `messages`. A line longer
    than LARGEST_LINE is rejected, because readers cut such lines off, and the start of a record may
    be valid JSON.

    Args:
        line: The bytes of the line.
        number: The number of the line within its partition, 0-based.

    Example:
        parse_line(b'{"text": "a"}', 0)  ->  {"text": "a"}
        parse_line(b'[{"role": "user"}]', 0)  ->  {"messages": [{"role": "user"}]}
        parse_line(b"[1]", 7)            ->  Rejected(line=7, column=1, reason="bad_row", ...)
    """
    if len(line) > LARGEST_LINE:
        message = f"the line is longer than {LARGEST_LINE >> 20} MiB"
        return Rejected(number, 0, "line_too_long", message, excerpt(line[:400]))
    # The usual line is parsed without any other test: this is the fastest path for valid records.
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _parse_unusual(line, number, error)
    if type(record) is dict:
        return record
    if type(record) is list and record and all(type(item) is dict for item in record):
        return {"messages": record}
    return Rejected(
        number, 1, "bad_row", f"a record is a JSON object, not {_json_type(record)}", excerpt(line)
    )


def parse_lines(data: bytes, lines: list[bytes]) -> Iterator[ParsedLine]:
    """Yield the number of each line, the line, what it contains, and a repeated key.

    See `parse_line`; the key is one that an object on the line has several times, or None.

    Args:
        data: The lines as one string of bytes.
        lines: The result of `split_lines`.
    """
    num_keys = count_keys_of_lines(data, lines)
    for first in range(0, len(lines), _LINES_PARSED):
        part = slice(first, first + _LINES_PARSED)
        records = [parse_line(line, number) for number, line in enumerate(lines[part], first)]
        found = find_repeated_keys(lines[part], records, num_keys[part])
        numbers = range(first, first + len(records))
        keys = [found.get(number - first) for number in numbers]
        yield from zip(numbers, lines[part], records, keys, strict=True)


def excerpt(line: bytes | str, column: int = 1) -> str:
    """Return the part of a line around a column, safe to print.

    Control characters and characters that change the direction of the text are escaped: an excerpt
    is shown on a terminal, and must not control it.
    """
    if isinstance(line, bytes):
        if column <= 1 and _OPAQUE_BYTES not in line:
            line = line[:_MOST_EXCERPT_BYTES]  # rejected lines may be many, and long
        text = line.decode("utf-8", "replace")
    else:
        text = line
    if column <= 1:
        # Shorter and clearer; elsewhere in the line, it would move the column.
        text = _OPAQUE_VALUE.sub(r"<\1>", text)
    start = max(0, column - 1 - _EXCERPT_LENGTH // 2) if len(text) > _EXCERPT_LENGTH else 0
    part = text[start : start + _EXCERPT_LENGTH]
    shown = part if part.isprintable() else "".join(map(_escape, part))
    return ("…" if start else "") + shown + ("…" if start + _EXCERPT_LENGTH < len(text) else "")


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def add_excerpts(rejected: list[Rejected], data: bytes) -> None:
    """Add an excerpt of its line to each rejected record of a partition without one.

    Args:
        rejected: The records.
        data: The lines of the partition.
    """
    without_excerpt = [record for record in rejected if not record.excerpt]
    if without_excerpt:
        lines = split_lines(data)
        for record in without_excerpt:
            record.excerpt = excerpt(lines[record.line])


def _parse_unusual(
    line: bytes, number: int, error: orjson.JSONDecodeError
) -> dict[str, Any] | Rejected | None:
    """Return the result of `parse_line` for a line other than plain JSON."""
    stripped = line.strip()
    if not stripped:
        return None
    if stripped.startswith(UNUSABLE):
        return _to_rejected(stripped[len(UNUSABLE) :], number)
    if stripped.startswith(_BOM):
        # Editors on Windows write the mark, and concatenation puts it within a file.
        return parse_line(stripped[len(_BOM) :], number)
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as wrong:
        # Columns are counted in characters, as orjson and editors do.
        column = len(line[: wrong.start].decode("utf-8", "replace")) + 1
        return Rejected(
            number,
            column,
            "bad_utf8",
            f"byte 0x{line[wrong.start]:02x} is not UTF-8",
            excerpt(line, column),
        )
    reason = "bad_unicode" if "surrogate" in error.msg else "bad_json"
    message = "half of a surrogate pair is not text" if reason == "bad_unicode" else error.msg
    return Rejected(number, error.colno, reason, message, excerpt(line, error.colno))


def _to_rejected(content: bytes, number: int) -> Rejected:
    """Return the rejection written by `unusable_line`.

    Other content is not JSON at all.
    """
    try:
        reason, message, shown = orjson.loads(content)
        return Rejected(number, 0, str(reason), str(message), excerpt(str(shown)))
    except (ValueError, TypeError):
        return Rejected(number, 1, "bad_json", "the line is not JSON", excerpt(content))


def _json_type(value: object) -> str:
    names = {
        list: "an array",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        int: "a number",
        float: "a number",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)

"""Lines of bytes to JSON objects; what is no object comes back as a `Rejected`, with its column and
reason."""

from __future__ import annotations

import re
from typing import Any

import orjson

from sftprep.core.types import Rejected
from sftprep.sources.readers.lines import LARGEST_LINE
from sftprep.sources.readers.to_jsonl import OPAQUE, UNUSABLE

_BOM = b"\xef\xbb\xbf"
_EXCERPT = 200
_OPAQUE_VALUE = re.compile(r'\{"' + re.escape(OPAQUE) + r'":"([^"]*)"\}')


def split_lines(data: bytes) -> list[bytes]:
    """Lines of a partition, without their newline; only \\n ends a line (U+2028 and the like are
    text)."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def parse_line(line: bytes, number: int) -> dict[str, Any] | Rejected | None:
    """The object on a line; None where the line is blank.

    Strict JSON: no NaN, no lone surrogates, at most 1,024 levels; a byte order mark before it is
    skipped. A line beyond LARGEST_LINE is rejected: readers cut such lines, and what is left may
    be valid JSON.
    """
    if len(line) > LARGEST_LINE:
        what = f"the line is longer than {LARGEST_LINE >> 20} MiB"
        return Rejected(number, 0, "line_too_long", what, excerpt(line[:400]))
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _unparsable(line, number, error)
    if type(record) is dict:
        return record
    return Rejected(
        number, 1, "bad_row", f"a record is a JSON object, not {_kind(record)}", excerpt(line)
    )


def excerpt(line: bytes | str, column: int = 1) -> str:
    """A piece of a line around a column, on one line, with control and direction-changing
    characters made visible."""
    text = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
    if column <= 1:
        text = _OPAQUE_VALUE.sub(r"<\1>", text)
    start = max(0, column - 1 - _EXCERPT // 2) if len(text) > _EXCERPT else 0
    piece = text[start : start + _EXCERPT]
    shown = "".join(
        c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"
        for c in piece
    )
    return ("…" if start else "") + shown + ("…" if start + _EXCERPT < len(text) else "")


def _unparsable(
    line: bytes, number: int, error: orjson.JSONDecodeError
) -> dict[str, Any] | Rejected | None:
    stripped = line.strip()
    if not stripped:
        return None
    if stripped.startswith(UNUSABLE):
        return _unusable(stripped[len(UNUSABLE) :], number)
    if stripped.startswith(_BOM):
        return parse_line(stripped[len(_BOM) :], number)
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as wrong:
        column = len(line[: wrong.start].decode("utf-8", "replace")) + 1
        return Rejected(
            number,
            column,
            "bad_utf8",
            f"byte 0x{line[wrong.start]:02x} is not UTF-8",
            excerpt(line, column),
        )
    reason = "bad_unicode" if "surrogate" in error.msg else "bad_json"
    what = "half of a surrogate pair cannot be text" if reason == "bad_unicode" else error.msg
    return Rejected(number, error.colno, reason, what, excerpt(line, error.colno))


def _unusable(written: bytes, number: int) -> Rejected:
    """What `rows_to_lines` wrote of a row that JSON cannot hold; anything else that looks like it
    is no JSON at all."""
    try:
        reason, message, shown = orjson.loads(written)
        return Rejected(number, 0, str(reason), str(message), excerpt(str(shown)))
    except (ValueError, TypeError):
        return Rejected(number, 1, "bad_json", "this is no JSON", excerpt(written))


def _kind(value: object) -> str:
    kinds = {
        list: "an array",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        int: "a number",
        float: "a number",
        dict: "an object",
    }
    return kinds.get(type(value), type(value).__name__)

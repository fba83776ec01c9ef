"""Rows of tables and iterables to lines of JSON bytes, so that pass 1 sees one kind of input.

Row k is line k + 1: what is said of lines (origins, places of errors) holds for rows. A row that
JSON cannot hold becomes a line that `sources.jsonl.parse_line` rejects with the reason written
here, so that it is stopped at or set aside as any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import orjson

from sftprep.core.chunking import in_groups

UNUSABLE = b"\x00unusable "
"""Starts the line of a row that JSON cannot hold; then a JSON array of reason, message and excerpt.
No JSON starts so."""

OPAQUE = "$opaque"
"""Key of the object that stands for a whole column that is no JSON (`{"$opaque": "bytes"}`): it
hurts only where it is read."""

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
_LARGEST_INT = 2**63


def rows_to_lines(rows: Iterable[Mapping[str, Any]], *, strip_nulls: bool = False) -> bytes:
    """One line of JSON a row, each with its newline.

    NumPy values and arrays, dates, decimals and integers of any size are written; a missing number
    (NaN) that is a whole column is null, as it is in pandas. Images and bytes that are a whole
    column become `{"$opaque": ...}`; inside other values they make the row unusable, as do NaN,
    half surrogates and keys that are no text; the message names the column. strip_nulls: keys with
    null are left out at every depth, as `trl.trainer.utils.remove_none_values` does; TRL itself
    keeps them, and so does this by default.
    """
    return b"".join(iter_lines(rows, strip_nulls=strip_nulls))


def json_lines(rows: Iterable[Mapping[str, Any]], *, size: int = 2**20) -> Iterator[bytes]:
    """Yield rows as lines of JSON, in runs of about `size` bytes.

    A row that cannot be written as JSON becomes a line that a build rejects, with its reason.
    """
    return map(b"".join, in_groups(iter_lines(rows), size))


def iter_lines(rows: Iterable[Mapping[str, Any]], *, strip_nulls: bool = False) -> Iterator[bytes]:
    """The lines of `rows_to_lines`, one by one as rows come."""
    for row in rows:
        if not isinstance(row, Mapping):
            yield unusable_line(
                "bad_row", f"a row is a mapping of names to values, not a {type(row).__name__}", row
            )
            continue
        whole = row if type(row) is dict else dict(row)
        try:
            line = _line(without_nulls(whole) if strip_nulls else whole)
        except RecursionError:
            line = unusable_line("bad_row", "the row is nested too deeply", row)
        yield line


def without_nulls(value: Any) -> Any:
    """Without the keys whose value is None, at every depth; None in a list stays. Source: TRL 1.16
    `remove_none_values`."""
    if isinstance(value, list):
        return [without_nulls(item) if isinstance(item, (dict, list)) else item for item in value]
    kept = ((key, item) for key, item in value.items() if item is not None)
    return {
        key: without_nulls(item) if isinstance(item, (dict, list)) else item for key, item in kept
    }


def strip_null_lines(data: bytes) -> bytes:
    """Lines of JSON objects without the keys whose value is null, at every depth; a line that is no
    object stays as it is."""
    return b"\n".join(_stripped(line) for line in data.split(b"\n")) if b"null" in data else data


def unusable_line(reason: str, message: str, value: object) -> bytes:
    """The line of a row that cannot be used: `parse_line` rejects it with this reason and message,
    and shows the value."""
    try:
        shown = f"{value!r:.200}"
    except Exception:
        # An integer of more than 4,300 digits, values nested too deeply, or an object of the user.
        shown = f"a {type(value).__name__}"
    return (
        UNUSABLE
        + orjson.dumps(
            [
                reason,
                message.encode("utf-8", "replace").decode(),
                shown.encode("utf-8", "replace").decode(),
            ]
        )
        + b"\n"
    )


def _stripped(line: bytes) -> bytes:
    if b"null" not in line:
        return line
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return line
    return orjson.dumps(without_nulls(row)) if isinstance(row, dict) else line


def _line(row: dict[str, Any]) -> bytes:
    try:
        line = orjson.dumps(row, default=_plain, option=_OPTIONS)
    except TypeError:
        return _column_by_column(row)
    # orjson writes NaN as null: only a line with a null can hide one.
    return _column_by_column(row) if b"null" in line and _holds_nan(row) else line


def _column_by_column(row: dict[str, Any]) -> bytes:
    """The line of a row that orjson does not write as it is."""
    parts = []
    for name, value in row.items():
        if not isinstance(name, str):
            return unusable_line("bad_row", f"the name of a column is {name!r}, not text", name)
        kind = _opaque_kind(value)
        try:
            if kind is not None:
                cell = orjson.dumps({OPAQUE: kind})
            elif isinstance(value, float) and not math.isfinite(value):
                cell = b"null"
            else:
                cell = _exact(value)
            parts.append(orjson.dumps(name) + b":" + cell)
        except (TypeError, ValueError, UnicodeEncodeError) as problem:
            reason = "bad_unicode" if "surrogate" in str(problem) else "bad_type"
            return unusable_line(
                reason, f"the column {name!a} holds what JSON cannot: {problem}", value
            )
    return b"{" + b",".join(parts) + b"}\n"


def _exact(value: Any) -> bytes:
    """A value through the standard library, which knows integers of any size. Raises TypeError,
    ValueError."""
    plain = _checked(value)
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _checked(value: Any) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r}, which is no text")
        return {key: _checked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_checked(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value}")
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if hasattr(value, "tolist"):
        return _checked(value.tolist())
    # Dates and decimals, as orjson writes them.
    return json.loads(orjson.dumps(value, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY))


def _plain(value: Any) -> Any:
    """What orjson asks for a type it does not know. Raises TypeError."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Decimal) and value.is_finite():
        return orjson.Fragment(str(value).encode())
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(
        value, "tolist"
    ):  # arrays that orjson does not take: not contiguous, of objects, of text
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def _opaque_kind(value: Any) -> str | None:
    """What a column that is no JSON as a whole holds, or None."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "bytes"
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return "image"  # how `datasets` stores images and sounds
    if isinstance(value, (list, tuple)) and value:
        kind = _opaque_kind(value[0])
        return f"list of {kind}" if kind is not None else None
    # Images and decoders are objects of their own; whatever has neither items nor a value is one.
    if value is None or isinstance(value, (str, int, float, list, tuple, Mapping)):
        return None
    try:
        orjson.dumps(value, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        return type(value).__name__
    return None


def _holds_nan(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, Mapping):
        return any(_holds_nan(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_nan(item) for item in value)
    return hasattr(value, "tolist") and _holds_nan(value.tolist())

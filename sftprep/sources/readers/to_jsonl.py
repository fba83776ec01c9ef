"""Rows of tables and iterables as lines of JSON, for a single kind of input.

Row k becomes line k + 1, so the line numbers in errors and in the manifest are row numbers. A row
that JSON cannot represent becomes a line that `readers.jsonl.parse_line` rejects with the reason
that is stored in it; such a row stops the build or is quarantined like any other bad record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import orjson

from sftprep.core.repeated_keys import find_repeated_key
from sftprep.sources.readers.lines import join_to_size

# These two markers, and the messages of unusable rows, are part of the bytes of a partition: a
# change of them changes the digest of its content and the name of its spill.
UNUSABLE = b"\x00unusable "
"""The start of the line of a row that JSON cannot represent; a JSON array of reason, message and
excerpt follows. No JSON starts with these bytes."""

OPAQUE = "$opaque"
"""The key of the object that replaces a whole column that is not JSON (`{"$opaque": "bytes"}`): the
record is rejected only if its format reads that column."""

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


def rows_to_lines(rows: Iterable[Mapping[str, Any]], *, strip_nulls: bool = False) -> bytes:
    """Return one line of JSON for each row, with its newline.

    NumPy values and arrays, dates, decimals and integers of any size are written. A NaN that is a
    whole column is written as null, because NaN is the missing value of pandas. Images and
    bytes that are a whole column become `{"$opaque": ...}`. Inside other values they make the row
    unusable, as do NaN, half surrogates and keys that are not strings; the message names the
    column.

    Args:
        rows: The rows.
        strip_nulls: Leave out keys with null at every depth, as
            `trl.trainer.utils.remove_none_values` does; TRL itself keeps them.

    Example:
        rows_to_lines([{"text": "a", "image": b"..."}])  ->
            b'{"text":"a","image":{"$opaque":"bytes"}}\\n'
    """
    return b"".join(iter_lines(rows, strip_nulls=strip_nulls))


def json_lines(rows: Iterable[Mapping[str, Any]], *, size: int = 2**20) -> Iterator[bytes]:
    """Yield rows as lines of JSON, in runs of about `size` bytes.

    A row that cannot be written as JSON becomes a line that a build rejects, with its reason.
    """
    return join_to_size(iter_lines(rows), size)


def iter_lines(rows: Iterable[Mapping[str, Any]], *, strip_nulls: bool = False) -> Iterator[bytes]:
    """Yield the line of each row as the rows arrive; see `rows_to_lines`."""
    for row in rows:
        if not isinstance(row, Mapping):
            yield unusable_line(
                "bad_row", f"a row is a mapping of names to values, not a {type(row).__name__}", row
            )
            continue
        whole = row if type(row) is dict else dict(row)
        try:
            line = _to_line(without_nulls(whole) if strip_nulls else whole)
        except RecursionError:
            line = unusable_line("bad_row", "the row is nested too deeply", row)
        yield line


def without_nulls(value: Any) -> Any:
    """Return a dictionary or list without keys of value None, at every depth.

    None in a list stays. Source: TRL 1.16 `remove_none_values`.
    """
    if isinstance(value, list):
        return [without_nulls(item) if isinstance(item, (dict, list)) else item for item in value]
    kept = ((key, item) for key, item in value.items() if item is not None)
    return {
        key: without_nulls(item) if isinstance(item, (dict, list)) else item for key, item in kept
    }


def strip_null_lines(data: bytes) -> bytes:
    """Return lines of JSON objects without null-valued keys, at every depth.

    A line that is neither an object nor a list stays as it is.
    """
    return b"\n".join(map(_strip_nulls, data.split(b"\n"))) if b"null" in data else data


def unusable_line(reason: str, message: str, value: object) -> bytes:
    """Return the line of an unusable row; `parse_line` rejects it.

    Args:
        reason: A short stable name such as `bad_row`.
        message: What is wrong with the row.
        value: The value to show.
    """
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


def _strip_nulls(line: bytes) -> bytes:
    if b"null" not in line:
        return line
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return line
    if not isinstance(row, (dict, list)) or find_repeated_key(line, row) is not None:
        return line  # it is rejected where it is read
    return orjson.dumps(without_nulls(row))


def _to_line(row: dict[str, Any]) -> bytes:
    try:
        line = orjson.dumps(row, default=_to_basic_type, option=_OPTIONS)
    except TypeError:
        return _write_columns(row)
    # orjson writes NaN as null, so only a line with a null can contain one.
    return _write_columns(row) if b"null" in line and _holds_nan(row) else line


def _write_columns(row: dict[str, Any]) -> bytes:
    """Return the line of a row, written column by column: slower, and for all types."""
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
                cell = _dump_exactly(value)
            parts.append(orjson.dumps(name) + b":" + cell)
        except (TypeError, ValueError, UnicodeEncodeError) as problem:
            reason = "bad_unicode" if "surrogate" in str(problem) else "bad_type"
            return unusable_line(
                reason, f"the column {name!a} holds what JSON cannot: {problem}", value
            )
    return b"{" + b",".join(parts) + b"}\n"


def _dump_exactly(value: Any) -> bytes:
    """Return a value as JSON by the standard library, with integers of any size.

    Raises:
        TypeError, ValueError: JSON cannot represent the value.
    """
    plain = _check_value(value)
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _check_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r}, which is not a text")
        return {key: _check_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_check_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value}")
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if hasattr(value, "tolist"):
        return _check_value(value.tolist())
    # Dates and decimals, as orjson writes them.
    return json.loads(
        orjson.dumps(value, default=_to_basic_type, option=orjson.OPT_SERIALIZE_NUMPY)
    )


def _to_basic_type(value: Any) -> Any:
    """Return a replacement for a value of a type unknown to orjson.

    Raises:
        TypeError: There is no replacement.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Decimal) and value.is_finite():
        return orjson.Fragment(str(value).encode())
    if hasattr(value, "isoformat"):
        return value.isoformat()
    # Arrays that orjson rejects: non-contiguous arrays, and arrays of objects or strings.
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def _opaque_kind(value: Any) -> str | None:
    """Return the kind of a value's non-JSON content, or None for JSON."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "bytes"
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        # `datasets` stores images and audio in this form; without bytes and path it is empty.
        return "image" if any(item is not None for item in value.values()) else None
    if isinstance(value, (list, tuple)) and value:
        items = value if isinstance(value[0], dict) else value[:1]
        kind = next((kind for kind in map(_opaque_kind, items) if kind is not None), None)
        return f"list of {kind}" if kind is not None else None
    if value is None or isinstance(value, (str, int, float, list, tuple, Mapping)):
        return None
    # Images and decoders are objects of other libraries, which orjson cannot write.
    try:
        orjson.dumps(value, default=_to_basic_type, option=orjson.OPT_SERIALIZE_NUMPY)
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

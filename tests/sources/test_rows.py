"""A row is written as a line without change, or is rejected with a reason."""

from __future__ import annotations

import datetime
import re
from collections import OrderedDict
from decimal import Decimal
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep.core.types import Rejected
from sftprep.sources.readers.jsonl import parse_line, split_lines
from sftprep.sources.readers.to_jsonl import OPAQUE, rows_to_lines

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)
LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUE = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUE, max_size=4), max_size=5)


def read(rows, **options):
    return [
        parse_line(line, number)
        for number, line in enumerate(split_lines(rows_to_lines(rows, **options)))
    ]


@given(ROWS)
def test_rows_are_read_back_from_lines_without_change(rows):
    rows = [row for row in rows if row.get("bytes", 0) is row.get("path", 0)]
    assert read(rows) == rows


def test_values_of_numpy_dates_decimals_and_other_mappings():
    row = {
        "scalar": np.float32(0.5),
        "count": np.int64(7),
        "ids": np.arange(6, dtype=np.int32)[::2],
        "words": np.array(["a", "b"]),
        "day": datetime.date(2026, 1, 31),
        "price": Decimal("1.10"),
        "odd": OrderedDict(a=MappingProxyType({"b": (1, 2)})),
        "tiny": 8.854e-12,
    }
    (line,) = split_lines(rows_to_lines([MappingProxyType(row)]))
    assert parse_line(line, 0) == {
        "scalar": 0.5,
        "count": 7,
        "ids": [0, 2, 4],
        "words": ["a", "b"],
        "day": "2026-01-31",
        "price": 1.1,
        "odd": {"a": {"b": [1, 2]}},
        "tiny": 8.854e-12,
    }
    assert b"8.854e-12" in line
    assert b"1.10" in line


def test_integers_of_any_size_are_written_whole():
    assert (
        rows_to_lines([{"n": 10**30, "text": "é"}])
        == '{"n":1000000000000000000000000000000,"text":"é"}\n'.encode()
    )


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"text": "a", "m": [{"x": float("nan")}]}, "bad_type", "'m'.*nan"),
        ({"m": {"x": np.array([1.0, np.inf])}}, "bad_type", "'m'"),
        ({"m": [{"content": b"raw"}]}, "bad_type", "'m'.*bytes"),
        ({"m": [{"content": object()}]}, "bad_type", "'m'.*object"),
        ({"text": "half \ud800"}, "bad_unicode", "'text'"),
        ({"m": {1: 2}}, "bad_type", "'m'.*key 1"),
        ({3: "a"}, "bad_row", "name of a column is 3"),
        (["a"], "bad_row", "not a list"),
    ],
)
def test_values_that_json_cannot_represent_are_rejected_with_row_and_column(row, reason, message):
    before, rejected, after = read([{"text": "first"}, row, {"text": "last"}])
    assert (before, after) == ({"text": "first"}, {"text": "last"})
    assert isinstance(rejected, Rejected)
    assert (rejected.line, rejected.reason) == (1, reason)
    assert re.search(message, rejected.message)


def test_whole_columns_that_are_not_json_become_opaque_values():
    class Image:
        pass

    row = {
        "text": "a",
        "b": b"1",
        "i": Image(),
        "l": [Image()],
        "s": {"bytes": b"1", "path": None},
        "score": float("nan"),
    }
    assert read([row]) == [
        {
            "text": "a",
            "b": {OPAQUE: "bytes"},
            "i": {OPAQUE: "Image"},
            "l": {OPAQUE: "list of Image"},
            "s": {OPAQUE: "image"},
            "score": None,
        }
    ]


def test_nulls_are_kept_by_default():
    row = {"messages": [{"role": "user", "tool_calls": None}], "tools": None}
    assert read([row]) == [row]
    assert read([row], strip_nulls=True) == [{"messages": [{"role": "user"}]}]

"""A line is an object, whitespace, or rejected with its column and a stable reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep.core.types import Rejected
from sftprep.sources.readers.jsonl import excerpt, parse_line, split_lines

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=30)


@given(
    st.lists(
        st.dictionaries(TEXT, TEXT | st.integers(-(2**53), 2**53) | st.none(), max_size=4),
        max_size=8,
    )
)
def test_objects_are_parsed_as_they_were_written(records):
    data = "".join(json.dumps(record, ensure_ascii=False) + "\r\n" for record in records).encode()
    assert [parse_line(line, n) for n, line in enumerate(split_lines(data))] == records


@pytest.mark.parametrize(
    ("line", "reason", "column"),
    [
        (b'{"a": 1', "bad_json", 8),
        (b'{"a": 1}}', "bad_json", 9),
        (b"{'a': 1}", "bad_json", 2),
        (b'{"a": NaN}', "bad_json", 7),
        (b'{"a": "\x00"}', "bad_json", 8),
        (b"free text", "bad_json", 1),
        (b"[1]", "bad_row", 1),
        (b"null", "bad_row", 1),
        (b'"a"', "bad_row", 1),
        (b'{"a": "\xe9t\xe9"}', "bad_utf8", 8),
        (b'{"a": "\\ud800"}', "bad_unicode", None),
        (b"[" * 2000 + b"]" * 2000, "bad_json", None),
    ],
)
def test_a_line_that_is_not_an_object_is_rejected_with_its_column(line, reason, column):
    got = parse_line(line, 5)
    assert isinstance(got, Rejected)
    assert (got.line, got.reason) == (5, reason)
    if column is not None:
        assert got.column == column
    assert got.message
    assert got.excerpt


@pytest.mark.parametrize("line", [b"", b"  ", b"\t\r"])
def test_lines_of_whitespace_are_not_records(line):
    assert parse_line(line, 0) is None


def test_byte_order_marks_and_unicode_line_separators_are_accepted():
    assert parse_line(b'\xef\xbb\xbf{"a": 1}', 0) == {"a": 1}
    text = '{"a": "x\u2028y\u0085z"}'
    assert [parse_line(line, 0) for line in split_lines(f"{text}\n".encode())] == [
        {"a": "x\u2028y\u0085z"}
    ]
    assert parse_line(b'{"a": 123456789012345678901234567890}', 0) is not None


@given(st.binary(max_size=400), st.integers(1, 500))
def test_an_excerpt_is_one_short_printable_line(line, column):
    shown = excerpt(line, column)
    assert shown.isprintable()
    assert len(shown) < 200 * 6 + 3

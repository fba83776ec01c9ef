"""Headers of CSV files: columns without a name, and lines of whitespace before the header."""

from __future__ import annotations

import pytest

from sftprep.errors import InputUnreadable
from tests.sources.test_kinds import records_of


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("question,answer,", ["question", "answer", "column 3"]),
        (",question,answer", ["column 1", "question", "answer"]),
        ('question," ",answer', ["question", "column 2", "answer"]),
        ("question,,", ["question", "column 2", "column 3"]),
    ],
)
def test_a_column_without_a_name_is_named_by_its_position(header, names, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\nx,y,z\n")
    assert records_of(str(path))[0] == [dict(zip(names, "xyz", strict=True))]


def test_a_name_that_is_in_use_already_is_an_error(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("column 2,\nx,y\n")
    with pytest.raises(InputUnreadable, match="names the column 'column 2' twice"):
        records_of(str(path))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_empty_lines_before_the_header_are_skipped(newline, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(newline.join(["", "", "question,answer", "x,y", ""]).encode())
    assert records_of(str(path))[0] == [{"question": "x", "answer": "y"}]

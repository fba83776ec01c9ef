"""A compressed file is cut into the parts of the plain file, so both give the same build."""

from __future__ import annotations

import gzip
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sftprep.sources.readers.lines import line_parts, read_line_range

lines_of_file = st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"x")))


@given(lines=lines_of_file, ends_with_newline=st.booleans(), target=st.integers(1, 30))
def test_the_parts_of_a_compressed_file_are_those_of_the_plain_file(
    tmp_path_factory, lines, ends_with_newline, target
):
    folder: Path = tmp_path_factory.mktemp("parts")
    # Begins with a letter: some other beginnings are those of other kinds of files.
    data = b"x" + b"\n".join(lines) + b"\n" * ends_with_newline
    plain, packed = str(folder / "a.jsonl"), str(folder / "a.jsonl.gz")
    Path(plain).write_bytes(data)
    Path(packed).write_bytes(gzip.compress(data))
    expected = [read_line_range(plain, start, end) for start, end, _ in line_parts(plain, target)]
    found = list(line_parts(packed, target))
    assert [payload for _, _, payload in found] == expected
    assert b"".join(expected) == data
    for start, end, payload in found:
        assert data[start:end] == payload

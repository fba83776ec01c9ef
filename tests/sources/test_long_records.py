"""A record that is too long is rejected as a whole, in every kind of file."""

from __future__ import annotations

import csv
import gzip
import io
import json
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftprep import build
from sftprep.core.types import Rejected
from sftprep.sources.partition import Source, cut, read_partition
from sftprep.sources.readers import delimited, jsonl, lines
from sftprep.sources.readers import json_array as arrays
from sftprep.sources.readers.jsonl import parse_line, split_lines
from sftprep.sources.readers.to_jsonl import iter_lines

LIMIT = 300


@contextmanager
def small_limits():
    """Set the limit to 300 bytes instead of 64 MiB, and read chunks of a few bytes."""
    modules = (lines, jsonl, arrays, delimited)
    before = [module.LARGEST_LINE for module in modules]
    chunk, arrays._CHUNK = arrays._CHUNK, 7
    for module in modules:
        module.LARGEST_LINE = LIMIT
    try:
        yield
    finally:
        arrays._CHUNK = chunk
        for module, limit in zip(modules, before, strict=True):
            module.LARGEST_LINE = limit


def as_lines(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["text"])
    writer.writerows([[row["text"]] for row in rows])
    return text.getvalue().encode()


def as_table(rows, suffix):
    table, sink = pa.table({"text": [row["text"] for row in rows]}), io.BytesIO()
    if suffix == ".parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


WRITERS = {
    ".jsonl": as_lines,
    ".jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    ".jsonl.zst": lambda rows: zstandard.compress(as_lines(rows)),
    ".json": lambda rows: json.dumps(rows).encode(),
    ".json.gz": lambda rows: gzip.compress(json.dumps({"x": [1], "data": rows, "y": "z"}).encode()),
    ".csv": as_csv,
    ".csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    ".parquet": lambda rows: as_table(rows, ".parquet"),
    ".arrow": lambda rows: as_table(rows, ".arrow"),
}

long_words = ['"', "\\", "{", "}", "[", "]", "x", "word ", "é", '\\"', "0"]
words = st.sampled_from([*long_words, ",", "\n"])
texts = st.one_of(
    st.lists(words, min_size=1, max_size=12).map("".join),
    st.tuples(
        st.lists(words, max_size=6).map("".join),
        st.integers(150, 1200),
        st.sampled_from(long_words),
    ).map(lambda parts: (parts[0] + parts[2] * parts[1])[: parts[1]]),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    suffix=st.sampled_from([*WRITERS, "memory"]),
    contents=st.lists(texts, min_size=1, max_size=6),
    target=st.integers(5, 900),
)
def test_each_record_is_read_whole_or_is_rejected(tmp_path_factory, suffix, contents, target):
    rows = [{"text": text} for text in contents]
    if suffix == "memory":
        source = Source("<rows>", blocks=lambda: iter([b"".join(iter_lines(rows))]))
    else:
        path = tmp_path_factory.mktemp("long") / f"a{suffix}"
        path.write_bytes(WRITERS[suffix](rows))
        source = str(path)
    with small_limits():
        found = [
            parse_line(line, 0)
            for partition in cut([source], target)
            for line in split_lines(read_partition(partition))
        ]
        # The text of a record may be shorter in another kind of file, which has no escapes.
        near = [len(json.dumps(row).encode()) > LIMIT - 20 for row in rows]
    assert len(found) == len(rows)
    for row, record, may_be_long in zip(rows, found, near, strict=True):
        if isinstance(record, Rejected):
            assert record.reason == "line_too_long"
            assert may_be_long
        else:
            assert record == row
            # `as_lines` writes a newline and a space that readers do not write.
            assert len(as_lines([row])) <= LIMIT + 2


def test_the_start_of_a_line_that_is_too_long_is_not_a_record(tmp_path):
    """The start of the line is valid JSON by itself."""
    content = b'{"text": "start"}' + b" " * (2 * LIMIT) + b'{"text": "end"}\n{"text": "next"}\n'
    with small_limits():
        for name, packed in (("a.jsonl", content), ("a.jsonl.gz", gzip.compress(content))):
            (tmp_path / name).write_bytes(packed)
            found = [
                parse_line(line, 0)
                for partition in cut([str(tmp_path / name)], 100)
                for line in split_lines(read_partition(partition))
            ]
            assert [type(record) for record in found] == [Rejected, dict]
            assert found[1] == {"text": "next"}


def slow(suffix: str):
    return pytest.param(suffix, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".parquet", slow(".jsonl.gz"), slow(".json"), slow(".csv")]
)
def test_a_build_counts_a_record_of_more_than_64_mib(tmp_path, tokenizer_dir, suffix):
    rows = [{"text": "first"}, {"text": "0123456 " * (9 << 20)}, {"text": "last"}]
    path = Path(tmp_path / f"a{suffix}")
    path.write_bytes(WRITERS[suffix](rows))
    report = build(
        path, tokenizer=tokenizer_dir, output=tmp_path / "o", on_bad_record="quarantine",
        max_rejected="2",
    )  # fmt: skip
    accounting = report.manifest.accounting
    assert (accounting.records, accounting.sequences) == (3, 2)
    assert accounting.rejected == {"line_too_long": 1}

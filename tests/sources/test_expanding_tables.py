"""Tables that expand to far more text than their bytes are read in pieces of bounded size."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.core.types import Rejected
from sftprep.sources.in_memory import memory_source
from sftprep.sources.partition import cut, read_partition
from sftprep.sources.readers import parquet_tables, table_lines
from sftprep.sources.readers.jsonl import parse_line, split_lines
from sftprep.sources.readers.row_sizes import row_sizes, runs_of_rows
from tests.sources.test_hostile_arrow import written

TARGET = 50_000
VALUE = "word " * 2000
ROWS = 400


def views_of_one_buffer():
    views = np.zeros((ROWS, 4), np.int32)
    views[:, 0] = len(VALUE)
    views[:, 1] = np.frombuffer(VALUE[:4].encode(), np.int32)
    buffers = [None, pa.py_buffer(views.tobytes()), pa.py_buffer(VALUE.encode())]
    return pa.Array.from_buffers(pa.string_view(), ROWS, buffers)


def dictionary_of(kind):
    return pa.DictionaryArray.from_arrays(np.zeros(ROWS, np.int32), pa.array([VALUE], kind))


def list_views_of_one_value():
    begins, sizes = pa.array([0] * ROWS, pa.int32()), pa.array([1] * ROWS, pa.int32())
    return pa.ListViewArray.from_arrays(begins, sizes, pa.array([VALUE]))


COLUMNS = {
    "views": views_of_one_buffer,
    "dictionary": lambda: dictionary_of(pa.string()),
    "large dictionary": lambda: dictionary_of(pa.large_string()),
    "list views": list_views_of_one_value,
    "runs": lambda: pa.RunEndEncodedArray.from_arrays([ROWS], [VALUE]),
    "dictionaries in lists": lambda: pa.ListArray.from_arrays(
        pa.array(range(ROWS + 1), pa.int32()), dictionary_of(pa.string())
    ),
}


def pieces_of(path, target=TARGET):
    return [read_partition(partition) for partition in cut([str(path)], target)]


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("name", COLUMNS)
def test_rows_that_share_a_value_come_in_small_pieces(tmp_path, kind, name):
    table = pa.table({"text": COLUMNS[name]()})
    path = tmp_path / "a.arrow"
    path.write_bytes(written(table, kind, ROWS))
    assert path.stat().st_size < 3 * len(VALUE)
    pieces = pieces_of(path)
    assert max(map(len, pieces)) < 4 * TARGET
    lines = [json.loads(line) for piece in pieces for line in split_lines(piece)]
    assert lines == [{"text": [VALUE] if "list" in name else VALUE}] * ROWS


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("small", [0, 1 << 20])
def test_a_dictionary_in_parquet_comes_in_small_pieces(tmp_path, monkeypatch, nested, small):
    monkeypatch.setattr(table_lines, "SLICE_BYTES", 100_000)
    monkeypatch.setattr(parquet_tables, "SLICE_BYTES", 100_000)
    monkeypatch.setattr(parquet_tables, "_SMALL_GROUP", small)
    values = [*[VALUE] * ROWS, None, "other"]
    rows = [{"x": [{"role": value}] if nested else value} for value in values]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    pieces = pieces_of(path)
    assert max(map(len, pieces)) < 4 * TARGET
    assert [json.loads(line) for piece in pieces for line in split_lines(piece)] == rows
    # No more than a few rows are decoded at a time.
    parquet = pq.ParquetFile(path)
    group = parquet_tables._inspect_group(str(path), parquet, 0, None)
    assert group.batch * len(VALUE) <= 4 * parquet_tables.SLICE_BYTES


def test_a_dictionary_without_repeated_long_values_is_read_by_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(table_lines, "SLICE_BYTES", 1000)
    monkeypatch.setattr(parquet_tables, "SLICE_BYTES", 1000)
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{k} {'word ' * (k % 20)}" for k in range(1000)]})
    pq.write_table(table, path, row_group_size=250)
    partitions = list(cut([str(path)], 20_000))
    assert {partition.payload for partition in partitions} == {None}
    assert b"".join(map(read_partition, partitions)).count(b"\n") == 1000


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_rows_that_need_no_bytes_come_in_pieces(tmp_path, suffix):
    table = pa.table({"text": pa.nulls(200_000)})
    path = tmp_path / f"a{suffix}"
    if suffix == ".arrow":
        path.write_bytes(written(table, "file", 200_000))
    else:
        pq.write_table(table, path)
    assert path.stat().st_size < 2000
    pieces = pieces_of(path)
    assert max(map(len, pieces)) < 4 * TARGET
    assert b"".join(pieces) == b'{"text":null}\n' * 200_000


def test_a_list_that_needs_no_bytes_is_rejected_as_too_long(tmp_path):
    column = pa.FixedSizeListArray.from_arrays(pa.nulls(1 << 27), 1 << 27)
    path = tmp_path / "a.arrow"
    path.write_bytes(written(pa.table({"input_ids": column}), "file", 1))
    (line,) = split_lines(b"".join(pieces_of(path)))
    record = parse_line(line, 0)
    assert isinstance(record, Rejected)
    assert record.reason == "line_too_long"


def test_a_table_in_memory_is_converted_in_runs_of_rows(monkeypatch):
    monkeypatch.setattr(table_lines, "SLICE_BYTES", TARGET)
    table = pa.table({"text": dictionary_of(pa.string())})
    lines = [*table_lines.iter_table_lines(table.to_batches()[0], table.schema)]
    assert max(map(len, lines)) < 2 * TARGET
    assert b"".join(memory_source(table).blocks()) == b"".join(lines)


def test_a_dictionary_with_nulls_and_unused_values_keeps_its_rows(tmp_path):
    column = pa.DictionaryArray.from_arrays(
        pa.array([2, None, 0, 2], pa.int8()), pa.array(["a", "unused", None])
    )
    path = tmp_path / "a.arrow"
    path.write_bytes(written(pa.table({"text": column}), "file", 4))
    assert [json.loads(line)["text"] for line in split_lines(b"".join(pieces_of(path)))] == [
        None,
        None,
        "a",
        None,
    ]


texts = st.one_of(st.none(), st.text("ab ", max_size=9))
lists = st.one_of(st.none(), st.lists(texts, max_size=3))
TYPES = [
    (pa.string(), texts),
    (pa.large_string(), texts),
    (pa.string_view(), texts),
    (pa.dictionary(pa.int8(), pa.string()), texts),
    (pa.null(), st.none()),
    (pa.int64(), st.one_of(st.none(), st.integers(0, 10**12))),
    (pa.list_(pa.string()), lists),
    (pa.large_list(pa.string()), lists),
    (pa.list_view(pa.string()), lists),
    (pa.list_(pa.string(), 2), st.lists(texts, min_size=2, max_size=2)),
    (pa.list_(pa.list_(pa.string())), st.lists(lists, max_size=3)),
    (pa.map_(pa.string(), pa.int8()), st.just([("key", 1)])),
    (
        pa.struct([("a", pa.string()), ("b", pa.list_(pa.string()))]),
        st.one_of(st.none(), st.fixed_dictionaries({"a": texts, "b": lists})),
    ),
]


@settings(max_examples=300, deadline=None)
@given(chosen=st.sampled_from(TYPES), data=st.data())
def test_the_size_of_a_row_bounds_its_text_from_both_sides(chosen, data):
    kind, values = chosen
    column = pa.array(data.draw(st.lists(values, min_size=1, max_size=8)), kind)
    first = data.draw(st.integers(0, len(column) - 1))
    column = column.slice(first, data.draw(st.integers(1, len(column) - first)))
    batch = pa.record_batch({"x": column})
    lines = split_lines(table_lines.table_lines(batch, batch.schema))
    lengths = np.array([len(line) for line in lines])
    assert (row_sizes({"x": column}, len(column), 2.0) <= lengths).all()
    assert (row_sizes({"x": column}, len(column), 16.0) >= lengths).all()


@given(sizes=st.lists(st.integers(0, 50), max_size=30), limit=st.integers(1, 100))
def test_runs_of_rows_are_as_long_as_the_limit_allows(sizes, limit):
    runs = list(runs_of_rows(np.array(sizes, np.float64), limit))
    assert [k for begin, end in runs for k in range(begin, end)] == list(range(len(sizes)))
    for begin, end in runs:
        assert sum(sizes[begin:end]) <= limit or end == begin + 1
        assert end == len(sizes) or sum(sizes[begin : end + 1]) > limit

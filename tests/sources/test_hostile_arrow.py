"""Malicious and damaged Arrow files are read as pyarrow reads them, or are an error."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import random
import struct
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftprep import build
from sftprep.core.types import Rejected
from sftprep.errors import InputUnreadable
from sftprep.sources.partition import cut, read_partition
from sftprep.sources.readers import arrow_ipc, arrow_tables
from sftprep.sources.readers.arrow_ipc import open_arrow
from sftprep.sources.readers.jsonl import parse_line, split_lines
from sftprep.sources.readers.table_lines import table_lines

TABLE = pa.table({"text": [f"text number {i}" for i in range(100)], "n": list(range(100))})


def written(table, kind="file", rows=30, **options) -> bytes:
    sink = io.BytesIO()
    maker = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with maker(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue()


def records_of(path, target=500):
    return [
        parse_line(line, 0)
        for partition in cut([str(path)], target)
        for line in split_lines(read_partition(partition))
    ]


values = st.one_of(st.none(), st.text(st.characters(exclude_categories=("Cs",)), max_size=12))
nested = st.lists(st.fixed_dictionaries({"role": values, "n": st.integers(-5, 5)}), max_size=3)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    column=st.lists(values, max_size=20),
    messages=st.lists(nested, min_size=20, max_size=20),
    kind=st.sampled_from(["file", "stream"]),
    rows=st.integers(1, 25),
    target=st.sampled_from([1, 100, 1000, 10**6]),
    streamed=st.sampled_from([0, 8]),
    compression=st.sampled_from([None, "lz4", "zstd"]),
    type_=st.sampled_from(["string", "large_string", "dictionary", "string_view"]),
)
def test_every_row_is_read_once_in_order(
    tmp_path_factory, column, messages, kind, rows, target, streamed, compression, type_
):
    types = {
        "string": pa.string(),
        "large_string": pa.large_string(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
        "string_view": pa.string_view(),
    }
    messages_of = messages[: len(column)]
    table = pa.table(
        {
            "text": pa.array(column, types[type_]),
            "messages": pa.array(
                messages_of, pa.list_(pa.struct([("role", pa.string()), ("n", pa.int8())]))
            ),
        }
    )
    path = tmp_path_factory.mktemp("arrow") / "a.arrow"
    options = {"compression": compression, "unify_dictionaries": True}
    path.write_bytes(written(table, kind, rows, **options))
    before, arrow_tables._STREAMED = arrow_tables._STREAMED, streamed
    try:
        found = records_of(path, target)
    finally:
        arrow_tables._STREAMED = before
    assert found == [
        {"text": text, "messages": turns} for text, turns in zip(column, messages_of, strict=True)
    ]


def test_an_empty_file_and_one_without_rows_have_no_records(tmp_path):
    (tmp_path / "a.arrow").write_bytes(b"")
    for kind in ("file", "stream"):
        (tmp_path / f"{kind}.arrow").write_bytes(written(TABLE.slice(0, 0), kind))
    assert [records_of(path) for path in sorted(tmp_path.iterdir())] == [[], [], []]


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), 40])
def test_offsets_outside_of_the_buffers_are_an_error(tmp_path, tokenizer_dir, kind, value):
    content = bytearray(written(TABLE, kind, rows=100))
    at = content.find(struct.pack("<4i", 0, 13, 26, 39))
    assert at > 0
    struct.pack_into("<i", content, at + 4 * 50, value)
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(InputUnreadable, match=r"a\.arrow is damaged"):
        build(tmp_path / "a.arrow", tokenizer=tokenizer_dir, output=tmp_path / "o")
    assert not (tmp_path / "o" / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_header_that_claims_too_much_is_an_error_and_not_a_loop(tmp_path, kind):
    content = written(TABLE, kind, rows=100)
    for size, fake in ((100, 2**62), (100, 2**31), (100, -1)):
        found = content.find(struct.pack("<q", size), 200)
        while found >= 0:
            changed = bytearray(content)
            struct.pack_into("<q", changed, found, fake)
            (tmp_path / "a.arrow").write_bytes(changed)
            try:
                records = records_of(tmp_path / "a.arrow")
                assert len(records) <= 100
            except InputUnreadable:
                pass
            found = content.find(struct.pack("<q", size), found + 1)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_file_that_is_truncated_while_it_is_read_is_an_error(tmp_path, kind):
    path = tmp_path / "a.arrow"
    content = written(TABLE, kind, rows=10)
    for length in range(0, len(content), 97):
        path.write_bytes(content)
        os.utime(path, ns=(length, length))
        partitions = list(cut([str(path)], 300))
        arrow = open_arrow(str(path))
        read_partition(partitions[0])
        os.truncate(path, length)
        end = arrow.batches[-1].offset + arrow.batches[-1].length
        if length < end:
            with pytest.raises(InputUnreadable, match=str(path)):
                collections.deque(map(read_partition, partitions[1:]), 0)
            # Also if it is truncated between the check of its size and the reading.
            with pytest.raises((InputUnreadable, pa.ArrowException)):
                collections.deque(map(arrow.read, range(len(arrow.batches))), 0)


FUZZ = """
import random, sys
from pathlib import Path
from sftprep.errors import InputUnreadable
from tests.sources.test_hostile_arrow import records_of

path, seed = Path(sys.argv[1]), int(sys.argv[2])
content = path.read_bytes()
draw = random.Random(seed)
damaged = 0
for number in range(int(sys.argv[3])):
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(changed))
        changed[at] = draw.choice([0, 255, 127, 128, changed[at] ^ (1 << draw.randrange(8))])
    if draw.random() < 0.2:
        del changed[draw.randrange(len(changed)):]
    file = path.with_name(f"mutant-{number}{path.suffix}")
    file.write_bytes(changed)
    try:
        records_of(file)
    except InputUnreadable:
        damaged += 1
    file.unlink()
print(damaged)
"""


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow", "lz4.arrow", "a.parquet"])
def test_no_mutated_file_crashes_the_process(tmp_path, name):
    chats = [[{"role": "user", "content": f"hello {k}"}] * (k % 4) for k in range(100)]
    table = TABLE.append_column("messages", pa.array(chats))
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(table, path, row_group_size=30)
    else:
        kind = "stream" if name.startswith("stream") else "file"
        path.write_bytes(written(table, kind, compression="lz4" if "lz4" in name else None))
    root = str(os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(path), str(random.Random(name).randrange(10**6)), "300"],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 20


def test_text_that_is_not_utf_8_is_an_error_that_names_the_file(tmp_path):
    bad = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    (tmp_path / "a.arrow").write_bytes(written(pa.table({"text": bad})))
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        with pytest.raises(InputUnreadable, match=name):
            records_of(tmp_path / name)


def test_values_that_python_cannot_hold_are_an_error_that_names_the_file(tmp_path):
    table = pa.table({"day": pa.array([2**40], pa.timestamp("s"))})
    (tmp_path / "a.arrow").write_bytes(written(table))
    with pytest.raises(InputUnreadable, match=r"a\.arrow"):
        assert not [r for r in records_of(tmp_path / "a.arrow") if not isinstance(r, Rejected)]


def arrow_rows(content: bytes) -> bytes | None:
    """Return what pyarrow reads as lines, or None if it raises."""
    maker = pa.ipc.open_file if content.startswith(b"ARROW1") else pa.ipc.open_stream
    try:
        table = maker(pa.py_buffer(content)).read_all()
        table.validate(full=True)
        return b"".join(table_lines(batch, table.schema) for batch in table.to_batches())
    except (pa.ArrowException, OSError, ValueError, OverflowError):
        return None


SMALL = {
    "text": pa.table({"text": [f"text number {i}" for i in range(9)], "n": [*range(8), None]}),
    "view": pa.table({"text": pa.array([f"text number {i}" for i in range(9)], pa.string_view())}),
    "list": pa.table({"input_ids": [[i] * (i % 4) for i in range(9)]}),
    "dictionary": pa.table({"text": pa.array(["a", "b", "c"] * 3).dictionary_encode()}),
}


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from([*SMALL]),
    kind=st.sampled_from(["file", "stream"]),
    compression=st.sampled_from([None, "lz4"]),
    data=st.data(),
)
def test_a_file_with_flipped_bits_is_refused_or_read_as_pyarrow_reads_it(
    tmp_path_factory, name, kind, compression, data
):
    content = bytearray(written(SMALL[name], kind, 4, compression=compression))
    for _ in range(data.draw(st.integers(1, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flipped") / "a.arrow"
    path.write_bytes(content)
    try:
        lines = b"".join(map(read_partition, cut([str(path)], 100)))
    except InputUnreadable:
        return
    assert lines == arrow_rows(bytes(content))


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
@pytest.mark.parametrize("name", ["text", ""])
def test_two_columns_of_one_name_are_refused(tmp_path, suffix, name):
    """Lines of JSON would have only one of them."""
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=[name, name])
    path = tmp_path / f"a.{suffix}"
    if suffix == "arrow":
        path.write_bytes(written(table, "file"))
    else:
        pq.write_table(table, path)
    with pytest.raises(InputUnreadable, match="several columns named"):
        list(cut([str(path)], 100))


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("name", ["text", "dictionary"])
def test_no_flipped_bit_of_a_header_hides_a_batch(tmp_path, kind, name):
    content = written(SMALL[name], kind, 3)
    path = tmp_path / "a.arrow"
    path.write_bytes(content)
    batch = open_arrow(str(path)).batches[1]
    for at in range(batch.offset, batch.offset + 80):
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            os.utime(path, ns=(0, at * 8 + bit))
            with contextlib.suppress(InputUnreadable):
                assert len(records_of(path)) == 9


def test_a_stream_must_end_with_its_end_mark(tmp_path):
    content = written(TABLE, "stream")
    path = tmp_path / "a.arrow"
    path.write_bytes(content)
    batch = open_arrow(str(path)).batches[1]
    changed = {
        "cut before a batch": content[: batch.offset],
        "cut within its length": content[: batch.offset + 4],
        "cut before the mark": content[:-8],
        "cut within the mark": content[:-4],
        "two streams": content * 2,
        "bytes after the end": content + b"\0",
        "cut to one byte": content[:1],
    }
    for damaged in changed.values():
        path.write_bytes(damaged)
        with pytest.raises(InputUnreadable, match=r"a\.arrow"):
            records_of(path)


def test_the_short_end_mark_of_old_writers_ends_a_stream(tmp_path):
    old = written(
        TABLE, "stream", use_legacy_format=True, metadata_version=pa.ipc.MetadataVersion.V4
    )
    assert not old.endswith(b"\xff\xff\xff\xff\0\0\0\0")
    (tmp_path / "a.arrow").write_bytes(old)
    assert records_of(tmp_path / "a.arrow") == TABLE.to_pylist()


def test_a_batch_that_the_footer_does_not_list_is_an_error(tmp_path):
    content = bytearray(written(TABLE, rows=30))
    count = content.rfind(struct.pack("<I", 4), 0, len(content) - 10)
    while count > 0:
        changed = bytearray(content)
        struct.pack_into("<I", changed, count, 3)
        if (rows := arrow_rows(bytes(changed))) is not None and rows.count(b"\n") == 90:
            break
        count = content.rfind(struct.pack("<I", 4), 0, count)
    assert count > 0
    (tmp_path / "a.arrow").write_bytes(changed)
    with pytest.raises(InputUnreadable, match="footer does not list"):
        records_of(tmp_path / "a.arrow")


def test_a_damaged_batch_without_rows_is_an_error(tmp_path):
    empty = pa.record_batch({"n": pa.array([], pa.int64())})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, empty.schema) as writer:
        writer.write_batch(pa.record_batch({"n": [1, 2]}))
        writer.write_batch(empty)
    path = tmp_path / "a.arrow"
    content = sink.getvalue()
    path.write_bytes(content)
    batch = open_arrow(str(path)).batches[1]
    damaged = 0
    for at in range(batch.offset + 8, batch.offset + batch.length):
        changed = bytearray(content)
        changed[at] ^= 0x10
        if arrow_rows(bytes(changed)) is None:
            path.write_bytes(changed)
            os.utime(path, ns=(0, at))
            damaged += 1
            with pytest.raises(InputUnreadable):
                records_of(path)
    assert damaged > 5


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_batch_that_is_too_large_decompressed_is_refused(tmp_path, monkeypatch, compression):
    table = pa.table({"text": pa.array(["word " * 10_000] * 100)})
    path = tmp_path / "a.arrow"
    path.write_bytes(written(table, rows=100, compression=compression))
    assert len(records_of(path, 10**6)) == 100
    monkeypatch.setattr(arrow_ipc, "LARGEST_BATCH", 4_900_000)
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputUnreadable, match=r"a\.arrow has a batch of 5,0"):
        records_of(path, 10**6)

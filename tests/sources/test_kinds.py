"""Every kind of file yields the same records, in order and in reproducible partitions."""

from __future__ import annotations

import gzip
import json
import random
import string
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftprep.core.types import Rejected
from sftprep.errors import ConfigError, FormatError, InputNotFound, InputUnreadable
from sftprep.sources.discovery.files import find_files
from sftprep.sources.partition import Source, cut, first_lines, read_partition, source_of
from sftprep.sources.readers.jsonl import parse_line, split_lines
from sftprep.sources.readers.to_jsonl import OPAQUE

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=10)
CHEAP = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def records_of(source, target=200):
    """Return all records of an input, and its partitions."""
    parts = list(cut([source], target))
    assert [part.index for part in parts] == list(range(len(parts)))
    lines = [line for part in parts for line in split_lines(read_partition(part))]
    return [parse_line(line, number) for number, line in enumerate(lines)], parts


def chats(n):
    draw = random.Random(n)
    word = lambda: "".join(draw.choices(string.ascii_letters + ' é漢\n"\\', k=draw.randint(0, 30)))  # noqa: E731
    return [
        {
            "messages": [
                {"role": "user", "content": word()},
                {"role": "assistant", "content": word()},
            ],
            "id": number,
        }
        for number in range(n)
    ]


def write_parquet(rows, path, **settings):
    pq.write_table(pa.Table.from_pylist(rows), path, **settings)


def write_arrow_file(rows, path, size=7):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=size)


def write_arrow_stream(rows, path, size=7):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=size)


WRITERS = {
    "a.parquet": lambda rows, path: write_parquet(rows, path, row_group_size=9),
    "one_group.parquet": write_parquet,
    "a.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
    "one_batch.feather": lambda rows, path: write_arrow_file(rows, path, 10_000),
    "a.json": lambda rows, path: Path(path).write_text(json.dumps(rows)),
    "pretty.json": (
        lambda rows, path: Path(path).write_text(
            json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8"
        )
    ),
    "a.json.gz": (
        lambda rows, path: Path(path).write_bytes(gzip.compress(json.dumps(rows).encode()))
    ),
    "a.json.zst": (
        lambda rows, path: Path(path).write_bytes(zstandard.compress(json.dumps(rows).encode()))
    ),
    "under_a_key.json": (
        lambda rows, path: Path(path).write_text(
            json.dumps({"version": [1, {}], "data": rows, "end": 1})
        )
    ),
    "lines.json": (
        lambda rows, path: Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    ),
    "a.jsonl": (
        lambda rows, path: Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_yields_the_same_records(tmp_path, name):
    rows = chats(50)
    path = tmp_path / name
    WRITERS[name](rows, str(path))
    found, parts = records_of(str(path))
    assert found == rows
    assert len(parts) > 3
    assert parts == list(cut([str(path)], 200))
    assert records_of(str(path), 10**7)[0] == rows
    assert [json.loads(line) for line in first_lines(str(path)) if line] == rows
    for limit in (0, 1, 8, 9, 10, 49, 50, 60):
        assert (
            records_of(Source(str(path), source_of(str(path)).kind, limit=limit))[0] == rows[:limit]
        )


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_damaged_is_named(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](chats(50), str(path))
    if name.endswith((".jsonl", "lines.json")):
        return  # a line that is cut short is a bad record, not a damaged file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputUnreadable, match=name) as caught:
        records_of(str(path))
    assert caught.value.remedy
    path.write_bytes(b"\x93 nothing of the kind" * 20)
    with pytest.raises(InputUnreadable, match=name):
        records_of(str(path))


LEAF = {
    "s": (pa.string(), TEXT),
    "i": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "f": (pa.float64(), st.floats(allow_nan=False, allow_infinity=False)),
    "b": (pa.bool_(), st.booleans()),
}


def typed(leaf):
    kind, values = LEAF[leaf]
    nested = st.none() | st.fixed_dictionaries(
        {"x": st.none() | values, "y": st.none() | st.lists(st.none() | values, max_size=3)}
    )
    return pa.list_(pa.struct([("x", kind), ("y", pa.large_list(kind))])), st.none() | st.lists(
        nested, max_size=3
    )


@CHEAP
@given(
    data=st.data(),
    leaf=st.sampled_from(sorted(LEAF)),
    stream=st.booleans(),
    chunk=st.integers(1, 5),
)
def test_nested_columns_have_the_values_that_pyarrow_reads(tmp_path, data, leaf, stream, chunk):
    kind, values = typed(leaf)
    column = data.draw(st.lists(values, min_size=1, max_size=9))
    table = pa.table({"c": pa.array(column, kind), "n": pa.array(range(len(column)))})
    path = str(tmp_path / "a.arrow")
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    assert records_of(path, 30)[0] == table.to_pylist()
    pq.write_table(table, f"{path}.parquet", row_group_size=chunk)
    assert records_of(f"{path}.parquet", 30)[0] == table.to_pylist()


def test_a_large_row_group_is_read_as_a_stream(tmp_path):
    rows = [{"text": f"{number} " + "x" * 100} for number in range(400)]
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=400, use_dictionary=False)
    found, parts = records_of(path, 2000)
    assert found == rows
    assert len(parts) > 10
    assert all(part.payload for part in parts)


def test_json_kept_as_text_in_arrow_keeps_its_numbers_and_its_keys(tmp_path):
    texts = ['{"role":"user","x":8.854e-12}', '{"role":\n"b","y":{"z":1E5}}']
    stored = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts))
    table = pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), stored)})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    (part,) = cut([str(tmp_path / "a.arrow")])
    assert (
        read_partition(part)
        == b'{"messages":[{"role":"user","x":8.854e-12},{"role": "b","y":{"z":1E5}}]}\n'
    )


def test_columns_that_are_not_json_become_opaque_values(tmp_path):
    table = pa.table(
        {
            "text": ["a"],
            "image": [{"bytes": b"1", "path": None}],
            "raw": [b"2"],
            "images": [[{"bytes": b"1", "path": "p"}]],
            "when": pa.array([0], pa.timestamp("ns")),
            "score": [float("nan")],
            "word": pa.array(["w"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    wanted = {
        "text": "a",
        "when": "1970-01-01T00:00:00",
        "score": None,
        "word": "w",
        "image": {OPAQUE: "image"},
        "raw": {OPAQUE: "bytes"},
        "images": {OPAQUE: "list of image"},
    }
    assert records_of(str(tmp_path / "a.parquet"))[0] == [wanted]
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert records_of(str(tmp_path / "a.arrow"))[0] == [wanted]


# --- CSV ------------------------------------------------------------------------------------------


@CHEAP
@given(
    rows=st.lists(st.tuples(TEXT, TEXT.map(lambda t: t + "x")), max_size=8),
    suffix=st.sampled_from([".csv", ".tsv", ".csv.gz"]),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_cells_are_text_as_they_are_written(tmp_path, rows, suffix, newline):
    quoted = lambda cell: '"' + cell.replace('"', '""') + '"'  # noqa: E731
    comma = "\t" if suffix == ".tsv" else ","
    text = "".join(comma.join(map(quoted, cells)) + newline for cells in [("prompt", "a b"), *rows])
    path = tmp_path / f"a{suffix}"
    path.write_bytes((gzip.compress if suffix.endswith(".gz") else bytes)(text.encode()))
    assert records_of(str(path), 20)[0] == [{"prompt": a, "a b": b} for a, b in rows]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_name_of_a_column_may_hold_a_newline(tmp_path, suffix, newline):
    text = f'"a{newline}""b""{newline}",c{newline}1,"2{newline}"{newline}3,4{newline}'
    path = tmp_path / f"a{suffix}"
    path.write_bytes((gzip.compress if suffix.endswith(".gz") else bytes)(text.encode()))
    name = f'a{newline}"b"{newline}'
    assert records_of(str(path), 20)[0] == [{name: "1", "c": f"2{newline}"}, {name: "3", "c": "4"}]


def test_a_header_whose_quotes_are_never_closed_is_an_error(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"a,b\n1,2\n')
    with pytest.raises(InputUnreadable, match="is not valid CSV"):
        records_of(str(path))


def test_numbers_stay_text_and_json_columns_are_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        '\ufeffid;messages;text\n007;"[{""role"": ""user"", ""n"": 1}]";NA\n\n1.10;"[broken";\n',
        encoding="utf-8",
    )
    assert records_of(str(path))[0] == [
        {"id": "007", "messages": [{"role": "user", "n": 1}], "text": "NA"},
        None,
        {"id": "1.10", "messages": "[broken", "text": ""},
    ]


def test_rows_that_do_not_fit_the_header_are_rejected_individually(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\na,b\nonly\nx,y,z\n\xe9,c\nlast,d\n")
    first, short, wide, latin, last = records_of(str(path))[0]
    assert (first, last) == (
        {"prompt": "a", "completion": "b"},
        {"prompt": "last", "completion": "d"},
    )
    assert [(type(r), r.line, r.reason) for r in (short, wide, latin)] == [
        (Rejected, 1, "bad_row"),
        (Rejected, 2, "bad_row"),
        (Rejected, 3, "bad_utf8"),
    ]
    assert "1 cells, the header 2" in short.message
    assert latin.message == "byte 0xe9 is not UTF-8"
    path.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(InputUnreadable, match="'a' twice"):
        records_of(str(path))
    path.write_text('a,b\n"never closed,2\n')
    with pytest.raises(InputUnreadable, match="is not valid CSV"):
        records_of(str(path))


# --- JSON documents -------------------------------------------------------------------------------

VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@CHEAP
@given(
    rows=st.lists(VALUE, max_size=6),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 50),
)
def test_the_elements_of_an_array_are_those_of_json_loads(
    tmp_path, monkeypatch, rows, indent, ascii_only, chunk
):
    from sftprep.sources.readers import json_array

    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    lines = [line for part in cut([str(path)], 20) for line in split_lines(read_partition(part))]
    assert [json.loads(line) for line in lines] == rows


def test_numbers_in_an_array_keep_their_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"x": 8.854e-12,\n "y": 1E5, "z": 1.10}]')
    assert read_partition(next(cut([str(path)]))) == b'{"x": 8.854e-12,  "y": 1E5, "z": 1.10}\n'


def test_one_bad_element_is_one_bad_record(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "a"}, 5, {"text": "\xe9"}, {"text": NaN}, {"text": "b"}]')
    found = records_of(str(path))[0]
    assert [r if isinstance(r, dict) else r.reason for r in found] == [
        {"text": "a"},
        "bad_row",
        "bad_utf8",
        "bad_json",
        {"text": "b"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": 2', "cut short"),
        ('[{"a": 1} {"a": 2}]', "where , or ] is expected"),
        (
            (
                '[{"a": 1},\n {"a" 2}, {"a": 3}, {"a": 4}, {"a": 5}, {"a": 6}, {"a": 7}, {"a": 8},'
                ' {"a": 9}]'
            ),
            "delimiter",
        ),
        ("hello", "neither"),
        ('{\n"x": {"data": []}, "y": 1}', "without an array"),
        ("[" + "[" * 100_000, "deeply|cut short"),
        ('[{"a": 1}] [{"a": 2}]', "something follows"),
        ('{\n"data": [{"a": 1}], "x": 1', "not closed"),
        ('{\n"data": [{"a": 1}], "x"}', "colon"),
        ('{\n"data": [{"a": 1}]} {"a": 2}', "something follows"),
    ],
)
def test_a_malformed_document_is_an_error_with_its_position(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputUnreadable, match=message):
        records_of(str(path))


def test_a_document_may_be_empty_or_one_record(tmp_path):
    path = tmp_path / "a.json"
    for text, rows in (("", []), (" \n", []), ("[]", []), ('{"text": "a"}', [{"text": "a"}])):
        path.write_text(text)
        assert records_of(str(path))[0] == rows


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_of_mixed_kinds_is_read_without_its_metadata(tmp_path):
    rows = chats(3)
    for name in ("b.parquet", "a.jsonl", "c.json", "d.arrow"):
        WRITERS[
            {"b.parquet": "a.parquet", "c.json": "a.json", "d.arrow": "a.arrow"}.get(name, name)
        ](rows, str(tmp_path / name))
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("about")
    found = find_files((str(tmp_path),))
    assert [Path(f).name for f in found] == ["a.jsonl", "b.parquet", "c.json", "d.arrow"]
    assert [record for file in found for record in records_of(file)[0]] == rows * 4


def test_folders_that_datasets_saved_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"{k}"} for k in range(20)]
    train, test = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows[:3])
    train.save_to_disk(tmp_path / "one", num_shards=3)
    files = find_files((str(tmp_path / "one"),))
    assert [record for file in files for record in records_of(file)[0]] == rows
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert len(records_of(find_files((str(tmp_path / "both"),))[0])[0]) == 20
    assert len(records_of(find_files((str(tmp_path / "both"),), "test")[0])[0]) == 3
    with pytest.raises(ConfigError, match=r"no split 'dev'[\s\S]*train, test"):
        find_files((str(tmp_path / "both"),), "dev")
    datasets.DatasetDict(a=train, b=test).save_to_disk(tmp_path / "neither")
    with pytest.raises(ConfigError, match="splits a, b"):
        find_files((str(tmp_path / "neither"),))


def test_splits_of_a_folder_are_determined_from_names_of_files(tmp_path):
    for name in ("train-1.jsonl", "train-2.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("")
    names = lambda split: [Path(file).name for file in find_files((str(tmp_path),), split)]  # noqa: E731
    assert names("test") == ["test.jsonl"]
    assert names("train") == ["train-1.jsonl", "train-2.jsonl"]
    assert len(names(None)) == 3
    with pytest.raises(ConfigError, match=r"no split 'dev'[\s\S]*test, train"):
        names("dev")
    with pytest.raises(ConfigError, match="files have no splits"):
        find_files((str(tmp_path / "test.jsonl"),), "test")


def test_a_split_is_read_in_all_kinds_of_files_and_other_files_are_logged(tmp_path, caplog):
    names = ("train-1.jsonl", "train-2.jsonl", "train-3.parquet", "test.csv", "notes.jsonl")
    for name in names:
        (tmp_path / name).write_text("")
    found = find_files((str(tmp_path),), "train")
    assert [Path(file).name for file in found] == list(names[:3])
    skipped = f"{tmp_path}/notes.jsonl, {tmp_path}/test.csv"
    assert f"not read: {skipped} (not of the split 'train' by their names)" in caplog.text


def test_a_build_is_not_an_input(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "manifest.json").write_text('{"format_version": "1.1", "sftprep_version": "0"}')
    with pytest.raises(FormatError, match="is a build"):
        find_files((str(tmp_path),))
    (tmp_path / "x").mkdir()
    with pytest.raises(InputNotFound):
        find_files((str(tmp_path / "x"),))


def test_data_in_memory_is_read_with_and_without_nulls():
    blocks = lambda: iter([b'{"a":null,"b":1}\n{"a":2}\n', b'{"c":[null,{"d":null}]}\n'])  # noqa: E731
    source = Source("<rows>", blocks=blocks)
    assert records_of(source)[0] == [{"a": None, "b": 1}, {"a": 2}, {"c": [None, {"d": None}]}]
    assert [(part.start, part.end) for part in records_of(source)[1]] == [(0, 2), (2, 3)]
    assert records_of(Source("<rows>", blocks=blocks, strip_nulls=True))[0] == [
        {"b": 1},
        {"a": 2},
        {"c": [None, {}]},
    ]
    assert records_of(Source("<rows>", blocks=blocks, limit=2))[0] == [
        {"a": None, "b": 1},
        {"a": 2},
    ]


def test_a_limit_holds_for_the_files_of_a_group_together(tmp_path):
    files = []
    for name in "abc":
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(f'{{"text": "{name}{k}"}}\n' for k in range(4)))
        files.append(str(path))
    sources = [Source(file, limit=6, group=1) for file in files[:2]] + [
        Source(files[2], limit=1, group=2)
    ]
    lines = [
        parse_line(line, 0) for part in cut(sources) for line in split_lines(read_partition(part))
    ]
    assert [record["text"] for record in lines if record] == [
        "a0",
        "a1",
        "a2",
        "a3",
        "b0",
        "b1",
        "c0",
    ]


def test_half_precision_numbers_are_read(tmp_path):
    table = pa.table({"x": pa.array(np.array([0.5, 1.5], dtype=np.float16))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert records_of(str(tmp_path / "a.parquet"))[0] == [{"x": 0.5}, {"x": 1.5}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "pairs",
    [
        [("train", 2), ("data", 3)],
        [("train", 2), ("test", 3)],
        [("meta", 1), ("data", 2)],
        [("data", 0), ("rows", 2)],
        [("train", 2), ("train", 1)],
        [("train", 2), ("tr\\u0061in", 1)],
    ],
)
def test_a_document_with_several_arrays_of_records_is_an_error(tmp_path, pairs, indent):
    space = "\n" if indent else ""
    rows = lambda count: json.dumps([{"text": "a b"}] * count, indent=indent)  # noqa: E731
    body = f",{space}".join(f'"{key}":{space}{rows(count)}' for key, count in pairs)
    (tmp_path / "a.json").write_text(f"{{{space}{body}{space}}}")
    names = [json.loads(f'"{key}"') for key, _ in pairs]
    with pytest.raises(InputUnreadable, match=f"several arrays of records: {', '.join(names)}"):
        records_of(str(tmp_path / "a.json"))


def test_a_response_of_the_hub_has_one_array_of_records(tmp_path):
    response = {"features": [{"name": "text"}], "rows": [{"text": "a"}], "num_rows_total": 1}
    (tmp_path / "a.json").write_text(json.dumps(response))
    assert records_of(str(tmp_path / "a.json"))[0] == [{"text": "a"}]

"""The columns that the summary lists as not read: those of every record, not of the first ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftprep import build, doctor
from sftprep.pipeline.build import BuildReport
from sftprep.records.checks import unread_columns
from sftprep.records.unread_turns import has_value
from sftprep.report.summary import summary_data, summary_lines
from sftprep.sources.readers.array_content import has_content
from sftprep.stream import open_stream

CHAT = {
    "messages": [
        {"role": "user", "content": "Name a lighthouse."},
        {"role": "assistant", "content": "Roter Sand."},
    ]
}


@pytest.fixture
def reported(tokenizer_dir: Path, tmp_path: Path) -> Any:
    """Build records, and return the report and its lines about columns."""

    def run(*files: list[Any], **settings: Any) -> tuple[BuildReport, list[str]]:
        paths = []
        for number, rows in enumerate(files):
            paths.append(tmp_path / f"{number}.jsonl")
            paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = build(
            [*map(str, paths)],
            tokenizer=tokenizer_dir,
            output=tmp_path / "o",
            overwrite=True,
            **{"workers": 1, **settings},
        )
        return report, [line for line in summary_lines(report) if line.startswith("not read")]

    return run


def test_a_column_that_only_a_late_record_has_is_listed(reported: Any) -> None:
    report, lines = reported([{**CHAT, "id": 1}, *[CHAT] * 200, {**CHAT, "notes": "late"}])
    assert lines == ["not read: id, notes"]
    assert summary_data(report)["reading"][0]["not_read"] == ["id", "notes"]


def test_a_column_that_is_first_filled_in_a_late_record_is_listed(reported: Any) -> None:
    empty = [
        {**CHAT, "notes": value, "never": None} for value in (None, "", [], {}) for _ in "0" * 50
    ]
    assert reported([*empty, {**CHAT, "notes": 0, "never": None}])[1] == ["not read: notes"]
    assert reported(empty)[1] == []


def test_columns_are_listed_with_several_processes_and_from_kept_spills(reported: Any) -> None:
    rows = [*[CHAT] * 200, {**CHAT, "notes": "late"}]
    for settings in ({"workers": 2, "keep_spill": True}, {"workers": 1}):
        report, lines = reported(rows, **settings)
        assert lines == ["not read: notes"]
    assert report.reused == 1


def test_a_late_column_with_a_meaningful_name_is_listed_and_counted(reported: Any) -> None:
    report, lines = reported([*[CHAT] * 200, {**CHAT, "rationale": "Because of the reef."}])
    assert lines == ["not read: rationale"]
    assert report.manifest.accounting.warnings["column_not_read:rationale"] == 1


def test_files_that_are_read_alike_share_a_line(reported: Any) -> None:
    _, lines = reported([{**CHAT, "a": 1}], [{**CHAT, "b": 1}], [CHAT])
    assert lines == ["not read: a, b"]


def test_columns_of_the_results_of_a_transform_are_listed(reported: Any) -> None:
    rows = [{"q": "a", "n": number} for number in range(200)]
    _, lines = reported(rows, transform=_with_a_note_at_the_end)
    assert lines == ["not read: note"]


def _with_a_note_at_the_end(record: Any) -> Any:
    return {**CHAT, "note": "x"} if record["n"] == 199 else CHAT


def test_every_one_of_many_columns_is_listed(reported: Any) -> None:
    names = [f"c{number:02}" for number in range(40)]
    _, (line,) = reported([{**CHAT, **dict.fromkeys(names, "x")}])
    assert line == f"not read: {', '.join(names)}"


def test_names_that_a_list_would_hide_are_quoted(reported: Any) -> None:
    _, (line,) = reported([{**CHAT, "": "x", " a": "y", "b, c": "z", "d": 1}])
    assert line == "not read: '', ' a', 'b, c', d"


def test_more_columns_than_are_shown_are_counted(reported: Any) -> None:
    rows = [{**CHAT, f"c{number:03}": "x"} for number in range(130)]
    report, (line,) = reported(rows)
    assert line.endswith("c099 and 30 more: see --json")
    assert len(summary_data(report)["reading"][0]["not_read"]) == 130


def test_names_beyond_a_limit_share_one(reported: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(unread_columns, "_MOST_FOUND", 30)
    report, _ = reported([{**CHAT, f"c{number:03}": "x"} for number in range(130)])
    assert report.readings[0].not_read[-1] == "(others)"


ROWS: list[dict[str, Any]] = [
    {
        "messages": CHAT["messages"],
        **dict.fromkeys(("rationale", "train_mask", "notes", "score", "facts", "a.b"), None),
        **{"empty": "", "lists": [""], "vector": [0.5, 1.5]},
    }
    for _ in range(300)
]
for number in (150, 160):
    ROWS[number] = {**ROWS[number], "rationale": "Because of the reef.", "train_mask": True}
ROWS[200] = {**ROWS[200], "notes": "late", "score": 0.0, "facts": {"n": 1, "m": None}, "a.b": "x"}
FILLED = ["a.b", "facts", "notes", "rationale", "score", "train_mask", "vector"]
KINDS = ["jsonl", "parquet", "arrow", "stream", "table", "rows", "dataset", "iterable"]


def write_rows(kind: str, folder: Path) -> Any:
    """Return the rows as a file, or as data in memory."""
    table = pa.Table.from_pylist(ROWS)
    table = table.append_column("never", pa.nulls(len(ROWS), pa.string()))
    path = folder / f"rows.{'arrow' if kind == 'stream' else kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=70)
    elif kind in ("arrow", "stream"):
        new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=64)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({**row, "never": None}) + "\n" for row in ROWS))
    else:
        dataset = datasets.Dataset.from_list(ROWS)
        return {
            "table": table,
            "rows": ROWS,
            "dataset": dataset,
            "iterable": dataset.to_iterable_dataset(),
        }[kind]
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_report_the_same_columns_as_lines(
    kind: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = write_rows(kind, tmp_path)
    report = build(source, tokenizer=tokenizer_dir, output=tmp_path / "o", workers=1)
    assert sorted(report.readings[0].not_read) == FILLED
    manifest = report.manifest
    assert manifest.accounting.warnings == {
        "column_not_read:rationale": 2,
        "column_not_read:train_mask": 2,
    }
    for name in manifest.accounting.warnings:
        assert manifest.locate_warning(name) == (manifest.inputs[0].path, 151)
    found = doctor(write_rows(kind, tmp_path), tokenizer=tokenizer_dir)
    assert sorted(found.sources[0].not_read) == FILLED
    verdicts = {verdict.kind: (verdict.number, verdict.line) for verdict in found.verdicts}
    assert verdicts == dict.fromkeys(manifest.accounting.warnings, (2, 151))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "table"])
def test_streams_of_tables_log_the_same_columns_as_lines(
    kind: str, tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_rows(kind, tmp_path)
    with caplog.at_level(logging.WARNING, logger="sftprep"):
        for _ in open_stream(source, tokenizer=str(tokenizer_dir), lanes=1):
            pass
    logged = [line for line in caplog.messages if "is not read" in line]
    assert len(logged) == 2
    for name, line in zip(("rationale", "train_mask"), sorted(logged), strict=True):
        assert f"the column {name!r} is not read" in line
        assert ":151)" in line


def test_a_column_of_a_csv_file_is_counted_where_it_is_filled(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,code,none\n" + "a text,,\n" * 150 + 'a text,"x = 1",\n' * 2)
    report = build(path, tokenizer=tokenizer_dir, output=tmp_path / "o", workers=1)
    assert report.readings[0].not_read == ("code",)
    assert report.manifest.accounting.warnings == {"column_not_read:code": 2}
    assert report.manifest.locate_warning("column_not_read:code") == (str(path), 151)


def test_a_column_without_statistics_is_listed(tokenizer_dir: Path, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "id": ["1", None], "gone": pa.nulls(2, pa.string())})
    pq.write_table(table, tmp_path / "a.parquet", write_statistics=False)
    report = build(tmp_path / "a.parquet", tokenizer=tokenizer_dir, output=tmp_path / "o")
    assert sorted(report.readings[0].not_read) == ["gone", "id"]


def test_columns_of_many_batches_and_of_dictionaries_are_listed(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    many = pa.table({"text": ["a"] * 40, "id": [None] * 39 + ["x"]})
    few = pa.table({"text": pa.array(["a", "b"]).dictionary_encode(), "id": ["1", "2"]})
    for name, table in (("many.arrow", many), ("few.arrow", few)):
        with pa.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        report = build(tmp_path / name, tokenizer=tokenizer_dir, output=tmp_path / f"{name}.out")
        assert report.readings[0].not_read == ("id",)


values = st.one_of(
    st.lists(st.none() | st.sampled_from(["", "a"])),
    st.lists(st.none() | st.integers(0, 1)),
    st.lists(st.none() | st.sampled_from([0.0, 1.5])),
    st.lists(st.none() | st.booleans()),
    st.lists(st.none() | st.lists(st.none() | st.sampled_from(["", "a"]))),
    st.lists(st.none() | st.fixed_dictionaries({"a": st.none() | st.just(""), "b": st.none()})),
    st.lists(st.none() | st.fixed_dictionaries({"a": st.lists(st.integers(0, 1), max_size=1)})),
)


@given(values, st.integers(0, 3), st.sampled_from(["plain", "dictionary", "view", "fixed"]))
def test_an_array_has_content_where_its_json_has_a_value(
    column: list[Any], start: int, form: str
) -> None:
    array = pa.array(column)
    if form == "dictionary" and pa.types.is_string(array.type):
        array = array.slice(start).dictionary_encode()
    elif form == "view" and pa.types.is_string(array.type):
        array = array.cast(pa.string_view()).slice(start)
    elif form == "fixed":
        column = [[value, None] for value in column]
        array = pa.array(column, pa.list_(array.type, 2)).slice(start)
    else:
        array = array.slice(start)
    assert has_content(array) == any(map(has_value, column[start:]))


def test_columns_of_a_table_are_listed_even_if_null_in_the_first_rows(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [{**CHAT, "notes": None, "id": 1}] * 200 + [{**CHAT, "notes": "late", "id": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    report = build(
        str(tmp_path / "a.parquet"), tokenizer=tokenizer_dir, output=tmp_path / "o", workers=1
    )
    assert sorted(report.readings[0].not_read) == ["id", "notes"]

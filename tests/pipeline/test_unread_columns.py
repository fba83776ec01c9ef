"""The columns that the summary lists as not read: those of every record, not of the first ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftprep import build
from sftprep.pipeline.build import BuildReport
from sftprep.records.checks import unread_columns
from sftprep.report.summary import summary_data, summary_lines

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


def test_columns_of_a_table_are_listed_even_if_null_in_the_first_rows(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [{**CHAT, "notes": None, "id": 1}] * 200 + [{**CHAT, "notes": "late", "id": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    report = build(
        str(tmp_path / "a.parquet"), tokenizer=tokenizer_dir, output=tmp_path / "o", workers=1
    )
    assert sorted(report.readings[0].not_read) == ["id", "notes"]

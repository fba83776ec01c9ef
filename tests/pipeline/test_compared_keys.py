"""Keys by which records are compared: one that no record has is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftprep import build
from sftprep.errors import ConfigError, FlagNames
from sftprep.report.summary import summary_lines


@pytest.fixture
def built(tokenizer_dir: Path, tmp_path: Path) -> Any:
    def run(*files: list[Any], by: str, **settings: Any) -> Any:
        for number, rows in enumerate(files):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{number}.jsonl").write_text(lines)
        settings = {"duplicates": "drop", "duplicates_by": by, "workers": 1, **settings}
        inputs = [str(tmp_path / f"{number}.jsonl") for number in range(len(files))]
        return build(inputs, tokenizer=tokenizer_dir, output=tmp_path / "o", **settings)

    return run


@pytest.mark.parametrize("settings", [{}, {"duplicates": "keep", "eval_fraction": 0.5}])
def test_a_key_that_no_record_has_is_an_error_with_the_most_similar_key(
    built: Any, tmp_path: Path, settings: Any
) -> None:
    rows = [{"text": f"text {n}", "page_url": n} for n in range(9)]
    with pytest.raises(ConfigError) as caught:
        built(rows, by="text,page_ulr", **settings)
    text = str(caught.value.shown_by(FlagNames()))
    assert f"none of the first records of {tmp_path}/0.jsonl has the key 'page_ulr'" in text
    assert "their keys are 'page_url', 'text'" in text
    assert "did you mean --duplicates-by page_url?" in text
    assert not (tmp_path / "o").exists()


def test_a_key_unlike_all_others_is_an_error_as_well(built: Any) -> None:
    with pytest.raises(ConfigError, match="name a key of the records"):
        built([{"text": "a"}], by="zzz")
    with pytest.raises(ConfigError, match='did you mean duplicates_by="URL"'):
        built([{"text": "a", "URL": 1}], by="url")


def test_a_key_that_one_of_several_files_has_is_enough(built: Any, tmp_path: Path) -> None:
    report = built([{"text": "a"}, {"text": "b"}], [{"text": "c", "url": 1}] * 2, by="url")
    assert report.manifest.accounting.left_out == {"duplicate": 1}
    with pytest.raises(ConfigError, match=r"0\.jsonl and 1 more inputs"):
        built([{"text": "a"}], [{"text": "b"}], by="url", overwrite=True)


def test_records_without_the_key_are_counted_with_the_first_line(built: Any) -> None:
    rows = [{"text": f"t{n}", "url": n} for n in range(3)]
    rows += [{"text": "x", "url": None}, {"text": "y"}, {"text": "z", "url": ""}]
    report = built(rows, by="url")
    assert report.manifest.accounting.warnings == {"compared_key_missing:url": 2}
    warning = next(line for line in summary_lines(report) if "compared" in line)
    assert "the record has no 'url', by which records are compared" in warning
    assert "(2 records, first in " in warning
    assert ":4)" in warning


def test_a_key_that_a_transform_adds_is_known(built: Any) -> None:
    report = built(
        [{"text": f"t{n}", "n": n} for n in range(4)],
        by="half",
        transform=lambda r: {"text": r["text"], **({"half": r["n"] // 2} if r["n"] else {})},
    )
    assert report.manifest.accounting.left_out == {"duplicate": 1}
    assert report.manifest.accounting.warnings == {"compared_key_missing:half": 1}
    assert report.manifest.inputs[0].first_lines["warnings.compared_key_missing:half"] == 1


def test_a_column_of_a_table_that_no_format_reads_is_compared(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"text {n}", "page_url": n // 2} for n in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    report = build(
        str(tmp_path / "a.parquet"),
        tokenizer=tokenizer_dir,
        output=tmp_path / "o",
        duplicates="drop",
        duplicates_by="page_url",
    )
    assert report.manifest.accounting.left_out == {"duplicate": 4}


def test_an_input_without_a_readable_record_reports_that(built: Any, tmp_path: Path) -> None:
    report = built([{"text": "a", "url": 1}], [], by="url")
    assert report.manifest.accounting.sequences == 1


def test_the_summary_says_that_warnings_count_duplicates_as_well(built: Any) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": chat, "rationale": "Because.", "url": 1}] * 3
    lines = summary_lines(built(rows, by="url"))
    (number,) = (n for n, line in enumerate(lines) if line.startswith("warning: the column"))
    assert "(3 records, first in " in lines[number]
    assert lines[number + 1] == (
        "note: the warnings count all records that were read, including those left out"
        " (duplicate 2)"
    )


def test_there_is_no_such_note_without_warnings_or_without_omitted_records(built: Any) -> None:
    without_warning = summary_lines(built([{"text": "a", "url": 1}] * 2, by="url"))
    without_omission = summary_lines(
        built([{"text": "a", "url": 1, "rationale": "B."}], by="url", overwrite=True)
    )
    for lines in (without_warning, without_omission):
        assert not any("the warnings count" in line for line in lines)

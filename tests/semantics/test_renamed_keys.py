"""Values that keys renamed by the user replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftprep import build
from sftprep.records.options import rename_keys
from tests.semantics.conftest import CHATML
from tests.semantics.prepared import Prepared, prepare

ROW = {"question": "one question", "answer": "one answer"}
MAP = "question=instruction,answer=output"


def counted(made: Prepared) -> dict[str, tuple[int, int]]:
    """Return the number and the first line of each warning."""
    counts, first_lines = made.batch.counts, made.batch.first_lines
    names = [name for name in counts if name.startswith("warnings.")]
    return {name.removeprefix("warnings."): (counts[name], first_lines[name]) for name in names}


def test_a_filled_key_that_a_renamed_one_replaces_is_counted(folder_with: Any) -> None:
    rows = [ROW, {**ROW, "instruction": "unique instruction text"}, {**ROW, "instruction": None}]
    made = prepare(rows, folder_with(CHATML), map=MAP)
    assert len(made) == 3
    assert counted(made) == {"column_not_read:instruction": (1, 1)}


def test_a_replaced_text_is_counted(folder_with: Any) -> None:
    rows = [{"body": "a body of text", "text": "another text"}]
    made = prepare(rows, folder_with(CHATML), map="body=text")
    assert counted(made) == {"column_not_read:text": (1, 0)}


def test_of_two_keys_with_the_same_new_name_the_replaced_one_is_counted(folder_with: Any) -> None:
    rows = [{"one": "the first text", "two": "the second text"}]
    made = prepare(rows, folder_with(CHATML), map="one=text,two=text")
    assert "the second text" in made.text()
    assert counted(made) == {"column_not_read:one": (1, 0)}


def test_a_replaced_value_that_is_read_elsewhere_is_not_counted(folder_with: Any) -> None:
    row = {**ROW, "instruction": "one question"}
    assert counted(prepare([row], folder_with(CHATML), map=MAP)) == {}


def test_a_formatting_function_receives_renamed_keys_and_what_they_replace_is_counted(
    folder_with: Any,
) -> None:
    rows = [{"body": "read", "words": "read"}, {"body": "not read", "words": "read"}]
    rows += [{"body": None, "words": "read"}, {"body": "", "words": "read"}]
    made = prepare(
        rows,
        folder_with(CHATML),
        map="words=body",
        formatting_func=lambda record: f"{record.pop('body')} {sorted(record)}",
    )
    assert [made.text(number) for number in range(4)] == ["read []<|im_end|>"] * 4
    assert counted(made) == {"column_not_read:body": (1, 1)}


def test_a_null_replaces_no_text(folder_with: Path | Any) -> None:
    made = prepare(
        [{**ROW, "question": None, "instruction": "a filled one"}], folder_with(CHATML), map=MAP
    )
    assert "a filled one" in made.text()
    assert counted(made) == {}


@pytest.mark.parametrize(
    ("record", "renamed", "replaced"),
    [
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}, {}),  # two keys that are exchanged
        ({"a": None, "b": 2}, {"a": 2, "b": None}, {}),
        ({"b": 2}, {"a": 2}, {}),
    ],
)
def test_exchanged_keys_replace_nothing(
    record: dict[str, Any], renamed: dict[str, Any], replaced: dict[str, Any]
) -> None:
    found: dict[str, Any] = {}
    assert rename_keys(record, (("a", "b"), ("b", "a")), found) == renamed
    assert found == replaced


@pytest.mark.parametrize(("question", "is_named"), [(None, False), ("new p", True)])
def test_a_text_that_null_does_not_replace_is_not_named_as_lost(
    question: str | None, is_named: bool, folder_with: Any, tmp_path: Path, caplog: Any
) -> None:
    row = {"question": question, "prompt": "old p", "answer": "a w"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    renames = "question=prompt,answer=completion"
    folder = folder_with(CHATML)
    build(tmp_path / "a.jsonl", tokenizer=folder, output=tmp_path / "out", map=renames)
    assert ("'prompt' of the first record" in caplog.text) == is_named

"""What an error tells the user to correct: the record, the function, or the names of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftprep import build
from sftprep.errors import EmptyInput, FlagNames, RecordError, SftprepError
from sftprep.stream import open_stream

BROKEN = "def to_chat(record):\n    return record['absent']\n"
CHAT = {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "so"}]}


@pytest.fixture
def function(tmp_path: Path) -> str:
    (tmp_path / "convert.py").write_text(BROKEN)
    return f"{tmp_path}/convert.py:to_chat"


def remedy_of(source: object, tokenizer_dir: Path, tmp_path: Path, **settings: object) -> str:
    with pytest.raises(SftprepError) as caught:
        build(source, tokenizer=tokenizer_dir, output=tmp_path / "out", **settings)
    return caught.value.shown_by(FlagNames()).remedy


@pytest.mark.parametrize("mode", ["error", "quarantine"])
def test_a_transform_that_always_fails_is_what_to_correct(
    mode: str, function: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    more = {"max_rejected": "100%"} if mode == "quarantine" else {}
    found = remedy_of(
        [{"a": "b"}] * 3, tokenizer_dir, tmp_path, transform=function, on_bad_record=mode, **more
    )
    assert found.startswith(f"correct the function of --transform {function}")
    for other in ("--format", "--train-on", "--max-length", "correct the record,"):
        assert other not in found


def test_a_transform_that_fails_too_often_is_what_to_correct(
    function: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [{"a": "b"}] * 3
    found = remedy_of(rows, tokenizer_dir, tmp_path, transform=function, on_bad_record="quarantine")
    assert found.startswith(f"correct the function of --transform {function}")


@pytest.mark.parametrize("mode", ["error", "quarantine"])
def test_a_stream_names_the_function_as_well(mode: str, function: str, tokenizer_dir: Path) -> None:
    stream = open_stream(
        [{"a": "b"}] * 3,
        tokenizer=str(tokenizer_dir),
        max_length=64,
        transform=function,
        on_bad_record=mode,
        max_rejected="100%",
        lanes=1,
    )
    with pytest.raises((EmptyInput, RecordError)) as caught:
        list(stream)
    assert caught.value.remedy.startswith(f'correct the function of transform="{function}"')
    assert "max_length" not in caught.value.remedy


def test_text_files_among_records_are_named_by_a_pattern(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(CHAT) + "\n")
    (folder / "b.txt").write_text("one line\n")
    found = remedy_of(folder, tokenizer_dir, tmp_path, format="text")
    assert "name the files of one by a pattern (FOLDER/*.txt)" in found
    assert "correct the record" not in found
    build(folder / "*.txt", tokenizer=tokenizer_dir, output=tmp_path / "out", format="text")


def test_text_files_have_no_keys(tokenizer_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.txt"
    file.write_text("one line\n")
    with pytest.raises(SftprepError, match="they have no keys") as caught:
        build(
            file,
            tokenizer=tokenizer_dir,
            output=tmp_path / "out",
            format="text",
            text_field="body",
        )
    assert "leave out text_field" in caught.value.remedy
    assert "correct the record" not in caught.value.remedy

"""Inputs without a usable record: the error says what became of the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftprep import Drop, build
from sftprep.errors import ConfigError, EmptyInput, RecordError
from sftprep.stream import open_stream


@pytest.fixture(params=["all", "assistant", "last-assistant", "completion"])
def built(request: Any, tokenizer_dir: Path, tmp_path: Path) -> Any:
    def run(path: str, **settings: Any) -> Any:
        settings = {"train_on": request.param, "workers": 1, **settings}
        return build(path, tokenizer=tokenizer_dir, output=tmp_path / "o", **settings)

    return run


def _drop_by_number(record: Any) -> Any:
    return Drop("low" if record["n"] % 2 else "long")


def _drop_without_reason(record: Any) -> None:
    return None


def test_a_transform_that_drops_every_record_is_named_with_its_reasons(
    built: Any, records: Any
) -> None:
    path = records([{"n": n} for n in range(5)])
    with pytest.raises(EmptyInput) as caught:
        built(path, transform=_drop_by_number)
    text = str(caught.value)
    assert "(dropped: long 3, low 2)" in text
    assert f"\n  {path}:1: the transform dropped it [long]" in text
    assert f"\n  {path}:2: the transform dropped it [low]" in text
    assert "check the function of transform, which dropped 5 of 5 records" in text


def test_a_transform_that_returns_none_for_every_record_is_named(built: Any, records: Any) -> None:
    path = records([{"n": 1}])
    with pytest.raises(EmptyInput, match=r"\(dropped: transform 1\)"):
        built(path, transform=_drop_without_reason)


def test_a_file_without_a_record_of_several_does_not_fail_the_build(
    built: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"prompt": chat[:1], "completion": chat[1:]}) + "\n"
    )
    report = built(
        str(tmp_path / "*.jsonl"), transform=lambda r: Drop("no_chat") if "n" in r else r
    )
    assert report.manifest.accounting.dropped == {"no_chat": 1}
    assert report.readings[0].trained.startswith("nothing: no record could be read")
    assert [reading.shown_format for reading in report.readings] == [
        "not detected",
        "prompt-completion",
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"text": \n', "bad_json"),
        ("a.csv", "question,answer\na,b,c\n", "bad_row"),
    ],
)
def test_a_file_whose_only_line_cannot_be_parsed_is_not_called_text(
    built: Any, tmp_path: Path, name: str, content: str, reason: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecordError) as caught:
        built(str(tmp_path / name))
    assert (caught.value.reason, caught.value.line) == (reason, 1)


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_a_stream_names_the_transform_as_well(
    train_on: str, records: Any, tokenizer_dir: Path
) -> None:
    path = records([{"n": n} for n in range(5)])
    stream = open_stream(
        path, tokenizer=str(tokenizer_dir), train_on=train_on, transform=_drop_by_number
    )
    with pytest.raises(EmptyInput) as caught:
        list(stream)
    assert f"\n  {path}:2: the transform dropped it [low]" in str(caught.value)
    assert "check the function of transform, which dropped 5 of 5 records" in str(caught.value)


def test_the_format_is_detected_after_many_lines_that_cannot_be_parsed(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": \n' * 200 + '{"text": "a"}\n' * 200)
    settings = {"output": tmp_path / "o", "on_bad_record": "quarantine", "max_rejected": "60%"}
    with pytest.raises(ConfigError, match="holds text records, which have no turns"):
        build(str(tmp_path / "a.jsonl"), tokenizer=tokenizer_dir, train_on="assistant", **settings)

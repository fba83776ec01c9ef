"""`system` and `chat_template_kwargs`, for the conversations that do not have their own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sftprep
from sftprep.cli.entry import main
from sftprep.errors import ConfigError
from sftprep.records.formats import read_record
from sftprep.records.options import RecordOptions
from sftprep.stream import open_stream
from tests.semantics.conftest import CHATML
from tests.semantics.prepared import prepare

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = "Be kind."
SWITCHED = (
    "{% if thinking %}<think>{{ thinking }}</think>{% endif %}{% for m in messages %}"
    "{{ m.role }}:{{ m.content }}\n{% endfor %}"
)

WITHOUT = [
    {"messages": TURNS},
    {"messages": [{**turn, "name": "x"} for turn in TURNS], "system": None},
    {"messages": TURNS, "system_prompt": "  "},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"question": "Hi", "answer": "Hello"},
    {"instruction": "Hi", "output": "Hello"},
    {"messages": [{**turn, "train": turn["role"] == "user"} for turn in TURNS]},
]
WITH = [
    {"messages": [{"role": "system", "content": "Own"}, *TURNS]},
    {"messages": [{"role": "system", "content": ""}, *TURNS]},
    {"messages": [{"role": "developer", "content": "Own"}, *TURNS]},
    {"messages": [*TURNS, {"role": "system", "content": "Later"}, *TURNS]},
    {"messages": TURNS, "system": "Own"},
    {"messages": TURNS, "systemInstruction": {"parts": [{"text": "Own"}]}},
    {"prompt": [{"role": "system", "content": "Own"}, *TURNS[:1]], "completion": TURNS[1:]},
    {"instruction": "Hi", "output": "Hello", "system": "Own"},
]


@pytest.mark.parametrize("row", WITHOUT)
def test_a_conversation_without_a_system_message_receives_it(
    row: dict[str, Any], folder_with: Callable[[str], Path]
) -> None:
    folder = folder_with(CHATML)
    found = prepare([row], folder, system=SYSTEM, train_on="auto")
    expected = prepare([{**row, "system": SYSTEM}], folder, train_on="auto")
    assert found.text() == expected.text()
    assert found.trained() == expected.trained()
    assert found.text().startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
    assert found.batch.counts["warnings.system_added"] == 1


@pytest.mark.parametrize("row", WITH)
def test_a_conversation_with_a_system_message_is_unchanged(
    row: dict[str, Any], folder_with: Callable[[str], Path]
) -> None:
    folder = folder_with(CHATML)
    found = prepare([copy.deepcopy(row)], folder, system=SYSTEM)
    assert found.text() == prepare([row], folder).text()
    assert "warnings.system_added" not in found.batch.counts


@given(st.dictionaries(st.sampled_from("abc"), st.none() | st.integers() | st.booleans()))
def test_variables_of_a_record_take_precedence(own: dict[str, Any]) -> None:
    options = RecordOptions(template_kwargs={"a": "x", "b": False})
    record = {"messages": copy.deepcopy(TURNS), "chat_template_kwargs": own}
    found = read_record(record, 0, "messages", options).template_kwargs
    assert found is not None
    for name, value in {"a": "x", "b": False, **own}.items():
        default = {"a": "x", "b": False}.get(name)
        assert found[name] == (default if value is None else value)


def test_variables_reach_the_template_and_unread_ones_are_counted(
    folder_with: Callable[[str], Path],
) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS, "chat_template_kwargs": {"thinking": "own"}}]
    found = prepare(rows, folder_with(SWITCHED), chat_template_kwargs={"thinking": "yes"})
    assert found.text(0).startswith("<think>yes</think>")
    assert found.text(1).startswith("<think>own</think>")
    assert "warnings.template_kwarg_not_read" not in found.batch.counts
    unread = prepare(rows, folder_with(SWITCHED), chat_template_kwargs='{"other": 1}')
    assert unread.batch.counts["warnings.template_kwarg_not_read"] == 2


@pytest.mark.parametrize("value", ["[1]", "1", "{a: 1}", "", '{"a": NaN}', [1], {1: {2}}])
def test_variables_that_are_not_an_object_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="chat_template_kwargs") as caught:
        sftprep.BuildConfig.of(chat_template_kwargs=value)
    assert "JSON object" in caught.value.remedy


@pytest.mark.parametrize("value", ["", " \n", "\udcff", 3])
def test_a_system_message_is_a_text(value: Any) -> None:
    with pytest.raises(ConfigError, match="system is"):
        sftprep.BuildConfig.of(system=value)


def test_parameters_of_the_template_function_are_refused() -> None:
    with pytest.raises(ConfigError, match="chat_template_kwargs has 'tools'"):
        sftprep.BuildConfig.of(chat_template_kwargs={"tools": []})


@pytest.mark.parametrize(
    "row", [{"text": "a b"}, {"prompt": "a", "completion": "b"}, {"input_ids": [1, 2]}]
)
@pytest.mark.parametrize("settings", [{"system": "S"}, {"chat_template_kwargs": {"a": 1}}])
def test_records_that_no_template_renders_refuse_them(
    row: dict[str, Any], settings: dict[str, Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="not rendered as turns"):
        sftprep.build([row], tokenizer=str(tokenizer_dir), output=tmp_path / "o", **settings)
    assert not (tmp_path / "o").exists()


def test_each_source_may_have_its_own(
    records: Callable[..., str],
    folder_with: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"messages": TURNS}] * 3
    sources: list[dict[str, Any]] = [
        {"path": records(rows, "a.jsonl"), "system": "A"},
        {"path": records(rows, "b.jsonl")},
        {"path": records(rows, "c.jsonl"), "system": ""},
        {"path": records(rows, "d.jsonl"), "chat_template_kwargs": {"thinking": "D"}},
    ]
    config = tmp_path / "mixture.yaml"
    settings = {"sources": sources, "system": "all", "chat_template_kwargs": {"thinking": "all"}}
    config.write_text(json.dumps(settings))
    output = tmp_path / "out"
    flags = ["--tokenizer", str(folder_with(SWITCHED)), "--output", str(output)]
    with pytest.raises(SystemExit) as end:
        main(["build", "--config", str(config), *flags, "--packing", "none", "--order", "keep"])
    assert end.value.code == 0
    assert "note: it has no system message" in capsys.readouterr().out
    manifest = sftprep.read_manifest(output)
    added = [info.accounting.warnings.get("system_added", 0) for info in manifest.inputs]
    assert added == [3, 3, 0, 3]
    decode = _decoder(folder_with(SWITCHED))
    texts = {decode(pack.input_ids.tolist()) for pack in sftprep.open_shards(output)}
    end_of_text = "user:Hi\nassistant:Hello\n"
    assert texts == {
        f"<think>all</think>system:A\n{end_of_text}",
        f"<think>all</think>system:all\n{end_of_text}",
        f"<think>all</think>{end_of_text}",
        f"<think>D</think>system:all\n{end_of_text}",
    }


def test_a_stream_and_a_preview_use_them(folder_with: Callable[[str], Path]) -> None:
    folder = str(folder_with(CHATML))
    rows = [{"messages": TURNS}]
    shown = sftprep.preview(rows, tokenizer=folder, system=SYSTEM)
    ids = shown.records[0].sequences[0].input_ids
    assert [verdict.kind for verdict in shown.verdicts] == ["system_added"]
    (pack,) = open_stream(lambda: iter(rows), tokenizer=folder, system=SYSTEM, max_length=64)
    assert [*pack.input_ids] == [*ids]


def test_the_settings_are_part_of_the_recipe_and_not_of_the_hold_out(
    folder_with: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [{"messages": [{**TURNS[0], "content": f"Hi {n}"}, TURNS[1]]} for n in range(40)]
    common = {"tokenizer": str(folder_with(CHATML)), "eval_fraction": 0.3, "workers": 1}
    first = sftprep.build(rows, output=tmp_path / "a", **common)
    second = sftprep.build(rows, output=tmp_path / "b", system=SYSTEM, **common)
    assert first.manifest.config_digest != second.manifest.config_digest
    assert first.evaluation is not None
    assert second.evaluation is not None
    held_out = first.evaluation.accounting.sequences
    assert 0 < held_out == second.evaluation.accounting.sequences


def _decoder(folder: Path) -> Callable[[list[int]], str]:
    from sftprep.tokenize.loading.decode import load_decoder
    from sftprep.tokenize.loading.load import load_tokenizer

    return load_decoder(str(folder), load_tokenizer(str(folder)).fingerprint)

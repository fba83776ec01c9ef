"""Settings of SFTConfig for raw records that a build has under the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

import sftprep
from sftprep.errors import ConfigError
from sfttrain import SFTConfig
from sfttrain.cli.arguments import read_arguments
from tests.sfttrain.trainer_factory import CHATS, make_sft_trainer, sequences, write_lines

SETTINGS: list[dict[str, Any]] = [
    {"train_roles": ["user"]},
    {"train_roles": ["user", "assistant"], "train_end": "last"},
    {"system": "Be short."},
    {"chat_template_kwargs": {"bos_token": "x"}},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_and_paths_are_read_as_by_a_build(
    settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    trainer = make_sft_trainer(model, tmp_path, CHATS, **settings)
    sftprep.build(CHATS, tokenizer=str(model), output=tmp_path / "build", workers=1, **settings)
    expected = sequences(sftprep.open_shards(tmp_path / "build"))
    assert sequences(trainer.train_dataset) == expected
    path = write_lines(tmp_path / "raw.jsonl", CHATS)
    trainer = make_sft_trainer(model, tmp_path, path, **settings)
    assert sequences(trainer.train_dataset) == expected


def test_end_tokens_of_assistant_turns(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train_end": "none"}
    trainer = make_sft_trainer(model, tmp_path, CHATS, assistant_only_loss=True, **settings)
    settings |= {"train_on": "assistant", "tokenizer": str(model), "workers": 1}
    sftprep.build(CHATS, output=tmp_path / "build", **settings)
    assert sequences(trainer.train_dataset) == sequences(sftprep.open_shards(tmp_path / "build"))


def test_streams_use_them_too(model: Path, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(CHATS).to_iterable_dataset()
    options = {"train_roles": ["user"], "system": "Be short."}
    trainer = make_sft_trainer(model, tmp_path, data, packing=True, max_steps=1, **options)
    expected = make_sft_trainer(model, tmp_path, CHATS, packing=True, **options)
    assert sequences(trainer.train_dataset) == sequences(expected.train_dataset)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_roles": ["critic"]}, "train_roles is 'critic'"),
        ({"train_end": "first"}, "train_end is 'first'"),
        ({"train_end": "last"}, "train_end needs trained turns"),
        ({"system": " "}, "system is empty"),
        ({"chat_template_kwargs": "thinking"}, "chat_template_kwargs is 'thinking'"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs has 'messages'"),
    ],
)
def test_invalid_settings_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert message in str(caught.value)
    assert "train_on" not in str(caught.value)


def test_a_build_is_trained_on_as_it_is(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sftprep.build(CHATS, tokenizer=str(model), output=tmp_path / "build", workers=1)
    make_sft_trainer(model, tmp_path, str(tmp_path / "build"), system="S", train_roles=["user"])
    for name in ("system", "train_roles"):
        assert f"{name} is not applied to train_dataset, which is packed already" in caplog.text


def test_flags_and_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("chat_template_kwargs:\n  thinking: false\ntrain_roles: [user, tool]\n")
    flags = ["data", "--model", "m", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    found = read_arguments([*flags, "--config", str(file), "--system", "S"]).training
    assert found.train_roles == ["user", "tool"]
    assert found.chat_template_kwargs == {"thinking": False}
    assert found.system == "S"
    found = read_arguments([*flags, "--chat_template_kwargs", '{"a": 1}']).training
    assert found.chat_template_kwargs == {"a": 1}

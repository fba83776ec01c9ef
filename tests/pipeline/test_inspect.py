"""`sftprep inspect` shows the trained tokens and their loss weights."""

from __future__ import annotations

import json

import pytest

from sftprep import build, open_shards
from sftprep.cli import main


@pytest.fixture
def weighed(tokenizer_dir, tmp_path):
    """A pack of three conversations with the weights 0.5 and 2; 1; none."""
    conversation = lambda *weights: [  # noqa: E731
        turn
        for weight in weights
        for turn in (
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes", "loss_weight": weight},
        )
    ]
    rows = [
        {"messages": conversation(0.5, 2)},
        {"messages": conversation(1)},
        {"messages": conversation(None)},
    ]
    return str(
        build(
            rows,
            tokenizer=tokenizer_dir,
            output=tmp_path / "o",
            train_on="assistant",
            max_length=256,
        ).folder
    )


def shown(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *words])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_weights_are_shown_where_they_are_not_1(weighed, capsys):
    capsys.readouterr()
    text = shown(capsys, weighed, "--full")
    assert text.count("weights") == 1
    (line,) = (line for line in text.splitlines() if "weights" in line)
    assert line.endswith(":1")
    assert "(weights 0.5, 2)" in line


def test_json_has_the_weights_of_every_token(weighed, capsys):
    capsys.readouterr()
    (pack,) = open_shards(weighed)
    sequences = json.loads(shown(capsys, weighed, "--json"))["sequences"]
    assert [
        weight for each in sequences for weight in each["loss_weights"]
    ] == pack.loss_weights.tolist()


def test_builds_without_weights_show_none(tokenizer_dir, tmp_path, capsys):
    folder = str(
        build(
            [{"text": "a b"}], tokenizer=tokenizer_dir, output=tmp_path / "o", max_length=64
        ).folder
    )
    capsys.readouterr()
    assert "weights" not in shown(capsys, folder)
    assert "loss_weights" not in shown(capsys, folder, "--json")

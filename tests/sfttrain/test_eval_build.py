"""`sfttrain run DIR` evaluates on the evaluation build in DIR/eval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sftprep
from sfttrain.cli.main import main
from tests.conftest import EXAMPLES


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Return a build with held-out records."""
    folder = tmp_path_factory.mktemp("packs") / "packs"
    sftprep.build(
        str(EXAMPLES / "data" / "chats.jsonl"),
        tokenizer=str(model),
        output=str(folder),
        max_length=512,
        limit=24,
        eval_fraction=0.3,
        workers=1,
    )
    return folder


def run(packs: Path, model: Path, out: Path, *more: str) -> int:
    sizes = ("--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "1")
    folders = ("--model", str(model), "--output_dir", str(out))
    return main(
        ["run", str(packs), *folders, "--use_cpu", "--save_strategy", "no", "--json", *sizes, *more]
    )


def test_a_run_evaluates_at_the_end_and_names_the_packs_and_the_flags(
    packs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(packs, model, tmp_path) == 0
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("evaluation: ")]
    held_out = len(sftprep.open_shards(packs / "eval"))
    assert line == (
        f"evaluation: {packs / 'eval'}, {held_out} pack{'s' if held_out > 1 else ''}, at the end"
        " (--eval_strategy steps: more often); --eval_data none: none"
    )
    assert printed.err.count("eval loss") == 1
    assert json.loads(printed.out)["evaluation"]["eval_loss"] > 0


def test_a_strategy_evaluates_during_the_training_too(
    packs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(packs, model, tmp_path, "--eval_strategy", "steps", "--eval_steps", "1") == 0
    printed = capsys.readouterr().err
    assert "during training and at the end; --eval_data none: none" in printed
    assert printed.count("eval loss") == 3


@pytest.mark.parametrize("more", [("--eval_data", "none"), ("--eval_strategy", "no")])
def test_the_evaluation_can_be_switched_off(
    more: tuple[str, ...],
    packs: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(packs, model, tmp_path, *more) == 0
    printed = capsys.readouterr()
    assert "evaluation: " not in printed.err
    assert json.loads(printed.out)["evaluation"] == {}


def test_other_evaluation_data_take_precedence(
    packs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ("--eval_data", str(packs), "--eval_strategy", "no")
    assert run(packs, model, tmp_path, *other) == 0
    printed = capsys.readouterr()
    assert "evaluation: " not in printed.err
    assert json.loads(printed.out)["evaluation"]["eval_loss"] > 0


def test_a_strategy_without_data_is_an_error(
    packs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(packs, model, tmp_path, "--eval_strategy", "steps", "--eval_data", "none") == 2
    assert "nothing to evaluate on" in capsys.readouterr().err


def test_packs_that_are_planned_while_they_are_read_have_the_requested_length_in_both(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = tmp_path / "sequences"
    sftprep.build(
        str(EXAMPLES / "data" / "chats.jsonl"),
        tokenizer=str(model),
        output=str(build),
        max_length=512,
        limit=24,
        eval_fraction=0.3,
        workers=1,
        layout="sequences",
    )
    assert run(build, model, tmp_path / "out", "--max_length", "2048") == 0
    printed = capsys.readouterr()
    held_out = len(sftprep.open_shards(build / "eval", max_length=2048))
    assert held_out < len(sftprep.open_shards(build / "eval"))
    assert f"{build / 'eval'}, {held_out} pack" in printed.err
    assert json.loads(printed.out)["evaluation"]["eval_loss"] > 0

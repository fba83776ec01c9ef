"""Remedies in the errors and warnings of a trainer: each names only settings that exist there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sftprep.errors import FormatError, PythonNames, render_settings
from sftprep.shards.warning_kinds import KINDS, DataWarning
from sfttrain import SFTConfig
from sfttrain.config.setting_names import TrainerNames
from tests.sfttrain.trainer_factory import make_sft_trainer, model_folder, sequences, write_lines

FIELDS = {field.name for field in dataclasses.fields(SFTConfig)}
ARGUMENTS = FIELDS | {"processing_class", "train_dataset"}
CHAT = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "so"}]


def named_in(text: str) -> set[str]:
    """Return the settings in a text."""
    return set(re.findall(r"\b([a-z_]{2,})=", text))


@pytest.fixture
def model(tmp_path: Path, tokenizer_dir: Path) -> Path:
    return model_folder(tmp_path / "model", tokenizer_dir)


def remedy_for(source: Any, folder: Path, model: Path, **settings: Any) -> str:
    with pytest.raises(FormatError) as caught:
        make_sft_trainer(model, folder, source, **settings)
    return caught.value.remedy


def test_the_suggested_map_works(tmp_path: Path, model: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"My Query": "ask", "Reply": "so"}])
    remedy = remedy_for(path, tmp_path / "1", model)
    assert remedy == 'try: map="My Query=instruction,Reply=output"'
    trainer = make_sft_trainer(model, tmp_path / "2", path, map="My Query=instruction,Reply=output")
    assert len(sequences(trainer.train_dataset)) == 1


def test_the_suggested_format_works(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("one line\nand another\n")
    path = str(tmp_path / "a.txt")
    assert 'try: format="text"' in remedy_for(path, tmp_path / "1", model)
    trainer = make_sft_trainer(model, tmp_path / "2", path, format="text")
    assert len(sequences(trainer.train_dataset)) == 2


def test_the_suggested_escape_works(tmp_path: Path, model: Path, caplog: Any) -> None:
    end = "<|im_end|>"
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"so {end} it is"}])
    trained = []
    for number, settings in enumerate(({}, {"escape_special": True})):
        caplog.clear()
        trainer = make_sft_trainer(model, tmp_path / str(number), path, **settings)
        trained += [len(ids) for ids, _ in sequences(trainer.train_dataset)]
        assert ("escape_special=True" in caplog.text) == (not settings)
    assert trained[1] > trained[0]


@pytest.mark.parametrize("kind", [*KINDS, "column_not_read:code"])
def test_a_warning_names_only_settings_of_the_trainer(kind: str) -> None:
    for rows in (None, "rows.jsonl"):
        text = DataWarning(kind, 1, "a.jsonl", 1).render(TrainerNames("train_dataset", rows))
        assert named_in(text) <= ARGUMENTS


def test_a_setting_that_the_trainer_lacks_is_not_suggested() -> None:
    text = DataWarning("suspects_rejected").render(TrainerNames("train_dataset", None))
    assert "quality_checks" not in text
    assert "quality_checks" in DataWarning("suspects_rejected").render(PythonNames())
    assert render_settings("plain", PythonNames()) == "plain"

"""The transform of SFTConfig: for rows, paths and streams, by name and as an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from sftprep.errors import ConfigError
from sftprep.shards import MANIFEST_NAME
from tests.sfttrain.trainer_factory import (
    QUESTIONS,
    TEXTS,
    make_sft_trainer,
    model_folder,
    sequences,
    write_lines,
)

MADE = [
    {"prompt": row["question"], "completion": " " + row["answer"]}
    for row in QUESTIONS
    if "0" not in row["answer"]
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), tokenizer_dir)


def to_completion(row):
    if "0" in row["answer"]:
        return None
    return {"prompt": row["question"], "completion": " " + row["answer"]}


@pytest.mark.parametrize("as_path", [True, False])
def test_rows_and_paths_are_transformed_before_their_format_is_detected(
    model: Path, tmp_path: Path, as_path: bool
) -> None:
    data = write_lines(tmp_path / "raw.jsonl", QUESTIONS) if as_path else QUESTIONS
    trainer = make_sft_trainer(model, tmp_path, data, transform=to_completion)
    expected = make_sft_trainer(model, tmp_path, MADE)
    assert sequences(trainer.train_dataset) == sequences(expected.train_dataset)
    assert json.loads(trainer.args.to_json_string())["transform"].endswith(":to_completion")


def test_a_prepared_dataset_is_reused_only_for_a_known_function(
    model: Path, tmp_path: Path
) -> None:
    def folders() -> int:
        return len(list((tmp_path / "prepared").glob(f"*/{MANIFEST_NAME}")))

    for _ in range(2):
        make_sft_trainer(model, tmp_path, QUESTIONS, transform=to_completion)
    assert folders() == 1
    for answer in ("yes", "no"):
        trainer = make_sft_trainer(
            model, tmp_path, QUESTIONS, transform=lambda row, answer=answer: {"text": answer}
        )
        assert len(sequences(trainer.train_dataset)) == len(QUESTIONS)
    assert folders() == 1
    for version in ("1", "2", "2"):
        make_sft_trainer(
            model, tmp_path, QUESTIONS, transform=lambda row: {"text": "x"}, transform_id=version
        )
    assert folders() == 3


def test_an_iterable_dataset_is_transformed_while_it_is_trained_on(
    model: Path, tmp_path: Path
) -> None:
    data = datasets.Dataset.from_list(QUESTIONS * 4).to_iterable_dataset()
    trainer = make_sft_trainer(
        model, tmp_path, data, transform=lambda row: [{"text": row["answer"]}] * 2, max_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_saved_arguments_have_the_name_and_no_code(model: Path, tmp_path: Path) -> None:
    trainer = make_sft_trainer(model, tmp_path, QUESTIONS, transform=lambda row: {"text": "a"})
    trainer.train()
    trainer.save_model()
    assert callable(trainer.args.transform.load())
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert type(saved.transform) is str
    assert "<lambda>" in saved.transform


def test_a_transform_that_cannot_be_applied_is_an_error(model: Path, tmp_path: Path) -> None:
    tokens = [{"input_ids": [5, 6, 7], "seq_lengths": [2, 1]}]
    with pytest.raises(ConfigError, match="transform cannot be applied"):
        make_sft_trainer(model, tmp_path, tokens, transform=to_completion)
    with pytest.raises(ConfigError, match="formatting_func and transform"):
        make_sft_trainer(
            model, tmp_path, TEXTS, transform=to_completion, options={"formatting_func": str}
        )


@pytest.mark.parametrize(
    "given",
    [
        {"map": "question=text"},
        {"format": "messages"},
        {"as_chat": True},
        {"strip_nulls": True},
        {"transform": to_completion},
    ],
)
@pytest.mark.parametrize("is_iterable", [False, True])
def test_no_setting_for_rows_is_ignored_with_a_formatting_function(
    given: dict[str, Any], is_iterable: bool, model: Path, tmp_path: Path
) -> None:
    rows: Any = datasets.Dataset.from_list(TEXTS)
    if is_iterable:
        rows, given = rows.to_iterable_dataset(), {**given, "max_steps": 1}
    (name, *_) = given
    with pytest.raises(ConfigError, match=f"formatting_func and {name} are both given"):
        make_sft_trainer(
            model, tmp_path, rows, options={"formatting_func": lambda row: row["text"]}, **given
        )

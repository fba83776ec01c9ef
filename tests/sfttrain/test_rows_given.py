"""Datasets of every kind are read to their end, or refused by name; errors in them name the
settings of the trainer."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import IterableDataset as TorchIterable
from transformers import AutoTokenizer

from sftprep.config import BuildConfig
from sftprep.errors import (
    AttentionError,
    ConfigError,
    EmptyInput,
    FlagNames,
    FormatError,
    MismatchError,
    PythonNames,
    RecordError,
    SftprepError,
    StorageError,
    TemplateError,
    setting,
)
from sftprep.shards import temporary_name
from sfttrain import SFTConfig
from sfttrain.cli.arguments import RunConfig
from sfttrain.config.setting_names import RunStreamNames, TrainerNames
from sfttrain.data.inputs import to_row_source
from sfttrain.data.jsonl_cache import write_rows
from tests.sfttrain.tiny import tiny_model
from tests.sfttrain.trainer_factory import (
    CHATS,
    COMPLETIONS,
    TEXTS,
    make_sft_trainer,
    sequences,
    write_lines,
)
from tests.support import at_most

ROOT = Path(__file__).resolve().parents[2]


class Endless(MapDataset[Any]):
    """A torch Dataset whose __getitem__ never raises IndexError, because it wraps the index."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index % len(self.rows)]


class Lengthless(MapDataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return TEXTS[index % len(TEXTS)]


class Once(TorchIterable[Any]):
    """A torch IterableDataset that returns the same iterator each time."""

    def __init__(self) -> None:
        self.rows = iter(TEXTS)

    def __iter__(self) -> Any:
        return self.rows


class Again(TorchIterable[Any]):
    def __iter__(self) -> Any:
        return iter(TEXTS)


@pytest.mark.parametrize("settings", [{}, {"shuffle_dataset": True}], ids=["in order", "shuffled"])
def test_torch_datasets_are_read_to_their_end(
    model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    wanted = sequences(make_sft_trainer(model, tmp_path, TEXTS, **settings).train_dataset)
    assert len(wanted) == len(TEXTS)
    for kind in (
        Endless(TEXTS),
        torch.utils.data.Subset(Endless(TEXTS), range(len(TEXTS))),
        Again(),
    ):
        assert (
            sequences(make_sft_trainer(model, tmp_path, kind, **settings).train_dataset) == wanted
        ), type(kind)


def test_rows_of_tokens_in_a_torch_dataset(model: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10, 11]}]
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    assert [
        ids
        for ids, _ in sequences(
            make_sft_trainer(model, tmp_path, Endless(rows), **skip).train_dataset
        )
    ] == [
        [5, 6, 7, 8],
        [9, 10, 11],
    ]


def test_evaluation_sets_are_checked_too(model: Path, tmp_path: Path) -> None:
    trainer = make_sft_trainer(
        model, tmp_path, TEXTS, options={"eval_dataset": {"a": Endless(TEXTS), "b": TEXTS}}
    )
    found = trainer.evaluate()
    assert (
        found["eval_a_loss"]
        == found["eval_b_loss"]
        == trainer.evaluate(Endless(TEXTS))["eval_loss"]
    )
    for given in (iter(TEXTS), {"a": iter(TEXTS)}):
        with pytest.raises(ConfigError, match="can be read once only"):
            make_sft_trainer(model, tmp_path, TEXTS, options={"eval_dataset": given})
    with pytest.raises(
        ConfigError, match="eval_dataset is a list_iterator, which can be read once only"
    ):
        trainer.evaluate(iter(TEXTS))


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ((row for row in TEXTS), "train_dataset is a generator, which can be read once only"),
        (map(dict, TEXTS), "train_dataset is a map, which can be read once only"),
        (Once(), "train_dataset is a Once, which can be read once only"),
        (Lengthless(), "does not say how many rows it has"),
        (3, "train_dataset is a int, which holds no rows"),
    ],
)
def test_data_that_cannot_be_read_to_the_end_is_refused_by_name(
    model: Path, tmp_path: Path, rows: Any, what: str
) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        make_sft_trainer(model, tmp_path, rows)
    assert caught.value.remedy


def test_a_refused_iterator_is_not_consumed() -> None:
    rows = iter(TEXTS)
    with pytest.raises(ConfigError):
        to_row_source(rows, "rows")
    assert list(rows) == TEXTS
    assert to_row_source(TEXTS, "rows") is TEXTS
    for row in (-len(TEXTS) - 1, len(TEXTS)):
        with pytest.raises(IndexError):
            to_row_source(Endless(TEXTS), "rows")[row]
    assert to_row_source(Endless(TEXTS), "rows")[-1] == TEXTS[-1]


def test_files_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    script = (
        "import sys, itertools\nfrom pathlib import Path\nfrom sfttrain.data.jsonl_cache import"
        " write_rows\nrows = lambda: ({'text': 'x' * 1000} for _ in"
        " itertools.count())\nwrite_rows(rows, Path(sys.argv[1]), known_as=None)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    try:
        while not any(path.stat().st_size for path in tmp_path.glob(".*.tmp")):
            assert process.poll() is None
            time.sleep(0.05)
        write_rows(lambda: TEXTS[:1], tmp_path, known_as=None)
        assert len(list(tmp_path.glob(".*.tmp"))) == 1  # that of a writer who lives is left alone
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    write_rows(lambda: TEXTS[:2], tmp_path, known_as=None)
    assert not list(tmp_path.glob(".*.tmp"))


def test_files_of_the_user_among_the_rows_are_left_alone(tmp_path: Path) -> None:
    name = temporary_name("rows")
    (tmp_path / ".notes.tmp").write_text("mine")
    (tmp_path / ".rows.notes.tmp").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / ".notes.tmp")
    os.mkfifo(tmp_path / ".pipe.tmp")
    os.mkfifo(tmp_path / temporary_name("rows"))
    before = sorted(os.listdir(tmp_path))
    with at_most(30):
        path, _ = write_rows(lambda: TEXTS[:2], tmp_path, known_as=None)
    assert sorted(os.listdir(tmp_path)) == sorted([*before, path.name])
    assert (tmp_path / ".notes.tmp").read_text() == "mine"


def test_a_failing_dataset_leaves_no_partial_file(tmp_path: Path) -> None:
    def rows() -> Any:
        yield from TEXTS
        raise KeyError("no more")

    with pytest.raises(KeyError):
        write_rows(rows, tmp_path, known_as=None)
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_formatting_function_names_the_row(model: Path, tmp_path: Path) -> None:
    def of_row(row: Any) -> str:
        return str(row["text"] if row["text"] != TEXTS[3]["text"] else row["nope"])

    with pytest.raises(ConfigError, match="formatting_func failed at row 4: KeyError: 'nope'"):
        make_sft_trainer(model, tmp_path, TEXTS, options={"formatting_func": of_row})


def test_a_path_is_not_taken_as_rows_of_tokens(model: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", TEXTS)
    with pytest.raises(ConfigError, match="skip_prepare_dataset is for rows"):
        make_sft_trainer(model, tmp_path, path, dataset_kwargs={"skip_prepare_dataset": True})


def test_a_folder_for_prepared_data_that_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as caught:
        make_sft_trainer(model, tmp_path, TEXTS, dataset_cache_dir=str(tmp_path / "file"))
    assert "another dataset_cache_dir" in caught.value.remedy


def test_a_model_without_logits(model: Path, tmp_path: Path) -> None:
    bare = tiny_model("llama", vocab_size=600).model
    with pytest.raises(AttentionError, match="LlamaModel has no logits"):
        make_sft_trainer(
            bare,
            tmp_path,
            TEXTS,
            options={"processing_class": AutoTokenizer.from_pretrained(str(model))},
        )


# ---- errors of sftprep in a trainer ----

MISTAKES: list[tuple[Any, dict[str, Any], type[SftprepError], str, str]] = [
    (
        [*TEXTS, {"text": 3}],
        {},
        RecordError,
        f"train_dataset:{len(TEXTS) + 1}: ",
        'on_bad_record="quarantine"',
    ),
    (
        [{"body": "a"}],
        {},
        FormatError,
        "no format fits train_dataset",
        'dataset_text_field="body"',
    ),
    (
        [{"Question": "a", "Reply": "b"}],
        {},
        FormatError,
        "the keys 'Question', 'Reply'",
        "train_dataset.rename_columns({'Question': 'instruction', 'Reply': 'output'})",
    ),
    (
        TEXTS,
        {"completion_only_loss": True},
        ConfigError,
        "completion_only_loss=True: train_dataset",
        "completion_only_loss=False",
    ),
    (
        TEXTS,
        {"assistant_only_loss": True},
        ConfigError,
        "assistant_only_loss=True: train_dataset",
        "assistant_only_loss=False",
    ),
    (
        [*TEXTS, {"text": 3}],
        {"dataset_num_proc": 2},
        RecordError,
        f"train_dataset:{len(TEXTS) + 1}: ",
        "correct the record",
    ),
    ([{"text": ""}], {}, EmptyInput, "no usable record", "max_length"),
]


@pytest.mark.parametrize(("rows", "settings", "kind", "message", "remedy"), MISTAKES)
def test_errors_name_the_settings_of_the_trainer(
    model: Path,
    tmp_path: Path,
    rows: Any,
    settings: dict[str, Any],
    kind: Any,
    message: str,
    remedy: str,
) -> None:
    with pytest.raises(kind) as caught:
        make_sft_trainer(model, tmp_path, rows, **settings)
    text = str(caught.value)
    assert message in caught.value.message
    assert remedy in caught.value.remedy
    assert "/rows" not in text
    assert " --" not in text


def test_images_of_a_path_are_refused_or_dropped(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({**row, "images": ["a.png"]}) + "\n" for row in CHATS))
    with pytest.raises(RecordError, match="holds an image") as caught:
        make_sft_trainer(model, tmp_path, str(path))
    assert 'images="drop"' in caught.value.remedy
    assert len(make_sft_trainer(model, tmp_path, str(path), images="drop").train_dataset)


def test_errors_of_a_stream_name_the_settings_of_the_trainer(model: Path, tmp_path: Path) -> None:
    def stream_of(rows: list[Any]) -> Any:
        return Dataset.from_list(rows).to_iterable_dataset()

    with pytest.raises(FormatError, match="no format fits train_dataset") as wrong:
        make_sft_trainer(model, tmp_path, stream_of([{"Question": "a", "Reply": "b"}]))
    assert "--" not in str(wrong.value)
    bad = [*TEXTS, {"text": None}]
    with pytest.raises(RecordError, match=f"train_dataset:{len(bad)}: ") as caught:
        make_sft_trainer(model, tmp_path, stream_of(bad)).train()
    assert 'on_bad_record="quarantine"' in caught.value.remedy
    assert "--" not in caught.value.remedy


def test_a_conversation_without_a_template(tmp_path: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="train_dataset holds") as caught:
        make_sft_trainer(model, tmp_path, CHATS, options={"processing_class": tokenizer})
    assert "chat_template_path" in caught.value.remedy
    assert "--" not in str(caught.value)


def test_sequences_that_are_too_long_for_the_model(model: Path, tmp_path: Path) -> None:
    short = tiny_model("llama", vocab_size=600, max_position_embeddings=16)
    rows, options = (
        [{"text": "The sky is blue. " * 40}],
        {"processing_class": AutoTokenizer.from_pretrained(str(model))},
    )
    with pytest.raises(MismatchError, match="positions end at 16") as caught:
        make_sft_trainer(short, tmp_path, rows, options=options)
    assert "max_length=16" in caught.value.remedy
    assert "allow_mismatch" in caught.value.remedy
    assert (
        len(make_sft_trainer(short, tmp_path, rows, options=options, max_length=16).train_dataset)
        == 1
    )


def test_errors_show_the_path_of_a_users_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    path = write_lines(
        tmp_path / "rows" / "mine.jsonl", [*COMPLETIONS, {"prompt": "a", "completion": None}]
    )
    with pytest.raises(RecordError) as caught:
        make_sft_trainer(model, tmp_path, path)
    assert caught.value.message.startswith(f"{path}:{len(COMPLETIONS) + 1}")
    assert "correct the record" in caught.value.remedy
    assert 'on_bad_record="quarantine"' in caught.value.remedy


def test_the_content_of_a_record_is_shown_unchanged() -> None:
    error = RecordError(
        file="f",
        line=3,
        column=2,
        reason="r",
        message=f"more than {setting('max_length', 9)}",
        excerpt="--train-on completion",
    )
    shown = error.shown_by(TrainerNames("train_dataset", "f"))
    assert shown.message == (
        "train_dataset:3:2: more than max_length=9 [r]\n  --train-on completion"
    )
    assert (error.file, error.message.partition(":")[0]) == ("f", "f")


def test_settings_of_a_build_are_shown_as_those_of_the_trainer() -> None:
    """Each name exists in SFTConfig, or is an argument of SFTTrainer."""
    known = {f.name for f in dataclasses.fields(SFTConfig)} | {"processing_class"}
    parts = [
        kind
        for kind in typing.get_type_hints(BuildConfig).values()
        if dataclasses.is_dataclass(kind)
    ]
    build_settings = [f.name for part in parts for f in dataclasses.fields(part)]
    assert "train_on" in build_settings
    shown = {}
    for spelling in (FlagNames("_"), PythonNames()):
        names = TrainerNames("train_dataset", None, spelling)
        for name in build_settings:
            text = names.setting(name, None)
            if text is not None:
                shown[name] = text
                assert {shown_name.lstrip("-") for shown_name in text.split(" and ")} <= known
    assert shown["train_on"] == "completion_only_loss and assistant_only_loss"
    assert shown["tokenizer"] == "processing_class"  # no flag of `sfttrain run`
    assert "max_rejected" not in shown


@pytest.mark.parametrize(
    ("name", "value", "python", "flags"),
    [
        ("max_length", "9", "max_length=9", "--max_length 9"),
        ("train_on", "completion", "completion_only_loss=True", "--completion_only_loss"),
        ("packing", "none", "packing=False", "--packing False"),
        ("packing", "wrapped", 'packing_strategy="wrapped"', "--packing_strategy wrapped"),
        ("truncate_side", "left", 'truncation_mode="keep_end"', "--truncation_mode keep_end"),
        ("max_rejected", "3", None, None),
    ],
)
def test_values_of_settings_are_shown_as_the_trainer_takes_them(
    name: str, value: str, python: str | None, flags: str | None
) -> None:
    assert TrainerNames("train_dataset", None).setting(name, value) == python
    assert TrainerNames("train_dataset", None, FlagNames("_")).setting(name, value) == flags


def test_settings_of_a_stream_are_shown_as_flags_of_the_command() -> None:
    names = RunStreamNames("stream", None, FlagNames("_"))
    assert names.setting("lanes", "4") == "--stream_lanes 4"
    assert names.setting("train_on", "assistant") == "--assistant_only_loss"
    known = {f.name for kind in (RunConfig, SFTConfig) for f in dataclasses.fields(kind)}
    for name in ("lanes", "order", "pack_window", "workers"):
        assert str(names.setting(name, None)).removeprefix("--") in known


def test_a_remedy_that_the_trainer_does_not_have_is_dropped() -> None:
    remedies = [
        "correct the records",
        f"raise {setting('max_rejected')}",
        f"specify {setting('chat_template')}",
    ]
    error = EmptyInput("nothing", remedy=remedies).shown_by(TrainerNames("train_dataset", None))
    assert error.remedy == "correct the records, or specify chat_template_path"

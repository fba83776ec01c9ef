"""All kinds of datasets become the same packs, and are prepared once."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import sftprep
from sftprep.errors import ConfigError, MismatchError, RecordError, SftprepError
from sfttrain.data.batching import collate_filled, collate_packs
from sfttrain.data.formatting import format_rows
from sfttrain.data.jsonl_cache import write_rows
from sfttrain.data.once_per_node import OncePerMachine, Ranks
from sfttrain.data.prepare import DataPreparation
from sfttrain.data.settings import DataSettings
from sfttrain.data.streaming import is_stream
from sfttrain.data.token_rows import TokenRows
from tests.sfttrain.packs import make_pack
from tests.sfttrain.tiny import tiny_model
from tests.sfttrain.trainer_factory import (
    CHATS,
    COMPLETIONS,
    QUESTIONS,
    TEXTS,
    losses,
    make_sft_trainer,
    sequences,
    write_lines,
)


@pytest.mark.parametrize("rows", [TEXTS, COMPLETIONS, CHATS], ids=["text", "completions", "chats"])
def test_every_kind_of_dataset_gives_the_same_sequences(
    model: Path, tmp_path: Path, rows: list[Any]
) -> None:
    built = tmp_path / "built"
    path = write_lines(tmp_path / "rows.jsonl", rows)
    sftprep.build(
        sftprep.BuildConfig.of(
            inputs=(path,), tokenizer=str(model), output=str(built), packing="none"
        )
    )
    wanted = sequences(sftprep.open_shards(built))
    dataset = Dataset.from_list(rows)
    kinds = {
        "list": rows,
        "Dataset": dataset,
        "IterableDataset": dataset.to_iterable_dataset(num_shards=2),
        "DatasetDict": DatasetDict({"train": dataset, "test": dataset.select([0])}),
        "path": path,
        "folder of packs": str(built),
        "packs": sftprep.open_shards(built),
    }
    for kind, source in kinds.items():
        assert sequences(make_sft_trainer(model, tmp_path, source).train_dataset) == wanted, kind


def test_a_dataset_is_prepared_once(model: Path, tmp_path: Path) -> None:
    dataset = Dataset.from_list(TEXTS)
    first = make_sft_trainer(model, tmp_path, dataset, packing=True).train_dataset
    manifest = first.root / "manifest.json"
    before = manifest.stat().st_mtime_ns
    same = make_sft_trainer(model, tmp_path, dataset, packing=True).train_dataset
    assert (same.root, manifest.stat().st_mtime_ns) == (first.root, before)
    for other in (
        make_sft_trainer(model, tmp_path, dataset, packing=False),
        make_sft_trainer(model, tmp_path, dataset, packing=True, max_length=64),
        make_sft_trainer(model, tmp_path, dataset.select(range(4)), packing=True),
    ):
        assert other.train_dataset.root != first.root


def test_rows_that_datasets_knows_are_not_read_again(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("read again")

    path, content = write_rows(lambda: iter(TEXTS), tmp_path, known_as="a")
    assert write_rows(never, tmp_path, known_as="a") == (path, content)
    assert write_rows(lambda: iter(TEXTS), tmp_path, known_as=None) == (path, content)
    assert write_rows(lambda: iter(TEXTS[1:]), tmp_path, known_as="b")[1] != content
    assert not list(tmp_path.glob(".*.tmp"))


def test_rows_that_are_written_again_leave_the_file_as_it_is(tmp_path: Path) -> None:
    """Another process can be building from the file, and would report a new one as changed."""
    path, content = write_rows(lambda: iter(TEXTS), tmp_path, known_as=None)
    before = path.stat()
    assert write_rows(lambda: iter(TEXTS), tmp_path, known_as="b") == (path, content)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert write_rows(lambda: iter(TEXTS), tmp_path, known_as=None) == (path, content)
    assert path.read_bytes() == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, "known-b"])


def test_a_file_that_changed_is_prepared_again(model: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", TEXTS)
    before = sequences(make_sft_trainer(model, tmp_path, path).train_dataset)
    write_lines(tmp_path / "rows.jsonl", TEXTS[:5])
    assert len(sequences(make_sft_trainer(model, tmp_path, path).train_dataset)) == 5 < len(before)


def test_changes_of_the_tokenizer_in_memory_are_used(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.add_tokens(["<said>", "What is"], special_tokens=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}<said>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    tokenizer.eos_token = "<|endoftext|>"
    own = tiny_model("llama", vocab_size=640, max_position_embeddings=512)
    trainer = make_sft_trainer(own, tmp_path, CHATS, options={"processing_class": tokenizer})
    # Other kinds of return values came and went: the ids of the rendered text are what it trains
    # on.
    rendered = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in CHATS]
    wanted = sorted(tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered)
    assert [ids for ids, _ in sequences(trainer.train_dataset)] == wanted
    assert tokenizer.convert_tokens_to_ids("<said>") in wanted[0]


def test_a_build_with_workers_runs_apart_from_a_script_without_a_main_guard(
    model: Path, tmp_path: Path
) -> None:
    one = make_sft_trainer(model, tmp_path / "one", TEXTS)
    two = make_sft_trainer(model, tmp_path / "two", TEXTS, dataset_num_proc=2)
    assert sequences(one.train_dataset) == sequences(two.train_dataset)
    with pytest.raises(RecordError, match=r"train_dataset:2: .*text"):
        make_sft_trainer(model, tmp_path / "two", [*TEXTS[:1], {"text": None}], dataset_num_proc=2)


def test_a_bad_row_is_named_or_quarantined(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*TEXTS, {"text": 3}]
    with pytest.raises(RecordError, match=rf"train_dataset:{len(rows)}: ") as caught:
        make_sft_trainer(model, tmp_path, rows)
    assert caught.value.line == len(rows)
    with caplog.at_level(logging.WARNING):
        trainer = make_sft_trainer(
            model, tmp_path, rows * 1 + TEXTS * 20, on_bad_record="quarantine"
        )
    assert len(trainer.train_dataset) == len(TEXTS) * 21
    assert "1 rejected (bad_type)" in caplog.text


def test_lost_tokens_are_logged(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"text": "word " * 300}, *TEXTS]
    with caplog.at_level(logging.WARNING):
        trainer = make_sft_trainer(model, tmp_path, long, max_length=64)
    assert "1 sequences cut at 64 tokens" in caplog.text
    assert "% of the tokens lost, " in caplog.text
    assert "% of the trained tokens" in caplog.text
    assert max(len(ids) for ids, _ in sequences(trainer.train_dataset)) == 64
    whole = make_sft_trainer(model, tmp_path, [{"text": "word " * 1200}], max_length=None)
    assert sum(len(ids) for ids, _ in sequences(whole.train_dataset)) > 1200


def test_sequences_beyond_the_models_positions_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="positions end at 4096"):
        make_sft_trainer(model, tmp_path, [{"text": "word " * 5000}], max_length=None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            DatasetDict({"a": Dataset.from_list(TEXTS), "b": Dataset.from_list(TEXTS)}),
            "splits a, b",
        ),
        ([], "holds no row"),
        (["text"], "holds a str"),
        (7, "int, which holds no rows"),
        ([{"image": 1, "messages": []}], "column image"),
        (Dataset.from_list(TEXTS).with_transform(lambda batch: batch), "has a transform"),
    ],
)
def test_data_without_records_is_refused(
    model: Path, tmp_path: Path, source: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_sft_trainer(model, tmp_path, source)
    assert caught.value.remedy


def test_impossible_masks_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SftprepError, match="completion"):
        make_sft_trainer(model, tmp_path, TEXTS, completion_only_loss=True)
    chats = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in CHATS]
    with pytest.raises(ConfigError, match="completion_only_loss is False"):
        make_sft_trainer(
            model, tmp_path, chats, completion_only_loss=False, assistant_only_loss=True
        )


# ---- tokenized rows ----


TOKENS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [11, 12], "labels": [-100, 12]},
]


def test_tokenized_rows_are_used_unchanged(model: Path, tmp_path: Path) -> None:
    wanted = [([5, 6, 7, 8, 9], [False, False, True, True, True]), ([11, 12], [False, True])]
    as_they_are = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    without = make_sft_trainer(tiny_model("llama"), tmp_path, TOKENS, **as_they_are)
    assert without.processing_class is None
    assert sequences(without.train_dataset) == wanted
    for source in (TOKENS, Dataset.from_list(TOKENS)):
        assert sequences(make_sft_trainer(model, tmp_path, source).train_dataset) == wanted
        skipping = make_sft_trainer(model, tmp_path, source, max_length=3, **as_they_are)
        assert sequences(skipping.train_dataset) == wanted


def test_rows_that_are_packed_already_are_never_packed_again(model: Path, tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [2, 3]},
        {"input_ids": [11, 12, 13], "position_ids": [0, 1, 0]},
    ]
    trainer = make_sft_trainer(
        model,
        tmp_path,
        Dataset.from_list([{**dict.fromkeys(["seq_lengths", "position_ids"]), **r} for r in rows]),
        packing=True,
    )
    assert [
        pack.seq_lengths.tolist() for pack in (trainer.train_dataset[0], trainer.train_dataset[1])
    ] == [[2, 3], [2, 1]]
    assert trainer.train_dataset.seq_lengths(1).tolist() == [2, 1]


def test_masks_of_tokenized_rows() -> None:
    row = {
        "input_ids": [1, 2, 3, 4],
        "completion_mask": [0, 1, 1, 1],
        "assistant_masks": [1, 1, 0, 1],
    }
    assert TokenRows([row])[0].completion_mask.tolist() == [False, True, False, True]
    assert TokenRows([row], completion_only=False)[0].completion_mask.tolist() == [
        True,
        True,
        False,
        True,
    ]
    for wrong, message in (
        ({"labels": [1, 2]}, "2 labels for 4"),
        ({"labels": [9, 2, 3, 4]}, "neither -100 nor the token"),
        ({"completion_mask": [1]}, "1 completion_mask"),
        ({"seq_lengths": [3]}, "sum up to 3"),
        ({"position_ids": [1, 2, 3, 4]}, "do not start at 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            TokenRows([{"input_ids": [1, 2, 3, 4], **wrong}])[0]


def test_skipping_the_preparation_of_raw_rows_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keys text"):
        make_sft_trainer(model, tmp_path, TEXTS, dataset_kwargs={"skip_prepare_dataset": True})


# ---- a formatting function ----


def of_row(example: Any) -> str:
    return f"Q: {example['question']} A: {example['answer']}"


def of_columns(examples: Any) -> list[str]:
    return [
        f"Q: {q} A: {a}" for q, a in zip(examples["question"], examples["answer"], strict=False)
    ]


def several_of_row(example: Any) -> list[str]:
    return [f"Q: {example['question']}", f"A: {example['answer']}"]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_formatting_function_is_called_with_rows_or_columns_as_it_expects(count: int) -> None:
    rows = QUESTIONS[:count]
    wanted = [{"body": of_row(row)} for row in rows]
    assert list(format_rows(iter(rows), of_row, "body")) == wanted
    assert list(format_rows(iter(rows), of_columns, "body")) == wanted
    assert list(format_rows(rows, several_of_row, "t")) == [
        {"t": text} for row in rows for text in several_of_row(row)
    ]


def test_a_formatting_function_takes_precedence_over_columns(model: Path, tmp_path: Path) -> None:
    rows = [{"messages": [], "prompt": "p", "completion": "c", **row} for row in QUESTIONS]
    plain = make_sft_trainer(model, tmp_path, [{"text": of_row(row)} for row in QUESTIONS])
    for settings_ in ({}, {"dataset_text_field": "body"}):
        trainer = make_sft_trainer(
            model, tmp_path, rows, options={"formatting_func": of_row}, **settings_
        )
        assert sequences(trainer.train_dataset) == sequences(plain.train_dataset)


def test_errors_of_a_formatting_function_are_reported(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="returned a dict"):
        make_sft_trainer(model, tmp_path, QUESTIONS, options={"formatting_func": dict})
    with pytest.raises(ConfigError, match="failed at row 1: KeyError: 'nothing'") as caught:
        make_sft_trainer(
            model,
            tmp_path,
            QUESTIONS,
            options={"formatting_func": lambda example: example["nothing"]},
        )
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ConfigError, match="tokenized already"):
        make_sft_trainer(model, tmp_path, TOKENS, options={"formatting_func": of_row})
    with pytest.raises(ConfigError, match="no completion"):
        make_sft_trainer(
            model,
            tmp_path,
            QUESTIONS,
            options={"formatting_func": of_row},
            completion_only_loss=True,
        )
    path = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    with pytest.raises(ConfigError, match="for rows"):
        make_sft_trainer(model, tmp_path, path, options={"formatting_func": of_row})


# ---- filled rows, and one process for all ----


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), max_size=3),
    multiple=st.integers(2, 16),
    seed=st.integers(0, 9),
)
def test_padding_a_row_does_not_change_the_training(
    lengths: list[list[int]], multiple: int, seed: int
) -> None:
    packs = [make_pack(each, seed=seed + number) for number, each in enumerate(lengths)]
    plain, filled = collate_packs(packs), collate_filled(packs, multiple=multiple, pad_token_id=3)
    assert filled["input_ids"].shape[1] % multiple == 0
    assert filled["input_ids"].shape[1] - plain["input_ids"].shape[1] < multiple
    assert filled["total_weight"] == plain["total_weight"]
    assert (filled["labels"][0] != -100).sum() == (plain["labels"][0] != -100).sum()
    added = [n for each in lengths for n in each]
    assert len(filled["seq_lens"]) <= len(added) + 1


def test_the_errors_of_the_leader_reach_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader and the follower run in one process, and share only the folder."""
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: own if own[0] else folders)
    folders: list[str] = []
    leader = OncePerMachine(Ranks(0, 0, 2))
    assert leader.do(lambda: {"a": 1}) == {"a": 1}
    folders = [str(leader._folder), ""]
    follower = OncePerMachine(Ranks(1, 1, 2))
    assert follower.do(lambda: pytest.fail("the follower works")) == {"a": 1}

    def fail() -> None:
        raise ConfigError("no such thing", remedy="give one")

    with pytest.raises(ConfigError):
        leader.do(fail)
    with pytest.raises(ConfigError, match="no such thing"):
        follower.do(fail)
    leader._lock.close()
    with pytest.raises(SftprepError, match="has ended"):
        follower.do(fail)
    assert os.listdir(folders[0])


@pytest.mark.parametrize(
    ("folders", "machines"),
    [
        (["/a", "", "/b", ""], 2),
        (["/a", "", "", ""], 1),
        (["/a", "/b", "/c", "/d"], 4),
        (["/a", "", "", "/b"], 1),  # of different sizes
        (["/a", "", "/b", "", "/c"], 1),
    ],
)
def test_machines_are_counted_if_they_have_equally_many_processes(
    monkeypatch: pytest.MonkeyPatch, folders: list[str], machines: int
) -> None:
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: folders)
    assert OncePerMachine(Ranks(1, 1, len(folders))).count_machines() == machines
    assert OncePerMachine(Ranks()).count_machines() == 1


def test_a_preparation_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    from sfttrain import SFTConfig

    prepared = DataPreparation(
        DataSettings.from_config(SFTConfig(output_dir="x", use_cpu=True), None), tokenizer=None
    )
    with pytest.raises(ConfigError, match="no tokenizer"):
        prepared.packs(TEXTS, "train_dataset", packing=False)


# ---- a dataset that is read as it is trained ----


@pytest.mark.parametrize("packing", [False, True])
def test_an_iterable_dataset_is_tokenized_while_the_model_trains(
    model: Path, tmp_path: Path, packing: bool
) -> None:
    def on_stream() -> Any:
        rows = Dataset.from_list(TEXTS * 3).to_iterable_dataset(num_shards=2)
        settings = {"packing": packing, "max_length": 64, "max_steps": 4}
        return make_sft_trainer(model, tmp_path, rows, **settings)

    trainer = on_stream()
    assert is_stream(trainer.train_dataset)
    assert trainer.train_dataset.max_length == 64
    trainer.train()
    assert len(losses(trainer)) == 4
    assert not (tmp_path / "prepared").exists()
    again = on_stream()
    again.train()
    assert losses(again) == losses(trainer)


def test_a_function_formats_a_stream_too(model: Path, tmp_path: Path) -> None:
    stream = Dataset.from_list(QUESTIONS).to_iterable_dataset()
    trainer = make_sft_trainer(
        model, tmp_path, stream, options={"formatting_func": of_row}, max_steps=1
    )
    packs = list(trainer.train_dataset)
    plain = make_sft_trainer(model, tmp_path, [{"text": of_row(row)} for row in QUESTIONS])
    assert sorted(ids for pack in packs for ids in [pack.input_ids.tolist()]) == [
        ids for ids, _ in sequences(plain.train_dataset)
    ]


def test_an_iterable_dataset_is_prepared_first_if_it_cannot_be_streamed(
    model: Path, tmp_path: Path
) -> None:
    stream = Dataset.from_list(TEXTS).to_iterable_dataset()
    whole = make_sft_trainer(model, tmp_path, stream, max_steps=-1, num_train_epochs=1)
    joined = make_sft_trainer(
        model, tmp_path, stream, packing=True, packing_strategy="wrapped", max_length=32
    )
    tokens = make_sft_trainer(
        model,
        tmp_path,
        Dataset.from_list([{**TOKENS[0], "seq_lengths": [2, 3]}]).to_iterable_dataset(),
    )
    assert len(whole.train_dataset) == len(TEXTS)
    assert len(tokens.train_dataset) == 1
    assert not any(is_stream(trainer.train_dataset) for trainer in (whole, joined, tokens))

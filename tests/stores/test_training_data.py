"""Raw records in a store as training data: prepared like local ones, and again when they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfttrain.cli.main import main
from tests.sfttrain.trainer_factory import make_sft_trainer, model_folder, sequences
from tests.stores.builds import example_lines, put_object


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), tokenizer_dir)


def test_records_in_a_store_are_prepared_like_local_ones(store, model, tmp_path):
    content = example_lines(0, 6)
    (tmp_path / "a.jsonl").write_bytes(content)
    url = put_object(store, "in/a.jsonl", content, tmp_path)
    local = make_sft_trainer(model, tmp_path, str(tmp_path / "a.jsonl"), packing=True)
    expected = sequences(local.train_dataset)
    prepared = []
    for data in (url, f"{store}/in", f"{store}/in/*.jsonl", url):
        trainer = make_sft_trainer(model, tmp_path, data, packing=True)
        assert sequences(trainer.train_dataset) == expected
        prepared.append(trainer.train_dataset.root)
    assert prepared[0] == prepared[-1]
    # The same size and another tag.
    put_object(store, "in/a.jsonl", content.replace(b"breakfast", b"Breakfast"), tmp_path)
    changed = make_sft_trainer(model, tmp_path, url, packing=True).train_dataset
    assert changed.root != prepared[0]
    assert sequences(changed) != expected


def test_the_command_trains_on_records_in_a_store(memory, model, tmp_path, capsys: Any):
    url = put_object(memory, "a.jsonl", example_lines(0, 8), tmp_path)
    options = ["--use_cpu", "--max_steps", "2", "--logging_steps", "1", "--json"]
    options += ["--model", str(model), "--save_strategy", "no", "--dataloader_num_workers", "0"]
    found = []
    for number, data in enumerate(([url], ["--dataset_name", url], ["--stream", url])):
        output = ["--output_dir", str(tmp_path / f"o{number}")]
        more = ["--stream_lanes", "2"] if "--stream" in data else []
        assert main(["run", *data, *output, *options, *more]) == 0, capsys.readouterr().err
        found.append(json.loads(capsys.readouterr().out)["last_loss"])
    assert found[0] == found[1]
    output = ["--output_dir", str(tmp_path / "o")]
    assert main(["run", f"{memory}/none.jsonl", *output, *options]) == 2
    assert "none.jsonl does not exist" in capsys.readouterr().err

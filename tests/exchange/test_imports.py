"""Configurations of other tools become config files that a build accepts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import sftprep
from sftprep.errors import ConfigError
from sftprep.exchange.imports.turns import CONTENT_KEYS, ROLE_KEYS
from sftprep.records.messages import read_messages
from sftprep.records.options import RecordOptions

SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": f"What is {n} plus {n}?"},
            {"from": "gpt", "value": f"{2 * n}."},
        ]
    }
    for n in range(12)
]
DIALOGS = [
    {
        "dialog": [
            {"role": "user", "content": f"Count to {n}."},
            {"role": "assistant", "content": " ".join(map(str, range(1, n + 1)))},
        ]
    }
    for n in range(1, 9)
]
ALPACA = [{"task": f"Double {n}.", "context": "", "result": f"{2 * n}"} for n in range(6)]
TEXTS = [{"body": f"Line {n} of a text."} for n in range(5)]

AXOLOTL = """
base_model: {tokenizer}
model_type: AutoModelForCausalLM
load_in_4bit: true
datasets:
  - path: {folder}/sharegpt.jsonl
    ds_type: json
    type: chat_template
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
    roles_to_train: ["gpt"]
    train_on_eos: turn
  - path: {folder}/dialogs.jsonl
    type: chat_template
    field_messages: dialog
    roles_to_train: ["assistant", "user"]
    train_on_eos: last
    split: train[:6]
  - path: {folder}/texts.jsonl
    type: completion
    field: body
  - path: {folder}/segments.jsonl
    type: input_output
val_set_size: 0.1
dataset_prepared_path: last_run_prepared
sequence_len: 256
sample_packing: true
excess_length_strategy: truncate
adapter: lora
lora_r: 16
special_tokens:
  pad_token: "<|endoftext|>"
seed: 7
learning_rate: 2e-4
"""

DATASET_INFO: dict[str, Any] = {
    "chats": {
        "file_name": "sharegpt.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations"},
        "tags": {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "observation_tag": "observation",
            "function_tag": "function_call",
        },
    },
    "dialogs": {
        "file_name": "dialogs.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog"},
        "tags": {"role_tag": "role", "content_tag": "content"},
        "num_samples": 5,
    },
    "tasks": {
        "file_name": "alpaca.jsonl",
        "columns": {"prompt": "task", "query": "context", "response": "result"},
    },
    "texts": {"file_name": "texts.jsonl", "columns": {"prompt": "body"}},
    "preferences": {"file_name": "pairs.jsonl", "ranking": True},
    "modelscope": {"ms_hub_url": "org/name"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in {
        "sharegpt": SHAREGPT,
        "dialogs": DIALOGS,
        "alpaca": ALPACA,
        "texts": TEXTS,
    }.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    return tmp_path


@pytest.fixture
def axolotl(folder: Path, tokenizer_dir: Path) -> Path:
    path = folder / "axolotl.yaml"
    path.write_text(AXOLOTL.format(folder=folder, tokenizer=tokenizer_dir))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sftprep", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def records_of(build: Path) -> dict[str, int]:
    return {source.name: source.records for source in sftprep.read_manifest(build).sources}


# --- axolotl --------------------------------------------------------------------------------------


def test_axolotl_yaml_is_built_by_the_command(axolotl: Path, folder: Path) -> None:
    converted = run("import", axolotl, "--output", folder / "build.yaml")
    assert converted.returncode == 0, converted.stderr
    assert f"sftprep build --config {folder}/build.yaml --output" in converted.stdout
    built = run("build", "--config", folder / "build.yaml", "--output", folder / "shards")
    assert built.returncode == 0, built.stderr
    assert records_of(folder / "shards") == {
        f"{folder}/sharegpt.jsonl": 12,
        f"{folder}/dialogs.jsonl": 6,
        f"{folder}/texts.jsonl": 5,
    }
    config = sftprep.read_manifest(folder / "shards").config
    assert (config["max_length"], config["overlong"], config["packing"], config["seed"]) == (
        256,
        "truncate",
        "bfd",
        7,
    )


def test_axolotl_settings_and_what_has_no_counterpart(axolotl: Path, folder: Path) -> None:
    conversion = sftprep.import_config(axolotl)
    assert conversion.settings["sources"] == [
        {"train_on": "assistant", "path": f"{folder}/sharegpt.jsonl"},
        {
            "map": ["dialog=messages"],
            "train_on": "assistant",
            "train_roles": ["assistant", "user"],
            "train_end": "last",
            "path": f"{folder}/dialogs.jsonl",
            "split": "train",
            "limit": 6,
        },
        {
            "format": "text",
            "train_on": "all",
            "text_field": "body",
            "path": f"{folder}/texts.jsonl",
        },
    ]
    assert conversion.settings["eval_fraction"] == 0.1
    notes = "\n".join(conversion.notes)
    for name in (
        'datasets[3].type: "input_output" (the data set is left out',
        "load_in_4bit: true",
        'adapter: "lora"',
        "lora_r: 16",
        "special_tokens.pad_token:",
        'dataset_prepared_path: "last_run_prepared"',
    ):
        assert f"not converted: {name}" in notes
    # One line for each, and none for what is converted.
    for name in ("datasets[0]", "datasets[2]", "sequence_len", "seed", "base_model"):
        assert name not in notes
    assert len(conversion.notes) == 8
    text = conversion.to_yaml("title")
    assert yaml.safe_load(text) == conversion.settings
    assert [line for line in text.splitlines() if line.startswith("# not converted: ")] == [
        f"# {note}" for note in conversion.notes
    ]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            {"path": "org/name", "name": ["a", "b"], "revision": "v1", "type": "chat_template"},
            [{"path": "org/name", "config_name": name, "revision": "v1"} for name in ("a", "b")],
        ),
        (
            {"path": "json", "data_files": ["x.jsonl", "y.jsonl"], "type": "sharegpt"},
            [{"inputs": ["x.jsonl", "y.jsonl"]}],
        ),
        (
            {"path": "org/name", "data_files": "a.jsonl", "type": "chat_template"},
            [{"inputs": ["hf://datasets/org/name/a.jsonl"]}],
        ),
    ],
)
def test_where_the_data_of_axolotl_is(
    entry: dict[str, Any], expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    conversion = convert({"datasets": [entry]}, tmp_path)
    trained = {"train_on": "assistant"}
    assert conversion.settings["sources"] == [{**trained, **source} for source in expected]
    assert conversion.notes == []


@pytest.mark.parametrize(
    ("entry", "note"),
    [
        ({"message_property_mappings": {"role": "who"}}, "message_property_mappings.role"),
        ({"roles": {"assistant": ["narrator"]}}, "roles.assistant"),
        ({"roles_to_train": []}, "roles_to_train"),
        ({"roles_to_train": ["narrator"]}, "roles_to_train"),
        ({"train_on_eos": "all"}, "train_on_eos"),
        ({"train_on_eot": "all"}, "train_on_eot"),
        ({"message_field_training": "learn"}, "message_field_training"),
        ({"message_field_training_detail": "detail"}, "message_field_training_detail"),
        ({"field_thinking": "thoughts"}, "field_thinking"),
        ({"drop_system_message": True}, "drop_system_message"),
        ({"shards": 4, "shards_idx": 0}, "shards"),
        ({"chat_template": "chatml"}, "chat_template"),
        ({"split": "train[10%:20%]"}, "split"),
        ({"ds_type": "parquet"}, "ds_type"),
        ({"path": "org/name", "ds_type": "json"}, "ds_type"),
    ],
)
def test_a_setting_of_a_data_set_without_a_counterpart(
    entry: dict[str, Any], note: str, tmp_path: Path
) -> None:
    row = {"path": "a.jsonl", "type": "chat_template", **entry}
    conversion = convert({"datasets": [row]}, tmp_path)
    assert any(line.startswith(f"not converted: datasets[0].{note}: ") for line in conversion.notes)


@pytest.mark.parametrize(
    ("settings", "expected", "note"),
    [
        ({"excess_length_strategy": "raise"}, {"overlong": "error"}, ""),
        ({}, {"overlong": "drop", "packing": "none"}, ""),
        ({"val_set_size": 500}, {}, "not converted: val_set_size: 500"),
        ({"chat_template": "tokenizer_default"}, {}, ""),
        ({"chat_template": "chatml"}, {"chat_template": "chatml"}, ""),
        ({"chat_template": "llama3"}, {}, 'not converted: chat_template: "llama3"'),
        (
            {"chat_template": "jinja", "chat_template_jinja": "./my template.jinja"},
            {"chat_template": "./my template.jinja"},
            "",
        ),
        (
            {"chat_template": "jinja", "chat_template_jinja": "{% for m in messages %}\n"},
            {},
            "not converted: chat_template_jinja",
        ),
        ({"chat_template_jinja": "{{ x }}"}, {}, "not converted: chat_template_jinja"),
        ({"special_tokens": {"pad_token": "<pad>"}}, {}, "not converted: special_tokens.pad_token"),
        ({"special_tokens": {"eos_token": "</s>"}}, {"eos_token": "</s>"}, ""),
        ({"dataset_exact_deduplication": True}, {"duplicates": "drop"}, ""),
        (
            {"sample_packing": True, "eval_sample_packing": False},
            {"eval_packing": "none", "packing": "bfd"},
            "",
        ),
        (
            {"test_datasets": [{"path": "a.jsonl", "split": "test", "type": "chat_template"}]},
            {"eval_split": "test"},
            "",
        ),
        (
            {"test_datasets": [{"path": "b.jsonl", "type": "chat_template"}]},
            {"eval_input": ["b.jsonl"]},
            "",
        ),
        ({"train_on_inputs": True}, {}, "different: train_on_inputs: true"),
    ],
)
def test_a_setting_of_the_whole_file(
    settings: dict[str, Any], expected: dict[str, Any], note: str, tmp_path: Path
) -> None:
    entry = {"path": "a.jsonl", "type": "chat_template"}
    conversion = convert({"datasets": [entry], **settings}, tmp_path)
    assert expected.items() <= conversion.settings.items()
    assert [line.startswith(note) for line in conversion.notes] == [True] * bool(note)


def convert(content: dict[str, Any], tmp_path: Path) -> sftprep.Conversion:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return sftprep.import_config(tmp_path / "config.yaml")


def test_parts_of_one_file_are_reported_and_the_rest_is_built(
    folder: Path, tokenizer_dir: Path
) -> None:
    path = folder / "sharegpt.jsonl"
    entry = {"path": str(path), "type": "chat_template", "field_messages": "conversations"}
    (folder / "link.jsonl").symlink_to(path)
    entries = [
        {**entry, "split": "train[:10]"},
        {**entry, "split": "train[10:]"},
        {**entry, "path": str(folder / "link.jsonl")},
        {**entry, "path": "json", "data_files": [str(path)]},
    ]
    conversion = convert({"datasets": entries}, folder)
    assert len(conversion.settings["sources"]) == 1
    left_out = [note for note in conversion.notes if "an earlier source reads this" in note]
    assert [note.split(":")[1] for note in left_out] == [f" datasets[{n}]" for n in (1, 2, 3)]
    settings = {**conversion.settings, "tokenizer": str(tokenizer_dir)}
    sftprep.build(**settings, output=folder / "b", workers=1)
    assert records_of(folder / "b") == {str(path): 10}


def test_splits_and_configurations_of_one_data_set_are_sources(tmp_path: Path) -> None:
    entry = {"path": "org/name", "type": "chat_template"}
    entries = [entry, {**entry, "split": "test"}, {**entry, "name": "en"}, entry]
    conversion = convert({"datasets": entries}, tmp_path)
    assert len(conversion.settings["sources"]) == 3
    assert len(conversion.notes) == 1
    assert conversion.notes[0].startswith('not converted: datasets[3]: "org/name" (an earlier')


# --- LLaMA-Factory --------------------------------------------------------------------------------


def test_dataset_info_is_built(folder: Path, tokenizer_dir: Path) -> None:
    conversion = sftprep.import_config(folder / "dataset_info.json")
    sftprep.build(
        **conversion.settings, tokenizer=str(tokenizer_dir), output=folder / "b", workers=1
    )
    assert records_of(folder / "b") == {"chats": 12, "dialogs": 5, "tasks": 6, "texts": 5}
    assert [line.split(" (")[0] for line in conversion.notes] == [
        "different: dialogs.num_samples: 5",
        "not converted: preferences.ranking: true",
        'not converted: modelscope.ms_hub_url: "org/name"',
    ]


def test_two_data_sets_of_one_file(folder: Path) -> None:
    info = {
        name: {"file_name": "alpaca.jsonl", "num_samples": n} for n, name in ((3, "a"), (4, "b"))
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    conversion = sftprep.import_config(folder / "dataset_info.json")
    assert [source["name"] for source in conversion.settings["sources"]] == ["a"]
    assert any(note.startswith("not converted: b: ") for note in conversion.notes)


def test_the_answers_of_all_formats_are_trained(folder: Path, tokenizer_dir: Path) -> None:
    names = ("chats", "tasks")
    conversion = sftprep.import_config(folder / "dataset_info.json", datasets=names)
    assert [source["name"] for source in conversion.settings["sources"]] == ["chats", "tasks"]
    assert conversion.notes == []
    sftprep.build(
        **conversion.settings, tokenizer=str(tokenizer_dir), output=folder / "b", workers=1
    )
    text = trained_text(folder / "b", tokenizer_dir)
    for n in range(6):
        assert text.count(f"{2 * n}.") + text.count(f"{2 * n}<|im_end|>") >= 2
    assert "What" not in text
    assert "Double" not in text


def trained_text(build: Path, tokenizer_dir: Path) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    ids = [
        int(token)
        for pack in sftprep.open_shards(build)
        for token in pack.input_ids[pack.completion_mask]
    ]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize(
    ("entry", "expected", "note"),
    [
        (
            {"hf_hub_url": "org/name", "subset": "en", "split": "test", "folder": "data"},
            {"path": "hf://datasets/org/name/data", "config_name": "en", "split": "test"},
            "",
        ),
        ({"hf_hub_url": "org/name", "file_name": "ignored.json"}, {"path": "org/name"}, ""),
        (
            {"hf_hub_url": "a/b", "formatting": "sharegpt", "tags": {"role_tag": "who"}},
            {"path": "a/b"},
            "not converted: x.tags.role_tag",
        ),
        (
            {"hf_hub_url": "a/b", "formatting": "sharegpt", "tags": {"user_tag": "assistant"}},
            {"path": "a/b"},
            "not converted: x.tags.user_tag",
        ),
        (
            {"hf_hub_url": "a/b", "columns": {"prompt": "q", "response": "a", "images": "img"}},
            {"map": ["q=instruction", "a=output"]},
            "not converted: x.columns.images",
        ),
    ],
)
def test_an_entry_of_dataset_info(
    entry: dict[str, Any], expected: dict[str, Any], note: str, tmp_path: Path
) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    conversion = sftprep.import_config(tmp_path / "dataset_info.json")
    (source,) = conversion.settings["sources"]
    assert expected.items() <= source.items()
    assert [line.startswith(note) for line in conversion.notes] == [True] * bool(note)


# --- refusals, and the command --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "max_length: 5", "neither a configuration of axolotl"),
        ("a.json", '{"a": {"b": 1}}', "nor dataset_info"),
        ("a.json", "{", "is not JSON"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "datasets:\n- path: x\n  type: orpo.chat", "none of the data sets"),
        ("a.json", '{"x": {"file_name": "a", "ranking": true}}', "none of the data sets"),
        ("a.yaml", "datasets:\n- path: x\n  type: sharegpt\nsequence_len: -1", "max_length is -1"),
    ],
)
def test_other_files_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        sftprep.import_config(tmp_path / name)


def test_unknown_names_and_missing_files(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown data set 'nothing'"):
        sftprep.import_config(folder / "dataset_info.json", datasets="nothing")
    with pytest.raises(ConfigError, match="cannot read"):
        sftprep.import_config(folder / "missing.yaml")


def test_the_command_prints_notes_and_replaces_nothing(axolotl: Path, folder: Path) -> None:
    printed = run("import", axolotl)
    settings = yaml.safe_load(printed.stdout)
    assert settings == sftprep.import_config(axolotl).settings
    assert printed.stderr.splitlines() == sftprep.import_config(axolotl).notes
    (folder / "build.yaml").write_text("mine: 1")
    refused = run("import", axolotl, "--output", folder / "build.yaml")
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert (folder / "build.yaml").read_text() == "mine: 1"
    data = json.loads(run("import", axolotl, "--json").stdout)
    assert data["settings"] == settings


@pytest.mark.parametrize("key", ROLE_KEYS)
def test_the_known_keys_of_turns_are_read(key: str) -> None:
    for content in CONTENT_KEYS:
        turns = [{key: "user", content: "a"}, {key: "assistant", content: "b"}]
        messages = read_messages(turns, "messages", RecordOptions())
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert [message["content"] for message in messages] == ["a", "b"]

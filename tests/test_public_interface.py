"""The names, keywords, progress calls and exit codes that other programs rely on.

A failure here means that programs of users break: change the expectation only together with a line
in CHANGELOG.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sftprep
from sftprep import errors
from tests.conftest import EXAMPLES

PUBLIC_NAMES = {
    "sftprep": {
        "BuildConfig",
        "BuildReport",
        "ChosenTemplate",
        "Conversion",
        "Drop",
        "Environment",
        "ExportReport",
        "Manifest",
        "Pack",
        "PackPlan",
        "PartReport",
        "Preview",
        "PushReport",
        "SHIPPED_TEMPLATES",
        "Shards",
        "TokenizerSpec",
        "build",
        "build_in_subprocess",
        "choose_template",
        "describe_environment",
        "doctor",
        "export",
        "export_tokenizer",
        "import_config",
        "json_lines",
        "load_tokenizer",
        "merge",
        "open_shards",
        "pack_lengths",
        "preview",
        "push",
        "read_manifest",
        "tokenizer_spec",
        "verify",
    },
    "sftprep.config": {
        "BuildConfig",
        "EvalConfig",
        "FormatConfig",
        "OutputConfig",
        "PackConfig",
        "Packing",
        "ReadConfig",
        "SourceConfig",
        "SourceEntry",
        "TokenizeConfig",
        "cache_dir",
        "check_local_path",
        "function_key",
        "read_config_file",
        "to_function_setting",
    },
    "sftprep.packing": {"Moves", "PackPlan", "pack_lengths", "plan_counts"},
    "sftprep.shards": {
        "DataWarning",
        "data_warnings",
        "MANIFEST_NAME",
        "exclusive",
        "hold_lock",
        "is_finished_build",
        "is_temporary_name",
        "length_warning",
        "storage_errors",
        "temporary_name",
        "tokenizer_paths",
        "write_bytes",
    },
    "sftprep.stores": {
        "Mark",
        "StoreFolder",
        "StoredFile",
        "folder_of",
        "hub_errors",
        "hub_reason",
        "is_url",
        "list_files",
    },
    "sftprep.stream": {"Mixture", "PackedStream", "Placed", "State", "open_stream"},
    "sftprep.torch": {"PackedDataset", "StreamLoader", "collate_packs", "pack_to_tensors"},
    "sfttrain": {
        "ModelConfig",
        "SFTConfig",
        "SFTTrainer",
        "clone_chat_template",
        "get_kbit_device_map",
        "get_peft_config",
        "get_quantization_config",
    },
}

SETTINGS_OF_A_BUILD = {
    "as_chat",
    "chat_template_kwargs",
    "chat_template",
    "config_name",
    "date",
    "duplicates",
    "duplicates_by",
    "encoder",
    "eos_token",
    "escape_special",
    "eval_fraction",
    "executor",
    "eval_input",
    "eval_packing",
    "eval_seed",
    "eval_split",
    "expand_turns",
    "reasoning",
    "train_empty_thinking",
    "format",
    "formatting_func",
    "images",
    "inputs",
    "keep_spill",
    "layout",
    "lanes",
    "group_bytes",
    "limit",
    "map",
    "max_length",
    "max_rejected",
    "mix_by",
    "on_bad_record",
    "order",
    "output",
    "overlong",
    "overwrite",
    "pack_window",
    "part",
    "packing",
    "position_ids",
    "quality_checks",
    "ray_address",
    "allow_loss",
    "revision",
    "scratch",
    "seed",
    "shard_tokens",
    "sources",
    "split",
    "strip_nulls",
    "system",
    "template_backend",
    "text_field",
    "text_unit",
    "tokenizer",
    "train_end",
    "train_on",
    "train_roles",
    "transform",
    "transform_id",
    "truncate_side",
    "workers",
}

EXIT_CODES = {
    1: {
        "InputChanged",
        "ShardError",
        "TooManyRejected",
        "TrainingDiverged",
    },
    2: {
        "AttentionError",
        "ConfigError",
        "EmptyInput",
        "FormatError",
        "InputNotFound",
        "InputUnreadable",
        "ManifestError",
        "MismatchError",
        "MissingDependency",
        "OutputExists",
        "RecordError",
        "SftprepError",
        "TemplateError",
        "TokenizerError",
    },
    3: {"HubError", "OutputBusy", "SourceError", "StorageError", "WorkerError"},
}


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_public_names(module: str) -> None:
    names = PUBLIC_NAMES[module]
    loaded = importlib.import_module(module)
    assert set(loaded.__all__) == names
    for name in names:
        assert getattr(loaded, name) is not None


def test_settings_of_a_build() -> None:
    """Each is a keyword of `sftprep.build` and a flag of the command."""
    flat: set[str] = set()
    for field in dataclasses.fields(sftprep.BuildConfig):
        part = getattr(importlib.import_module("sftprep.config"), str(field.type), None)
        flat |= {f.name for f in dataclasses.fields(part)} if part else {field.name}
    assert flat == SETTINGS_OF_A_BUILD
    assert list(inspect.signature(sftprep.build).parameters) == [
        "source",
        "eval_source",
        "progress",
        "executor",
        "part",
        "settings",
    ]


def test_progress_calls(tokenizer_dir: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    sftprep.build(
        str(EXAMPLES / "data" / "qa.jsonl"),
        tokenizer=str(tokenizer_dir),
        output=str(tmp_path / "o"),
        max_length=256,
        workers=1,
        progress=lambda stage, done, total: calls.append((stage, done, total)),
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["tokenize", "write"]
    for stage in stages:
        own = [(done, total) for name, done, total in calls if name == stage]
        assert own[-1][0] == own[-1][1] > 0


def test_exit_codes_of_errors() -> None:
    types = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.SftprepError)
    }
    by_code: dict[int, set[str]] = {}
    for name, kind in types.items():
        by_code.setdefault(kind.exit_code, set()).add(name)
    assert by_code == EXIT_CODES


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["build", "--help"], 0),
        (["--version"], 0),
        (["verify", "DIR"], 2),
        (["build", "absent.jsonl", "--tokenizer", "t", "--output", "o"], 2),
        (["build", "--no-such-flag"], 2),
    ],
)
def test_exit_codes_of_the_command(arguments: list[str], code: int, tmp_path: Path) -> None:
    given = [str(tmp_path) if argument == "DIR" else argument for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "sftprep", *given], capture_output=True, cwd=tmp_path, check=False
    )
    assert done.returncode == code, done.stderr


def test_the_keys_of_the_summary(tokenizer_dir: Path, tmp_path: Path) -> None:
    command = ["build", str(EXAMPLES / "data" / "qa.jsonl"), "--tokenizer", str(tokenizer_dir)]
    command += ["--output", str(tmp_path / "o"), "--max-length", "256", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "sftprep", *command], capture_output=True, check=True
    )
    summary = json.loads(done.stdout)
    assert set(summary) >= {
        "accounting",
        "manifest_digest",
        "output",
        "packs",
        "reading",
        "sources",
    }
    assert set(summary["accounting"]) >= {"records", "sequences", "tokens", "trained_tokens"}

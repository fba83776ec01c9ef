"""Errors: references to settings are rendered by each front end, and name existing settings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sftprep
import sfttrain
from sftprep.cli import finished, garbage
from sftprep.config import BuildConfig, SourceEntry
from sftprep.errors import (
    ConfigError,
    FlagNames,
    PythonNames,
    RecordError,
    SettingNames,
    SftprepError,
    first_line,
    setting,
    source_name,
)
from sftprep.stream import PackedStream
from sfttrain.config import ModelConfig, SFTConfig
from sfttrain.config.setting_names import TrainerNames

ROWS = "/tmp/rows.jsonl"
TRAINER = TrainerNames("train_dataset", ROWS)
TRAINER_FLAGS = TrainerNames("train_dataset", ROWS, FlagNames("_"))


def shown(text: str, names: SettingNames) -> str:
    return ConfigError(text).shown_by(names).message


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (PythonNames(), 'packing="bfd" max_length=64 max_length overwrite=True eval_fraction=0.5'),
        (FlagNames(), "--packing bfd --max-length 64 --max-length --overwrite --eval-fraction 0.5"),
        (
            FlagNames("_"),
            "--packing bfd --max_length 64 --max_length --overwrite --eval_fraction 0.5",
        ),
    ],
)
def test_each_front_end_renders_a_setting_in_its_own_form(names, expected):
    references = [
        setting("packing", "bfd"),
        setting("max_length", 64),
        setting("max_length"),
        setting("overwrite", True),
        setting("eval_fraction", 0.5),
    ]
    assert shown(" ".join(references), names) == expected


@pytest.mark.parametrize(
    ("reference", "expected", "expected_flags"),
    [
        (setting("max_length", 64), "max_length=64", "--max_length 64"),
        (setting("text_field", "body"), 'dataset_text_field="body"', "--dataset_text_field body"),
        (
            setting("train_on", "assistant"),
            "assistant_only_loss=True",
            "--assistant_only_loss",
        ),
        (
            setting("split", "test"),
            "datasets.load_dataset(..., split='test')",
            "datasets.load_dataset(..., split='test')",
        ),
        # A setting that the trainer does not have keeps its own name.
        (setting("shard_tokens", 9), "shard_tokens=9", "shard_tokens=9"),
    ],
)
def test_the_trainer_renders_a_setting_as_its_own(reference, expected, expected_flags):
    assert shown(reference, TRAINER) == expected
    assert shown(reference, TRAINER_FLAGS) == expected_flags


def test_the_trainer_shows_its_dataset_for_the_file_that_it_wrote():
    assert shown(f"{source_name(ROWS)}:3", TRAINER) == "train_dataset:3"
    assert shown(f"{source_name('a.jsonl')}:3", TRAINER) == "a.jsonl:3"
    for names in (PythonNames(), FlagNames()):
        assert shown(f"{source_name(ROWS)}:3", names) == f"{ROWS}:3"


def test_alternatives_with_settings_that_a_front_end_lacks_are_dropped():
    error = ConfigError(
        "too many",
        remedy=["fix the records", f"raise {setting('max_rejected')}", f"use {setting('packing')}"],
    )
    assert error.remedy == "fix the records, or raise max_rejected, or use packing"
    assert error.shown_by(FlagNames()).remedy == (
        "fix the records, or raise --max-rejected, or use --packing"
    )
    assert error.shown_by(TRAINER).remedy == "fix the records, or use packing"


def test_all_alternatives_are_shown_if_a_front_end_has_none_of_the_settings():
    remedy = [f"raise {setting('max_rejected')}", f"lower {setting('shard_tokens')}"]
    error = ConfigError("too many", remedy=remedy).shown_by(TRAINER)
    assert error.remedy == "raise max_rejected, or lower shard_tokens"


def test_an_error_knows_its_first_setting():
    assert ConfigError(f"{setting('lanes', 3)} and {setting('seed')}").setting == "lanes"
    assert ConfigError(f"{source_name('a')} is empty").setting == ""


def test_showing_an_error_in_another_form_leaves_the_original_unchanged():
    error = ConfigError(setting("max_length"), remedy=f"raise {setting('max_length')}")
    assert str(error.shown_by(FlagNames())) == "--max-length\n  → raise --max-length"
    assert str(error) == "max_length\n  → raise max_length"


@pytest.mark.parametrize("names", [PythonNames(), FlagNames(), TRAINER, TRAINER_FLAGS])
def test_a_pickled_error_keeps_its_front_end_and_its_attributes(names):
    error = RecordError(
        file=ROWS, line=3, column=7, reason="bad_json", message="no comma", excerpt="{"
    ).shown_by(names)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is RecordError
    assert copy.names == names
    assert str(copy) == str(error)
    assert (copy.line, copy.reason) == (3, "bad_json")


def test_a_record_error_offers_only_remedies_of_the_front_end():
    error = RecordError(
        file=ROWS, line=3, column=0, reason="template_error", message="no role", excerpt="{}"
    )
    assert str(error.shown_by(FlagNames())) == (
        f"{ROWS}:3: no role [template_error]\n  {{}}\n  → correct the record, or specify another"
        " template with --chat-template, or quarantine such records, try: --on-bad-record"
        " quarantine"
    )
    assert str(error.shown_by(TRAINER)).startswith("train_dataset:3: no role")
    assert "chat_template_path" in error.shown_by(TRAINER).remedy


def test_the_first_line_of_an_error_is_its_text_or_its_type():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("\n")) == "ValueError"
    assert first_line(ValueError("12345"), 3) == "123"


# --- references in the source ---------------------------------------------------------------------


def settings_in(package: Path) -> Iterator[tuple[str, str]]:
    """Yield the position and the name of each `setting("NAME")` in a package."""
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "setting"
                and isinstance(node.args[0], ast.Constant)
            ):
                yield f"{file.relative_to(package.parent)}:{node.lineno}", str(node.args[0].value)


def names_of_fields(*kinds: type) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


def names_of_arguments(*functions: object) -> set[str]:
    return {name for function in functions for name in inspect.signature(function).parameters}


def test_settings_are_found_inside_of_f_strings(tmp_path):
    (tmp_path / "a.py").write_text("""x = f"{setting('a')} and {setting('b', 3)}" """)
    assert [name for _, name in settings_in(tmp_path)] == ["a", "b"]


def test_every_setting_in_an_error_of_sftprep_exists():
    config = BuildConfig()
    parts = [type(getattr(config, field.name)) for field in dataclasses.fields(config)]
    known = names_of_fields(SourceEntry, *parts) | names_of_arguments(PackedStream)
    functions = (getattr(sftprep, name) for name in sftprep.__all__)
    known |= names_of_arguments(*filter(inspect.isfunction, functions))
    known |= names_of_arguments(finished.inspect, garbage.gc)
    found = list(settings_in(Path(sftprep.__file__).parent))
    assert len(found) > 20
    assert [(where, name) for where, name in found if name not in known] == []


def test_every_setting_in_an_error_of_sfttrain_exists():
    from sfttrain.cli.arguments import RunConfig
    from sfttrain.cli.chat import ChatConfig
    from sfttrain.trainer import SFTTrainer

    known = names_of_fields(SFTConfig, ModelConfig, RunConfig, ChatConfig) | names_of_arguments(
        SFTTrainer
    )
    known |= {"config", "debug"}  # flags of the command itself
    found = list(settings_in(Path(sfttrain.__file__).parent))
    assert [(where, name) for where, name in found if name not in known] == []


def test_every_error_type_has_an_exit_code():
    kinds = [kind for kind in vars(sftprep.errors).values() if isinstance(kind, type)]
    errors = [kind for kind in kinds if issubclass(kind, SftprepError)]
    assert len(errors) > 20
    assert {kind.exit_code for kind in errors} == {1, 2, 3}


def test_errors_on_the_command_line_cannot_control_the_terminal(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sftprep", "verify", "red\x1b[31m\x9b"],
        capture_output=True,
        cwd=tmp_path,
        check=False,
    )
    assert b"\x1b" not in done.stderr
    assert b"red\\u001b[31m\\u009b" in done.stderr

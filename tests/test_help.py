"""The text of `--help`, of every command of both programs."""

from __future__ import annotations

import re

import pytest

import sftprep.cli.entry
import sfttrain.cli.main
from sftprep.cli.app import app

COMMANDS = [name for name in app.resolved_commands() if not name.startswith("-")]
REQUIRED = {
    "build": ["INPUT...", "--tokenizer", "--output"],
    "preview": ["INPUT...", "--tokenizer"],
    "doctor": ["INPUT...", "--tokenizer"],
    "merge": ["DIRECTORY...", "--output"],
    "push": ["DIRECTORY", "REPOSITORY"],
    "export": ["DIRECTORY", "--to", "--output"],
    "import": ["FILE"],
    "inspect": ["DIRECTORY"],
    "verify": ["DIRECTORY"],
    "gc": ["URL"],
    "completion": ["SHELL"],
    "env": [],
}


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        sftprep.cli.entry.main(arguments)
    assert end.value.code == 0
    return capsys.readouterr().out


def required_in(text: str) -> list[str]:
    """Return the names in the section about what is required."""
    section = text.partition("\nrequired:\n")[2].partition("\n\n")[0]
    return [line.split()[0] for line in section.splitlines() if re.match(r"  \S", line)]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_required_comes_first(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of([command, "--help"], capsys)
    usage, _, rest = text.partition("\n")
    assert usage.startswith(f"usage: sftprep {command}")
    for name in REQUIRED[command]:
        assert f" {name} " in usage
    sections = re.findall(r"^(\w[\w ]*):$", rest, flags=re.MULTILINE)
    expected = ["required", "options"] if REQUIRED[command] else ["options"]
    assert [name for name in sections if name in expected] == expected
    assert required_in(text) == REQUIRED[command]


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("columns", ["20", "80", "200"])
def test_lines_fit_and_are_indented_in_one_way(
    command: str,
    columns: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = help_of([*([command] if command else []), "-h"], capsys)
    width = {"20": 60, "80": 80, "200": 100}[columns]
    lines = text.splitlines()
    assert lines == [line.rstrip() for line in lines]
    is_entry = False
    for line in lines[1:]:
        indent = len(line) - len(line.lstrip())
        is_entry = is_entry or line in ("required:", "options:", "commands:")
        if is_entry and line:
            assert indent in (0, 2, 28), line
        if indent not in (4, 8):  # examples of commands stay as they are
            assert len(line) <= width, line


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_that_change_nothing_are_not_listed(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of([command, "--help"], capsys)
    assert "--empty-" not in text
    for name in ("json", "debug", "overwrite", "keep-spill"):
        assert f"--no-{name}" not in text
    if command == "build":  # these change a default
        assert "--no-position-ids" in text
        assert "--no-as-chat" in text


def test_flags_that_empty_a_list_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        sftprep.cli.entry.main(["build", "--empty-map"])
    assert end.value.code == 2
    assert "--empty-map" in capsys.readouterr().err


def test_the_program_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(["--help"], capsys)
    assert help_of([], capsys) == text
    listed = re.findall(r"^  (\w+) ", text.partition("\ncommands:\n")[2], flags=re.MULTILINE)
    assert listed == sorted(COMMANDS)


def test_a_help_flag_after_the_end_of_options_is_an_argument(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        sftprep.cli.entry.main(["verify", "--", "--help"])
    assert end.value.code == 2
    assert "required:" not in capsys.readouterr().out


def test_unknown_commands_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        sftprep.cli.entry.main(["biuld", "--help"])
    assert end.value.code == 2
    assert "see sftprep --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "required"),
    [
        ("run", ["DIR", "--model", "--output_dir"]),
        ("chat", ["DIR"]),
        ("env", []),
        ("completion", []),
    ],
)
def test_help_of_the_trainer(
    command: str,
    required: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert sfttrain.cli.main.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: sfttrain {command}")
    assert required_in(text) == required
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("verify", "DIRECTORY is missing\n  → sftprep verify DIRECTORY\n"),
        ("import --json", "FILE is missing\n  → sftprep import FILE\n"),
        ("completion", "SHELL is missing\n"),
        ("push shards", "REPOSITORY is missing\n  → sftprep push DIRECTORY REPOSITORY\n"),
        ("export shards -o x", "--to is missing\n  → sftprep export DIRECTORY --to CHOICE"),
        ("build a.jsonl --tokenizer", "--tokenizer has no value\n"),
        ("build a.jsonl --eval-input -", "--eval-input cannot be -, which is stdin\n"),
        ("build a.jsonl --max_lenght=3", "unknown option --max_lenght\n  → did you mean --max-l"),
        ("build a.jsonl --dataset_name x", "unknown option --dataset_name\n  → see sftprep build"),
        ("build a.jsonl --learning_rate 1", "unknown option --learning_rate\n  → see sftprep bu"),
    ],
)
def test_wrong_arguments_are_named_as_in_the_help(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        sftprep.cli.entry.main(arguments.split())
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")

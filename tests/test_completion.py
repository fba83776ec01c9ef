"""Scripts that complete arguments in a shell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import sftprep.cli.entry
import sfttrain.cli.main

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the scripts of both programs for bash."""
    folder = tmp_path_factory.mktemp("scripts")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        with pytest.raises(SystemExit) as end:
            sftprep.cli.entry.main(["completion", "bash"])
        assert end.value.code == 0
        assert sfttrain.cli.main.main(["completion", "bash"]) == 0
    for name, script in zip(("sftprep", "sfttrain"), printed, strict=True):
        (folder / name).write_text(script)
    return folder


def complete(scripts: Path, words: list[str]) -> list[str]:
    """Return what a real bash offers for the last word."""
    program = words[0]
    code = (
        f"source {scripts / program}; "
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        f'_{program}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code, "bash", *words], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


@needs_bash
@pytest.mark.parametrize("program", ["sftprep", "sfttrain"])
def test_bash_accepts_the_script(program: str, scripts: Path) -> None:
    done = subprocess.run(["bash", "-n", scripts / program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@needs_bash
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sftprep", "b"], ["build"]),
        (["sftprep", "build", "x", "--train-"], ["--train-on", "--train-roles", "--train-end"]),
        (["sftprep", "build", "--train-on", "a"], ["auto", "all", "assistant"]),
        (["sftprep", "completion", ""], ["bash", "zsh", "fish"]),
        (["sfttrain", "r"], ["run"]),
        (["sfttrain", "run", "DIR", "--lora_r"], ["--lora_r"]),
        (["sfttrain", "run", "DIR", "--train_end", ""], ["turn", "last", "none"]),
        (["sfttrain", "chat", "DIR", "--sys"], ["--system"]),
    ],
)
def test_commands_options_and_choices_are_completed(
    words: list[str], expected: list[str], scripts: Path
) -> None:
    assert set(expected) <= set(complete(scripts, words))


@needs_bash
def test_bash_completes_other_values_as_files(scripts: Path) -> None:
    code = f"source {scripts / 'sftprep'}; complete -p sftprep"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert "-o default" in done.stdout
    assert complete(scripts, ["sftprep", "build", "--output", ""]) == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_for_other_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        sftprep.cli.entry.main(["completion", shell])
    assert end.value.code == 0
    script = capsys.readouterr().out
    assert "train-on" in script
    if shell == "zsh":
        assert script.startswith("#compdef sftprep")
        assert "]:tokenizer:_files' \\\n" in script
        assert "'1: :->cmds' \\\n" in script


def test_an_unknown_shell_is_an_error() -> None:
    with pytest.raises(SystemExit) as end:
        sftprep.cli.entry.main(["completion", "ksh"])
    assert end.value.code == 2
    assert sfttrain.cli.main.main(["completion", "ksh"]) == 2

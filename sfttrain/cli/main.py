"""The entry point of the command `sfttrain`: dispatch, help and error messages."""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sftprep.errors import FlagNames, MissingDependency, SftprepError, escape_control
from sfttrain.cli.dependencies import check_dependencies
from sfttrain.cli.help_text import COMPLETION_USAGE, ENV_USAGE, PROGRAM, chat_help, short_help

_HELP_FLAGS = {"-h", "--help", "--help-all"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The arguments; by default those of the process.

    Returns:
        The exit code: 0 done, 1 failed, 2 usage or invalid input, 3 environment (disk, memory, a
        missing device).
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (tokens[0], tokens[1:]) if tokens else ("", [])
    if command in _COMMANDS:
        rest, debug = _remove_debug_flag(rest)
        return _dispatch(command, rest, debug)
    if command in ("", "--help", "-h"):
        print(PROGRAM, end="")
        return 0 if command else 2
    if command == "--version":
        import sftprep

        print(sftprep.__version__)
        return 0
    return _report(f"unknown command {command!r}", f"use one of: {', '.join(_COMMANDS)}", 2)


@dataclass(frozen=True)
class _Command:
    """A command of the program.

    Attributes:
        function: Runs the command with its arguments, and returns the exit code.
        help: Returns its help, without the packages that training needs.
        after_interrupt: The advice after Ctrl-C.
    """

    function: Callable[[list[str]], int]
    help: Callable[[], str]
    after_interrupt: str = ""


def _dispatch(name: str, arguments: list[str], debug: bool) -> int:
    """Print the help of a command, or run it."""
    command = _COMMANDS[name]
    has_help = bool(_HELP_FLAGS & set(arguments))
    if has_help and "--help-all" not in arguments:
        return _print_help(command.help())
    try:
        check_dependencies(f"sfttrain {name}")
    except MissingDependency as error:
        return _report(error.message, error.remedy, error.exit_code)
    if not has_help:
        return _run_reporting(command, arguments, debug)
    from sfttrain.cli.arguments import full_help

    return _print_help(full_help() if name == "run" else command.help())


def _print_help(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # as with `| head`
        sys.stderr.close()
    return 0


def _run_reporting(command: _Command, arguments: list[str], debug: bool) -> int:
    """Run a command, and report each error with its remedy; with `debug`, errors propagate."""
    try:
        if not debug:
            _silence_libraries()
        return command.function(arguments)
    except SftprepError as error:
        if debug:
            raise
        shown = _show_flags(error)
        return _exit_rank(_report(shown.message, shown.remedy, shown.exit_code))
    except KeyboardInterrupt:
        return _exit_rank(_report("interrupted", command.after_interrupt, 1))
    except Exception as error:
        if debug:
            raise
        return _exit_rank(_report_library_error(error))


def _show_flags(error: SftprepError) -> SftprepError:
    """Return the error with its settings as flags of this command."""
    # Imported here, because it loads torch, which --help must not do.
    from sfttrain.config.setting_names import TrainerNames

    flags = FlagNames("_")
    # An error of a build inside the run keeps the settings of the trainer, spelled as flags.
    if isinstance(error.names, TrainerNames):
        return error.shown_by(replace(error.names, spelling=flags))
    return error.shown_by(flags)


def _run(arguments: list[str]) -> int:
    from sfttrain.cli.arguments import read_arguments
    from sfttrain.cli.run import prepare, train

    request = read_arguments(arguments)
    prepared = prepare(request)
    summary = train(prepared)
    if request.training.process_index == 0:
        print(json.dumps(summary.as_dict()) if request.run.json else summary.text())
    return _exit_rank(0)  # here, while `prepared` still refers to the model and its tensors


def _chat(arguments: list[str]) -> int:
    from sfttrain.cli.chat import chat

    return chat(arguments)


def _print_completion(arguments: list[str]) -> int:
    from sfttrain.cli.completion import print_completion

    return print_completion(arguments)


def _show_environment(arguments: list[str]) -> int:
    from sfttrain.cli.environment import show_environment

    return show_environment(arguments)


_COMMANDS = {
    "run": _Command(
        _run,
        short_help,
        "resume with --resume_from_checkpoint latest, if a checkpoint was saved",
    ),
    "chat": _Command(_chat, chat_help),
    "env": _Command(_show_environment, ENV_USAGE.rstrip),
    "completion": _Command(_print_completion, COMPLETION_USAGE.rstrip),
}


def _exit_rank(code: int) -> int:
    """Return `code`; with several processes, exit immediately instead.

    The destruction of a process group can hang or abort: the threads of gloo wait for the GIL to
    release the tensors of the last collective, while the group's destructor holds the GIL and waits
    for these threads (observed with torch 2.13). Functions registered with atexit still run.
    """
    torch: Any = sys.modules.get("torch")
    group: Any = (
        torch.distributed if torch is not None and torch.distributed.is_available() else None
    )
    if group is not None and group.is_initialized() and group.get_world_size() > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _silence_libraries() -> None:
    """Hide deprecation warnings and progress bars of other libraries.

    The user cannot fix the former, and the latter would fill a log file.
    """
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _remove_debug_flag(tokens: list[str]) -> tuple[list[str], bool]:
    """Remove a --debug without a value, an option of sfttrain.

    Returns:
        The other tokens, and whether the option was there.

    The --debug of transformers has a value (underflow_overflow) and stays.
    """
    kept: list[str] = []
    found = False
    for number, token in enumerate(tokens):
        if token == "--debug" and (
            number + 1 == len(tokens) or "overflow" not in tokens[number + 1]
        ):
            found = True
        else:
            kept.append(token)
    return kept, found


def _report_library_error(error: Exception) -> int:
    """Report an error raised by another library, and return the exit code."""
    text = " ".join(str(error).split())[:500] or type(error).__name__
    if any(words in text.lower() for words in ("out of memory", "allocate memory")):
        return _report(text, _remedy_for_memory(error), 3)
    if isinstance(error, OSError):
        return _report(text, "check the disk, and the permissions there", 3)
    if isinstance(error, ImportError):
        return _report(text, "install the missing package", 3)
    if isinstance(error, ValueError):
        return _report(text, "check the settings; --debug shows the traceback", 2)
    return _report(f"{type(error).__name__}: {text}", "run with --debug to see the traceback", 1)


def _remedy_for_memory(error: Exception) -> str:
    """Return which settings need less memory, for the phase that had too little."""
    frames = (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
    if "evaluate" in frames:
        return "lower --per_device_eval_batch_size, which counts packs of up to max_length tokens"
    return (
        "lower --per_device_train_batch_size, which counts packs of up to max_length tokens, and"
        " raise --gradient_accumulation_steps by the same factor; or add --gradient_checkpointing,"
        " or train an adapter with --use_peft"
    )


def _report(message: str, remedy: str, code: int) -> int:
    text = f"error: {message}" + (f"\n  → {remedy}" if remedy else "")
    print(escape_control(text), file=sys.stderr)
    return code

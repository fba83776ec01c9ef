"""The command `sfttrain run`: nothing but parsing and printing."""

from __future__ import annotations

import atexit
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sftprep.errors import FlagNames, SftprepError
from sfttrain.cli.help_text import PROGRAM, short_help

_HELP = {"-h", "--help", "--help-all"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 done, 1 failed, 2 usage or bad input, 3 environment (disk, memory,
    a missing device)."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (tokens[0], tokens[1:]) if tokens else ("", [])
    if command == "run":
        rest, debug = _take_debug(rest)
        return _help(rest) if _HELP & set(rest) else _guarded(rest, debug)
    if command in ("", "--help", "-h"):
        print(PROGRAM, end="")
        return 0 if command else 2
    if command == "--version":
        import sftprep

        print(sftprep.__version__)
        return 0
    return _tell(f"unknown command {command!r}", "the command is: sfttrain run", 2)


def _help(arguments: list[str]) -> int:
    if "--help-all" in arguments:
        from sfttrain.cli.arguments import full_help

        print(full_help())
    else:
        print(short_help())
    return 0


def _guarded(arguments: list[str], debug: bool) -> int:
    """Run, and tell errors in words: what is wrong and what to do; with `debug` they pass."""
    try:
        if not debug:
            _quieten_libraries()
        return _run(arguments)
    except SftprepError as error:
        if debug:
            raise
        shown = _with_flags(error)
        return _leave(_tell(shown.message, shown.remedy, shown.exit_code))
    except KeyboardInterrupt:
        return _leave(
            _tell(
                "interrupted",
                "go on with --resume_from_checkpoint latest, if a checkpoint was saved",
                1,
            )
        )
    except Exception as error:
        if debug:
            raise
        return _leave(_tell_foreign(error))


def _with_flags(error: SftprepError) -> SftprepError:
    """Return the error with its settings as flags of this command."""
    from sfttrain.config.setting_names import TrainerNames  # loads torch, which --help never does

    flags = FlagNames("_")
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
    return _leave(0)  # here, while `prepared` holds what must not be taken down


def _leave(code: int) -> int:
    """Return `code`; a rank of several ends with it at once, for taking down its process group may
    hang or abort.

    gloo's threads wait for Python's lock to let go of the tensors of the last collective, while the
    group's destructor holds that lock and waits for them (seen with torch 2.13). What others have
    registered for the end is still run.
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


def _quieten_libraries() -> None:
    """Deprecations inside other libraries are not the user's, and their bars would fill a log
    file."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _take_debug(tokens: list[str]) -> tuple[list[str], bool]:
    """Take out a --debug without a value, which is ours; transformers' has one (--debug
    underflow_overflow)."""
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


def _tell_foreign(error: Exception) -> int:
    """An error that another library raised: what it says, and what may help."""
    text = " ".join(str(error).split())[:500] or type(error).__name__
    if "out of memory" in text.lower():
        return _tell(
            text,
            "lower --per_device_train_batch_size, add --gradient_checkpointing, or train an adapter"
            " with --use_peft",
            3,
        )
    if isinstance(error, OSError):
        return _tell(text, "check the disk, and who may write there", 3)
    if isinstance(error, ImportError):
        return _tell(text, "install the package it names", 3)
    if isinstance(error, ValueError):
        return _tell(text, "check the setting it names; --debug shows where it comes from", 2)
    return _tell(
        f"{type(error).__name__}: {text}", "run again with --debug to see where it comes from", 1
    )


def _tell(message: str, remedy: str, code: int) -> int:
    print(f"error: {message}" + (f"\n  → {remedy}" if remedy else ""), file=sys.stderr)
    return code

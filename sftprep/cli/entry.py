"""The entry point of the command: parsing of arguments, and exit codes."""

from __future__ import annotations

import difflib
import json
import logging
import shlex
import sys
import traceback
from itertools import pairwise
from typing import get_args

from cyclopts import App, ArgumentCollection, MissingArgumentError, UnknownOptionError
from cyclopts.config import Dict

# These modules add their commands to the application.
import sftprep.cli.build
import sftprep.cli.completion
import sftprep.cli.environment
import sftprep.cli.export
import sftprep.cli.finished
import sftprep.cli.garbage
import sftprep.cli.import_config
import sftprep.cli.preview
import sftprep.cli.push
import sftprep.cli.verify  # noqa: F401
from sftprep.cli.app import app
from sftprep.cli.help_text import argument_name, help_text, usage_text
from sftprep.config.aliases import replace_aliases, replace_flags
from sftprep.config.build import read_config_file
from sftprep.errors import (
    ConfigError,
    FlagNames,
    SftprepError,
    escape_control,
    setting,
    settings_shown_as,
)

_STORE_LIBRARIES = ("gcsfs", "s3fs", "adlfs", "fsspec", "aiohttp", "azure", "botocore")
"""Loggers of libraries that log, with a traceback, the exception that they raise as well."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, and exit with its exit code.

    Args:
        arguments: The arguments; those of the process by default.
    """
    tokens = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in tokens
    if not debug:
        for name in _STORE_LIBRARIES:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        tokens = [*replace_flags(tokens)]
        app.config = (*_config_from_file(tokens), _reject_fractions)
        with settings_shown_as(FlagNames()):
            if (text := help_text(app, tokens)) is not None:
                print(text, flush=True)
                sys.exit(0)
            code = app(
                _protect_stdin(tokens),
                exit_on_error=False,
                print_error=False,
                result_action="return_value",
            )
        sys.exit(code if isinstance(code, int) else 0)
    except SftprepError as error:
        _fail(error, error, error.exit_code, debug=debug)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        command = escape_control(shlex.join(["sftprep", *tokens]))
        is_resumed = tokens[:1] in (["build"], ["push"])
        next_step = "what is done is kept. To resume, run" if is_resumed else "to start again, run"
        print(f"interrupted; {next_step} the same command again: {command}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Settings are validated when their dataclass is made, which the parser does: it wraps the
        # error.
        inner = error.__cause__ or error.__context__
        if isinstance(inner, SftprepError):
            _fail(inner, error, inner.exit_code, debug=debug)
        if type(error).__module__.startswith("cyclopts"):
            _fail(_explain(error, tokens), error, 2, debug=debug)
        raise


def _config_from_file(tokens: list[str]) -> tuple[Dict, ...]:
    """Return the file named by --config, as a source for flags.

    Flags on the command line take precedence over it.
    """
    for index, token in enumerate(tokens):
        name, equals, value = token.partition("=")
        following = tokens[index + 1] if index + 1 < len(tokens) else ""
        path = value if equals else following
        if name == "--config" and path:
            settings = replace_aliases(read_config_file(path))
            # A flag has text, and the parser would take the keys of a mapping for flags.
            settings = {
                key: json.dumps(value) if isinstance(value, dict) else value
                for key, value in settings.items()
            }
            # Inputs have no flag; the command reads them from the file.
            for key in ("inputs", "sources"):
                settings.pop(key, None)
            return (Dict(settings, use_commands_as_keys=False, source=path),)
    return ()


def _protect_stdin(tokens: list[str]) -> list[str]:
    """Return the arguments with each `-` at the end, where the parser does not take it for a flag.

    Example:
        build - --output out  ->  build --output out -- -
    """
    rest = [token for token in tokens if token != "-"]
    if len(rest) == len(tokens):
        return tokens
    return [*rest, *(["--"] if "--" not in rest else []), *["-"] * (len(tokens) - len(rest))]


def _reject_fractions(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Reject fractions in integer settings; the parser would round them.

    Raises:
        ConfigError: A setting is a fraction.
    """
    for argument in arguments:
        if int not in (argument.hint, *get_args(argument.hint)):
            continue
        for token in argument.tokens:
            if "." in token.value and not _is_integer(token.value):
                name = argument.name.removeprefix("--").replace("-", "_")
                raise ConfigError(
                    f"{setting(name)} is {token.value}",
                    remedy=f"use an integer for {setting(name)}",
                )


def _is_integer(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return True  # not a number at all, which the parser reports


def _explain(error: Exception, tokens: list[str]) -> str:
    """Return the text for an error of the parser."""
    command = tokens[0] if tokens and tokens[0] in app else ""
    remedy = f"see sftprep {command} --help" if command else "see sftprep --help"
    message = str(error)
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = argument_name(error.argument)
        written = error.keyword or next(
            (token.keyword for token in error.argument.tokens if token.keyword), None
        )
        if written is None:
            message, remedy = f"{name} is missing", usage_text(app, command)
        elif (written, "-") in pairwise(tokens):
            message = f"{written} cannot be -, which is stdin"
            remedy = "write it to a file; ./- is a file of this name"
        else:
            message = f"{written} has no value"
    elif isinstance(error, UnknownOptionError):
        written = (error.token.keyword or error.token.value).partition("=")[0].strip("[]")
        source = "" if error.token.source == "cli" else f" in {error.token.source}"
        message = f"unknown option {written}{source}"
        known = {_plain(name): name for each in error.argument_collection for name in each.names}
        # With the default cutoff, --date would be suggested for --dataset_name.
        if similar := difflib.get_close_matches(_plain(written), known, n=1, cutoff=0.75):
            remedy = f"did you mean {known[similar[0]]}? {remedy}"
    return f"{message}\n  → {remedy}"


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-")


def _fail(message: object, error: BaseException, code: int, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    if isinstance(message, SftprepError):
        message = message.shown_by(FlagNames())
    print(f"error: {escape_control(str(message))}", file=sys.stderr)
    sys.exit(code)

"""The command `sfttrain completion`: a script that completes arguments in a shell."""

from __future__ import annotations

import inspect
from argparse import Action
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import App, Parameter

from sftprep.errors import ConfigError
from sfttrain.cli.help_text import CHAT

_Shell = Literal["bash", "zsh", "fish"]
_Option = tuple[str, tuple[str, ...], Any]
"""The name of an option as an identifier, its flags, and the type of its value. The shell completes
a path as the name of a file; so it does where a value could be anything."""


def print_completion(arguments: Sequence[str]) -> int:
    """Print the script for a shell.

    Args:
        arguments: The arguments after `sfttrain completion`.

    Raises:
        ConfigError: They are not one of the shells.
    """
    shells = get_args(_Shell)
    if len(arguments) != 1 or arguments[0] not in shells:
        raise ConfigError(
            f"`sfttrain completion` was started with {' '.join(arguments) or 'no shell'}",
            remedy=f"specify one of: {', '.join(shells)}",
        )
    shell: Any = arguments[0]
    print(_describe_program().generate_completion(prog_name="sfttrain", shell=shell))
    return 0


def _describe_program() -> App:
    """Return the commands and options in the form of the library that writes the scripts."""
    from sfttrain.cli.arguments import run_parser

    chat = ((name, (f"--{name}",), _type_of(default)) for name, default, _ in CHAT)
    commands: dict[str, Iterable[_Option]] = {
        "run": [*map(_to_option, run_parser().actions()), ("config", ("--config",), Path)],
        "chat": chat,
        "env": [("tokenizer", ("--tokenizer",), Path), ("json", ("--json",), bool)],
    }
    app = App(name="sfttrain", version="")
    for name, options in commands.items():
        app.command(_function_of(options), name=name)
    app.command(_function_of((), _Shell), name="completion")
    return app


def _type_of(default: str) -> Any:
    return bool if default == "False" else Path


def _to_option(action: Action) -> _Option:
    kind: Any = bool if action.const is not None else Path
    if action.choices:
        kind = Literal[tuple(str(choice) for choice in action.choices)]
    flags = tuple(flag for flag in action.option_strings if flag.startswith("--"))
    return flags[0].lstrip("-").replace("-", "_"), flags, kind


def _function_of(options: Iterable[_Option], argument: Any = Path) -> Callable[..., None]:
    """Return a function with these options, and a positional argument."""

    def function(*_: Any, **__: Any) -> None: ...

    first = inspect.Parameter.POSITIONAL_ONLY
    parameters = [inspect.Parameter("argument", first, annotation=argument)]
    parameters += (
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, Parameter(name=flags, negative=())],
        )
        for name, flags, kind in options
    )
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in parameters}
    return function

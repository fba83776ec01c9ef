"""The text of `--help`: what is required comes first, and paragraphs have the terminal's width."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from shutil import get_terminal_size
from typing import Any, get_args

from cyclopts import App
from cyclopts.argument import Argument

_REQUIRED = frozenset({"--tokenizer", "--output"})
"""Options of builds that have no default, although they may be in a config file."""
_VALUES = {int: "N", float: "X", bool: ""}
"""How the value of an option of this type is shown."""
_SHORT = {"--output": "-o"}
"""Options with a short form."""
_INDENT = 28
_NARROWEST, _WIDEST = 60, 100


def help_text(app: App, tokens: Sequence[str]) -> str | None:
    """Return the help that arguments ask for; None if they do not ask for it.

    Args:
        app: The application.
        tokens: The arguments of the program.
    """
    flags = tokens[: tokens.index("--")] if "--" in tokens else tokens
    if tokens and not {"--help", "-h"}.intersection(flags):
        return None
    width = max(_NARROWEST, min(get_terminal_size().columns, _WIDEST))
    if not tokens or tokens[0] in ("--help", "-h"):
        return "\n".join(_program_lines(app, width))
    # The parser reports a command that does not exist.
    command = app.resolved_commands().get(tokens[0])
    if command is None:
        return None
    usage = f"usage: {usage_text(app, tokens[0])} [options]"
    return "\n".join(_command_lines(usage, _description(command), _arguments(app, command), width))


def usage_text(app: App, command: str) -> str:
    """Return a command with what it requires: `sftprep verify DIRECTORY`."""
    arguments = _arguments(app, app.resolved_commands()[command])
    required = sorted(
        (each for each in arguments if each.show and _is_required(each)), key=_section_order
    )
    return " ".join([app.name[0], command, *map(_usage, required)])


def argument_name(argument: Argument) -> str:
    """Return the name of an argument as in the help: DIRECTORY or --tokenizer."""
    return _usage(argument) if _is_positional(argument) else argument.name


def _arguments(app: App, command: App) -> Sequence[Argument]:
    return command.assemble_argument_collection(
        default_parameter=app.default_parameter, parse_docstring=True
    )


def _program_lines(app: App, width: int) -> Iterator[str]:
    name = app.name[0]
    yield from (f"usage: {name} COMMAND ...", "", *_reflow(app.help, width), "", "commands:")
    for command, shown in sorted(app.resolved_commands().items()):
        if not command.startswith("-"):
            summary = _description(shown).partition("\n\n")[0]
            yield from _entry(command, " ".join(summary.split()), width)
    yield from ("", "options:")
    yield from _entry("--help, -h", "Show this text, or that of a command.", width)
    yield from _entry("--version", "Show the version.", width)


def _command_lines(
    usage: str, description: str, arguments: Sequence[Argument], width: int
) -> Iterator[str]:
    sections: dict[Any, list[Argument]] = {"required": [], "options": []}
    shown = [argument for argument in arguments if argument.show]
    for argument in sorted(shown, key=_section_order):
        title = _group(argument).name.lower()
        if _is_required(argument):
            title = "required"
        elif title == "parameters":
            title = "options"
        sections.setdefault(title, []).append(argument)
    yield usage
    yield from ("", *_reflow(description, width))
    for title, members in sections.items():
        if not members:
            continue
        yield from ("", f"{title}:")
        for argument in members:
            yield from _entry(_labels(argument), _explain(argument), width)
        if title == "options":
            yield from _entry("--help, -h", "Show this text.", width)


def _group(argument: Argument) -> Any:
    return argument.parameter.group[0]  # type: ignore[index]


def _section_order(argument: Argument) -> tuple[bool, int]:
    order = _group(argument).sort_key
    return (not _is_positional(argument), order if isinstance(order, int) else 0)


def _is_positional(argument: Argument) -> bool:
    return "POSITIONAL" in argument.field_info.kind.name


def _is_required(argument: Argument) -> bool:
    has_no_default = argument.field_info.default in ("", inspect.Parameter.empty)
    return _is_positional(argument) or (
        has_no_default and (argument.required or argument.name in _REQUIRED)
    )


def _usage(argument: Argument) -> str:
    if not _is_positional(argument):
        return f"{argument.name} {_value(argument)}"
    name = argument.name.removeprefix("--").upper()
    is_repeated = argument.field_info.kind.name == "VAR_POSITIONAL"
    return f"{_singular(name)}..." if is_repeated else name


def _singular(name: str) -> str:
    """Return the singular of INPUTS or DIRECTORIES."""
    return re.sub("IES$", "YS", name).removesuffix("S")


def _labels(argument: Argument) -> str:
    """Return the names of an option with its value.

    Example:
        --output DIR, -o;  --position-ids, --no-position-ids
    """
    if _is_positional(argument):
        return _usage(argument)
    names = [name for name in argument.names if name not in argument.negatives]
    value = _value(argument)
    names[-1] = f"{names[-1]} {value}".rstrip()
    if argument.field_info.default is not False:  # otherwise it only says what is so already
        names += argument.negatives
    return ", ".join([*names, *filter(None, [_SHORT.get(argument.name)])])


def _value(argument: Argument) -> str:
    if argument.name == "--tokenizer":
        return "NAME_OR_DIR"
    if argument.name == "--output":
        return "DIR" if _is_required(argument) else "FILE"
    kinds = [argument.hint, *get_args(argument.hint)]
    if argument.get_choices():
        return "CHOICE"
    return next((value for kind, value in _VALUES.items() if kind in kinds), "TEXT")


def _explain(argument: Argument) -> str:
    """Return the description of an option with its choices and its default."""
    text = " ".join((argument.parameter.help or "").split())
    default = argument.field_info.default
    facts = []
    if choices := argument.get_choices():
        facts.append(f"one of: {', '.join(choices)}")
    is_shown = type(default) in (str, int, float) and default != ""
    if is_shown and "Default:" not in text:
        facts.append(f"default: {default}")
    return f"{text} [{'; '.join(facts)}]" if facts else text


def _description(app: App) -> str:
    """Return the help of a command, without the part of its docstring about parameters."""
    text = inspect.cleandoc(app.help or "")
    return re.split(r"\n\nParameters\n-+\n", text)[0]


def _entry(label: str, text: str, width: int) -> Iterator[str]:
    """Yield the lines of an option: its names, and its description in a column of its own."""
    lines = textwrap.wrap(text, width - _INDENT, break_on_hyphens=False)
    label = f"  {label}"
    if len(label) > _INDENT - 2 or not lines:
        yield label
    else:
        yield f"{label:<{_INDENT}}{lines.pop(0)}"
    yield from (" " * _INDENT + line for line in lines)


def _reflow(text: str, width: int) -> Iterator[str]:
    """Yield the lines of a text: paragraphs with another width, and indented blocks as they are."""
    for number, paragraph in enumerate(inspect.cleandoc(text).split("\n\n")):
        if number:
            yield ""
        if paragraph.startswith(" "):
            yield from paragraph.split("\n")
        else:
            yield from textwrap.wrap(paragraph, width, break_on_hyphens=False)

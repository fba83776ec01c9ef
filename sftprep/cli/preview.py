"""The commands `sftprep preview` and `sftprep doctor`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sftprep.cli.app import app
from sftprep.cli.build_settings import flags, take_stdin, to_build_config
from sftprep.cli.console import print_json, uses_color
from sftprep.config.build import (
    EvalConfig,
    FormatConfig,
    OutputConfig,
    PackConfig,
    ReadConfig,
    TokenizeConfig,
)
from sftprep.config.validation import check_integer
from sftprep.errors import ConfigError, setting

if TYPE_CHECKING:
    from sftprep.report.preview_view import ViewOptions

_SHARED_HELP = """\
All flags of `sftprep build` are accepted, also those without an effect here (about packing and the
output), so that a command line can be tried before it is run: replace `build`.
"""

_PREVIEW_HELP = f"""\
Show what a build would make of some records: their text, roles, tokens and loss mask.

Nothing is written. Each line of a text starts with the role that wrote it. A token ends at a middle
dot. Trained text is green on a terminal, and in ⟦ and ⟧ otherwise, or with NO_COLOR.

    sftprep preview chats.jsonl --tokenizer Qwen/Qwen3-8B --train-on assistant
    sftprep preview chats.jsonl --tokenizer Qwen/Qwen3-8B --line 17
    sftprep preview data/ --tokenizer Qwen/Qwen3-8B --random 1 -n 3

{_SHARED_HELP}
The exit code is 0, whatever the records contain; `sftprep doctor` examines many of them, and fails
if something is wrong.
"""

_DOCTOR_HELP = f"""\
Examine a sample of the records, and report what is lost, cut or never trained.

Up to 10,000 records are read, spread evenly over the inputs, always the same ones. Each finding has
its number, the first record, and the flag that changes it. MAJOR: a build fails, or trains on
something else than the records have (a message or a call is lost, nothing is trained, the end of a
turn is not trained, two beginning-of-sequence tokens). minor: all others.

    sftprep doctor chats.jsonl --tokenizer Qwen/Qwen3-8B --train-on assistant

{_SHARED_HELP}
The exit code is 0 if no finding is major, and 1 otherwise.
"""


_Read = Annotated[ReadConfig | None, flags("Input", 1)]
_Format = Annotated[FormatConfig | None, flags("Records and trained tokens", 2)]
_Tokenize = Annotated[TokenizeConfig | None, flags("Tokenizer and template", 3)]
_Pack = Annotated[PackConfig | None, flags("Packing", 4, show=False)]
_Evaluation = Annotated[EvalConfig | None, flags("Evaluation records", 5, show=False)]
_Output = Annotated[OutputConfig | None, flags("Output and execution", 6, show=False)]


@app.command(help=_PREVIEW_HELP)
def preview(
    *inputs: str,
    number: Annotated[int, Parameter(name=["--number", "-n"])] = 5,
    line: tuple[str, ...] = (),
    random: int | None = None,
    full: bool = False,
    tokens: bool = True,
    color: bool | None = None,
    read: _Read = None,
    format: _Format = None,
    tokenize: _Tokenize = None,
    pack: _Pack = None,
    evaluation: _Evaluation = None,
    output: _Output = None,
    config: str | None = None,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Show what a build would make of some records (the help is `_PREVIEW_HELP`).

    Parameters
    ----------
    inputs
        As for `sftprep build`: files, globs, folders, datasets on the Hub, or - for stdin.
    number
        Number of records; of a mixture, they are taken from its sources in turn.
    line
        Show the record in this line (or row) instead: N, or FILE:N if there are several inputs. The
        flag may be repeated.
    random
        Choose the records at random, with this seed.
    full
        Show all text; long stretches are abridged otherwise.
    tokens
        Show where tokens end.
    color
        Use colors; the default on a terminal, unless NO_COLOR is set.
    config
        YAML file with inputs (or the sources of a mixture) and settings, as for `sftprep build`.
    json
        Print ids, masks, texts and roles of all tokens, and the findings, as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.previews.run import preview_records
    from sftprep.previews.sample import RecordChoice
    from sftprep.report.preview_view import preview_data, preview_lines

    check_integer(number, setting("number"), 1, 10_000)
    choice = RecordChoice(number, tuple(map(_parse_line, line)), random)
    whole = to_build_config(inputs, config, read, format, tokenize, pack, evaluation, output)
    settings, data = take_stdin(whole)
    with redirect_stdout(sys.stderr):  # functions of the user may print
        result = preview_records(settings, choice, data=data)
    if json:
        print_json(preview_data(result))
        return 0
    options = _view_options(color, full=full, boundaries=tokens)
    print("\n".join(preview_lines(result, options)))
    return 0


@app.command(help=_DOCTOR_HELP)
def doctor(
    *inputs: str,
    records: int = 10_000,
    color: bool | None = None,
    read: _Read = None,
    format: _Format = None,
    tokenize: _Tokenize = None,
    pack: _Pack = None,
    evaluation: _Evaluation = None,
    output: _Output = None,
    config: str | None = None,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Examine a sample of the records (the help is `_DOCTOR_HELP`).

    Parameters
    ----------
    inputs
        As for `sftprep build`: files, globs, folders, datasets on the Hub, or - for stdin.
    records
        Largest number of records to examine.
    color
        Use colors; the default on a terminal, unless NO_COLOR is set.
    config
        YAML file with inputs (or the sources of a mixture) and settings, as for `sftprep build`.
    json
        Print the findings as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.previews.run import examine_sample
    from sftprep.report.preview_view import preview_data, preview_lines

    check_integer(records, setting("records"), 1, 10_000_000)
    whole = to_build_config(inputs, config, read, format, tokenize, pack, evaluation, output)
    settings, data = take_stdin(whole)
    with redirect_stdout(sys.stderr):
        result = examine_sample(settings, data=data, count=records)
    if json:
        print_json(preview_data(result))
    else:
        print("\n".join(preview_lines(result, _view_options(color))))
    return 0 if result.ok else 1


def _parse_line(text: str) -> tuple[str, int]:
    """Return the file and the line of a value of --line; the file is "" without one."""
    file, _, number = text.rpartition(":")
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(
            f"{setting('line')} is {text!r}",
            remedy=f"write {setting('line', 17)} or {setting('line', 'chats.jsonl:17')}",
        )
    return file, int(number)


def _view_options(
    color: bool | None, *, full: bool = False, boundaries: bool = True
) -> ViewOptions:
    """Return how a preview is shown."""
    from sftprep.report.preview_view import ViewOptions

    width = get_terminal_size().columns if sys.stdout.isatty() else None
    return ViewOptions(color=uses_color(color), full=full, boundaries=boundaries, width=width)

"""The `sftprep` command: parsing and printing, nothing else."""

from __future__ import annotations

import json
import os
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Annotated, Any, get_args

from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Dict

from sftprep.config.build import (
    BuildConfig,
    EvalConfig,
    FormatConfig,
    OutputConfig,
    PackConfig,
    ReadConfig,
    SourceConfig,
    TokenizeConfig,
    read_config_file,
)
from sftprep.errors import ConfigError, FlagNames, SftprepError
from sftprep.version import __version__

app = App(
    name="sftprep",
    version=__version__,
    help="""Turn raw conversations into packed, padding-free training batches.

    A first build, a look at it, a check of it:

        sftprep build chats.jsonl --tokenizer Qwen/Qwen3-8B --output shards

        sftprep inspect shards --row 0

        sftprep verify shards

    Exit codes: 0 ok, 1 a check failed, 2 usage or bad input, 3 disk, permission or a lock.
    """,
    help_format="plaintext",
)
_FLAT = Parameter(name="*")


@app.command
def build(
    *inputs: str,
    tokenize: Annotated[TokenizeConfig | None, _FLAT] = None,
    output: Annotated[OutputConfig | None, _FLAT] = None,
    format: Annotated[FormatConfig | None, _FLAT] = None,
    pack: Annotated[PackConfig | None, _FLAT] = None,
    read: Annotated[ReadConfig | None, _FLAT] = None,
    evaluation: Annotated[EvalConfig | None, _FLAT] = None,
    config: str | None = None,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Tokenize, mask and pack records into shards.

    The format of the records is detected: text; messages; prompt and completion (text or messages);
    conversations (sharegpt); instruction and output (alpaca). Rename keys where yours differ:

        sftprep build gsm8k.jsonl --map question=prompt,answer=completion --tokenizer gpt2 --output
        shards

    Parameters
    ----------
    inputs
        Files, globs or folders of JSON lines, JSON arrays, Parquet, CSV, TSV or Arrow; or data sets
        on the Hub: org/name.
    config
        YAML file with inputs (or the sources of a mixture) and settings by the names below
        (max_length: 2048); flags win over it.
    json
        Print the summary as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.pipeline.build import build as run
    from sftprep.report.summary import summary_data, summary_lines

    named = read_config_file(config) if config else {}
    settings = BuildConfig(
        source=SourceConfig(inputs or named.get("inputs", ()), named.get("sources", ())),
        read=read or ReadConfig(),
        evaluation=evaluation or EvalConfig(),
        format=format or FormatConfig(),
        tokenize=tokenize or TokenizeConfig(),
        pack=pack or PackConfig(),
        output=output or OutputConfig(),
    )
    # Functions of the user may print; what is on stdout is the summary.
    with _Bar(quiet=json) as bar, redirect_stdout(sys.stderr):
        report = run(settings, progress=bar)
    _print_json(summary_data(report)) if json else print("\n".join(summary_lines(report)))
    return 0


@app.command
def verify(directory: str, *, json: bool = False, debug: bool = False) -> int:
    """Check every shard of a build: digests, schema, invariants, accounts.

    Parameters
    ----------
    directory
        The --output folder of a build.
    json
        Print what was found as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.report.summary import some
    from sftprep.shards.verify import verify as run

    with _Bar(quiet=json) as bar:
        found = run(
            os.path.expanduser(directory), progress=lambda done, total: bar("verify", done, total)
        )
    if json:
        _print_json({**asdict(found), "folder": str(found.folder), "ok": found.ok})
    else:
        for problem in found.problems:
            print(f"problem: {problem}", file=sys.stderr)
        numbers = {
            "shard": found.shards,
            "pack": found.rows,
            "sequence": found.sequences,
            "token": found.tokens,
        }
        counted = ", ".join(some(number, what) for what, number in numbers.items())
        print(f"{'ok' if found.ok else 'DAMAGED'}: {counted} in {found.folder}")
    return 0 if found.ok else 1


@app.command
def inspect(
    directory: str,
    *,
    row: int = 0,
    tokenizer: str | None = None,
    full: bool = False,
    color: bool | None = None,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Show one pack: its sequences, where each comes from, and which tokens are trained.

    Trained text is green, or stands between ⟦ and ⟧ where there is no color.

    Parameters
    ----------
    directory
        The --output folder of a build.
    row
        Number of the pack, from 0; -1 is the last.
    tokenizer
        Folder or Hub name of the build's tokenizer, where it has moved since.
    full
        Show whole texts.
    color
        Color trained tokens; by default on a terminal.
    json
        Print ids, masks and texts as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.report.draw import draw_pack, pack_data
    from sftprep.report.summary import manifest_line, some
    from sftprep.shards.reader import open_shards
    from sftprep.tokenize.loading.decode import load_decoder

    shards = open_shards(os.path.expanduser(directory))
    if not -len(shards) <= row < len(shards):
        raise ConfigError(
            f"there is no row {row}: {directory} has {some(len(shards), 'pack')}",
            remedy=f"give --row 0 to {len(shards) - 1}",
        )
    decode = load_decoder(
        tokenizer or shards.manifest.tokenizer["name"], shards.manifest.tokenizer["fingerprint"]
    )
    index = row % len(shards)
    if json:
        _print_json(pack_data(shards[index], index, shards.manifest, decode))
    else:
        colored = sys.stdout.isatty() if color is None else color
        print(manifest_line(shards.manifest))
        print(
            "\n".join(
                draw_pack(shards[index], index, shards.manifest, decode, color=colored, full=full)
            )
        )
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    tokens = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in tokens
    try:
        app.config = (*_settings_file(tokens), _refuse_fractions)
        code = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.exit(code if isinstance(code, int) else 0)
    except SftprepError as error:
        _fail(error, error, error.exit_code, debug=debug)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Settings are checked where they are made, which is inside the parser: it wraps what they
        # say.
        inner = error.__cause__ or error.__context__
        if isinstance(inner, SftprepError):
            _fail(inner, error, inner.exit_code, debug=debug)
        if type(error).__module__.startswith("cyclopts"):
            _fail(f"{error}\n  → see sftprep --help", error, 2, debug=debug)
        raise


def _settings_file(tokens: list[str]) -> tuple[Dict, ...]:
    """The file that --config names, as a source of flags that the command line does not give."""
    for at, token in enumerate(tokens):
        name, equals, value = token.partition("=")
        path = value if equals else tokens[at + 1] if at + 1 < len(tokens) else ""
        if name == "--config" and path:
            settings = read_config_file(path)
            # Inputs have no flag: the command itself takes them from the file.
            for name in ("inputs", "sources"):
                settings.pop(name, None)
            return (Dict(settings, use_commands_as_keys=False, source=path),)
    return ()


def _refuse_fractions(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Raises ConfigError where a setting that is a whole number is given another, which the parser
    would round."""
    for argument in arguments:
        if int not in (argument.hint, *get_args(argument.hint)):
            continue
        for token in argument.tokens:
            if "." in token.value and not _is_whole(token.value):
                raise ConfigError(
                    f"{argument.name} is {token.value}",
                    remedy=f"give {argument.name} a whole number",
                )


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return True  # no number at all, of which the parser says so


def _fail(message: object, error: BaseException, code: int, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    if isinstance(message, SftprepError):
        message = message.shown_by(FlagNames())
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


_BEFORE = "prepare"
"""What is shown until there is something to count: the first use of a tokenizer takes some
seconds."""


class _Bar:
    """A progress bar on a terminal, and nothing elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._shown = None if quiet or not sys.stderr.isatty() else True
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bar:
        if self._shown:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description:<9}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._tasks[_BEFORE] = self._progress.add_task(_BEFORE, total=None)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._progress is None:
            return
        if _BEFORE in self._tasks:
            self._progress.remove_task(self._tasks.pop(_BEFORE))
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

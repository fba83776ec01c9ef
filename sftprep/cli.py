"""The `sftprep` command: parsing of the command line, and printing of results."""

from __future__ import annotations

import json
import os
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Annotated, Any, get_args

from cyclopts import App, ArgumentCollection, Group, Parameter
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
from sftprep.errors import (
    ConfigError,
    FlagNames,
    SftprepError,
    escape_control,
    format_count,
    setting,
    settings_shown_as,
)
from sftprep.version import __version__

app = App(
    name="sftprep",
    version=__version__,
    help="""Prepare data for fine-tuning: turn conversations into packed, tokenized shards.

    Build shards, look at one pack, and check all of them:

        sftprep build chats.jsonl --tokenizer Qwen/Qwen3-8B --output shards
        sftprep inspect shards --row 0
        sftprep verify shards

    `sftprep build --help` explains the formats and settings.

    Exit codes: 0 ok; 1 a check failed; 2 usage error or invalid input; 3 environment (disk,
    permission, lock).
    """,
    # Reflows the paragraphs of the help texts to the width of the terminal.
    help_format="markdown",
)


def _settings(title: str, position: int) -> Parameter:
    """Return the parameter for a dataclass of flags with its own help section."""
    return Parameter(name="*", group=Group(title, sort_key=position))


_BUILD_HELP = """\
Tokenize, mask and pack records into shards.

A build reads records, renders conversations with the chat template, encodes them, marks the
tokens that are trained, and packs the sequences into rows of up to `max_length` tokens. It
writes the shards (Arrow files) and `manifest.json` to the output folder. If a build is
interrupted, the same command resumes it.

The keys of the records decide their format:

    text               {"text": "..."}
    messages           {"messages": [{"role": "user", "content": "..."}, ...]}
    prompt-completion  {"prompt": "...", "completion": "..."}
    sharegpt           {"conversations": [{"from": "human", "value": "..."}]}
    alpaca             {"instruction": "...", "output": "..."}
    known pairs        {"question": "...", "answer": "..."}
    tokens             {"input_ids": [...], "labels": [...]}

Prompts and completions are strings or lists of messages.

Train on all tokens of the conversations in a file, or only on the turns of the assistant:

    sftprep build chats.jsonl --tokenizer Qwen/Qwen3-8B --output shards
    sftprep build chats.jsonl --tokenizer Qwen/Qwen3-8B --output shards \\
        --train-on assistant --max-length 4096

Rename the keys of a dataset on the Hub to those of a known format:

    sftprep build openai/gsm8k --config-name main --tokenizer gpt2 \\
        --map question=prompt,answer=completion --output shards

Hold out 2 % of the records for evaluation (in shards/eval), and quarantine invalid records
instead of stopping at the first one:

    sftprep build data/ --tokenizer Qwen/Qwen3-8B --output shards \\
        --eval-fraction 0.02 --on-bad-record quarantine
"""
"""The help of `sftprep build`, apart from its parameters."""


@app.command(help=_BUILD_HELP)
def build(
    *inputs: str,
    read: Annotated[ReadConfig | None, _settings("Input", 1)] = None,
    format: Annotated[FormatConfig | None, _settings("Records and trained tokens", 2)] = None,
    tokenize: Annotated[TokenizeConfig | None, _settings("Tokenizer and template", 3)] = None,
    pack: Annotated[PackConfig | None, _settings("Packing", 4)] = None,
    evaluation: Annotated[EvalConfig | None, _settings("Evaluation records", 5)] = None,
    output: Annotated[OutputConfig | None, _settings("Output and execution", 6)] = None,
    config: str | None = None,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Tokenize, mask and pack records into shards (the help is `_BUILD_HELP`).

    Parameters
    ----------
    inputs
        Files, globs or folders with JSON lines, JSON arrays, Parquet, CSV, TSV or Arrow; or
        datasets on the Hub (org/name).
    config
        YAML file with inputs (or the sources of a mixture) and settings by the names of the flags
        (max_length: 2048). Flags on the command line take precedence.
    json
        Print the summary as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.pipeline.build import build as run
    from sftprep.report.summary import summary_data, summary_lines

    from_file = read_config_file(config) if config else {}
    settings = BuildConfig(
        source=SourceConfig(inputs or from_file.get("inputs", ()), from_file.get("sources", ())),
        read=read or ReadConfig(),
        evaluation=evaluation or EvalConfig(),
        format=format or FormatConfig(),
        tokenize=tokenize or TokenizeConfig(),
        pack=pack or PackConfig(),
        output=output or OutputConfig(),
    )
    # User-provided functions may print, and stdout is for the summary only.
    with _ProgressBar(quiet=json) as bar, redirect_stdout(sys.stderr):
        report = run(settings, progress=bar)
    _print_json(summary_data(report)) if json else print("\n".join(summary_lines(report)))
    return 0


@app.command
def verify(directory: str, *, json: bool = False, debug: bool = False) -> int:
    """Check every shard of a build: checksums, schema, invariants and accounting.

    The exit code is 0 if the build is intact, and 1 if it is damaged.

    Parameters
    ----------
    directory
        The output folder of a build.
    json
        Print the result as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.shards.verify import verify as run

    with _ProgressBar(quiet=json) as bar:
        result = run(
            os.path.expanduser(directory), progress=lambda done, total: bar("verify", done, total)
        )
    if json:
        _print_json({**asdict(result), "folder": str(result.folder), "ok": result.ok})
    else:
        for problem in result.problems:
            print(f"problem: {problem}", file=sys.stderr)
        numbers = {
            "shard": result.shards,
            "pack": result.rows,
            "sequence": result.sequences,
            "token": result.tokens,
        }
        counted = ", ".join(format_count(number, noun) for noun, number in numbers.items())
        print(f"{'ok' if result.ok else 'DAMAGED'}: {counted} in {result.folder}")
    return 0 if result.ok else 1


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
    """Show one pack: its sequences, the record of each, and the trained tokens.

    Trained text is green on a terminal, and in ⟦ and ⟧ without color. The bar shows the sequences
    in the pack, one letter for each; upper case means that most tokens there are trained.

    Parameters
    ----------
    directory
        The output folder of a build.
    row
        Number of the pack, from 0; -1 is the last one.
    tokenizer
        Folder or Hub name of the tokenizer of the build, if it has moved since.
    full
        Show all text; long sequences are abridged otherwise.
    color
        Show trained text in color; the default on a terminal.
    json
        Print ids, masks and text as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.report.draw import draw_pack, pack_data
    from sftprep.report.summary import manifest_line
    from sftprep.shards.reader import open_shards
    from sftprep.tokenize.loading.decode import load_decoder

    shards = open_shards(os.path.expanduser(directory))
    if not -len(shards) <= row < len(shards):
        raise ConfigError(
            f"{setting('row')} is {row}, but {directory} has {format_count(len(shards), 'pack')}",
            remedy=f"use a number from {setting('row', 0)} to {len(shards) - 1}",
        )
    decode = load_decoder(
        tokenizer or shards.manifest.tokenizer["name"], shards.manifest.tokenizer["fingerprint"]
    )
    index = row % len(shards)
    pack, manifest = shards[index], shards.manifest
    if json:
        _print_json(pack_data(pack, index, manifest, decode))
    else:
        use_color = sys.stdout.isatty() if color is None else color
        print(manifest_line(manifest))
        print("\n".join(draw_pack(pack, index, manifest, decode, color=use_color, full=full)))
    return 0


app.command("sftprep.report.gc_command:gc")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, and exit with its exit code.

    Args:
        arguments: The arguments; those of the process by default.
    """
    tokens = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in tokens
    try:
        app.config = (*_config_from_file(tokens), _reject_fractions)
        with settings_shown_as(FlagNames()):
            code = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.exit(code if isinstance(code, int) else 0)
    except SftprepError as error:
        _fail(error, error, error.exit_code, debug=debug)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Settings are validated when their dataclass is made, which the parser does: it wraps the
        # error.
        inner = error.__cause__ or error.__context__
        if isinstance(inner, SftprepError):
            _fail(inner, error, inner.exit_code, debug=debug)
        if type(error).__module__.startswith("cyclopts"):
            _fail(f"{error}\n  → see sftprep --help", error, 2, debug=debug)
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
            settings = read_config_file(path)
            # Inputs have no flag; the command reads them from the file.
            for key in ("inputs", "sources"):
                settings.pop(key, None)
            return (Dict(settings, use_commands_as_keys=False, source=path),)
    return ()


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


def _fail(message: object, error: BaseException, code: int, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    if isinstance(message, SftprepError):
        message = message.shown_by(FlagNames())
    print(f"error: {escape_control(str(message))}", file=sys.stderr)
    sys.exit(code)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


_FIRST_STAGE = "prepare"
"""The stage that is shown until there is something to count. The first use of a tokenizer takes
some seconds."""


class _ProgressBar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._is_shown = not quiet and sys.stderr.isatty()
        self._progress: Any = None  # the bar of rich, while it is shown
        self._tasks: dict[str, Any] = {}  # the task of rich for each stage

    def __enter__(self) -> _ProgressBar:
        if self._is_shown:
            # Imported only where a bar is shown, to keep the command fast.
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
            self._tasks[_FIRST_STAGE] = self._progress.add_task(_FIRST_STAGE, total=None)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show the progress of a stage, with the signature of `Progress`."""
        if self._progress is None:
            return
        if _FIRST_STAGE in self._tasks:
            self._progress.remove_task(self._tasks.pop(_FIRST_STAGE))
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

"""The command `sftprep build`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

from sftprep.cli.app import app
from sftprep.cli.build_settings import flags, take_stdin, to_build_config
from sftprep.cli.console import ProgressBar, print_json
from sftprep.config.build import (
    EvalConfig,
    FormatConfig,
    OutputConfig,
    PackConfig,
    ReadConfig,
    TokenizeConfig,
)

if TYPE_CHECKING:
    from sftprep.pipeline.kept_work import KeptWork

_BUILD_HELP = """\
Tokenize, mask and pack records into shards.

A build reads records, renders conversations with the chat template, encodes them, marks the
tokens that are trained, and packs the sequences into rows of up to `max_length` tokens. It
writes the shards (Arrow files) and `manifest.json` to the output folder. If a build is
interrupted, the same command resumes it. If it is finished, the same command does nothing.

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

Names of other programs are accepted too, such as --assistant_only_loss, --max_seq_length,
--dataset_text_field, --packing false, --cutoff_len and --sequence_len. 4k means 4,096 tokens.
"""
"""The help of `sftprep build`, apart from its parameters."""


@app.command(help=_BUILD_HELP)
def build(
    *inputs: str,
    read: Annotated[ReadConfig | None, flags("Input", 1)] = None,
    format: Annotated[FormatConfig | None, flags("Records and trained tokens", 2)] = None,
    tokenize: Annotated[TokenizeConfig | None, flags("Tokenizer and template", 3)] = None,
    pack: Annotated[PackConfig | None, flags("Packing", 4)] = None,
    evaluation: Annotated[EvalConfig | None, flags("Evaluation records", 5)] = None,
    output: Annotated[OutputConfig | None, flags("Output and execution", 6)] = None,
    config: str | None = None,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Tokenize, mask and pack records into shards (the help is `_BUILD_HELP`).

    Parameters
    ----------
    inputs
        Files, globs or folders with JSON lines, JSON arrays, Parquet, CSV, TSV or Arrow; or
        datasets on the Hub (org/name); or - for JSON lines from stdin, also with gzip or zstd.
    config
        YAML file with inputs (or the sources of a mixture) and settings by the names of the flags
        (max_length: 2048). Flags on the command line take precedence.
    json
        Print the summary as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.pipeline.build import build as run
    from sftprep.pipeline.part import build_part
    from sftprep.report.part_summary import part_data, part_lines
    from sftprep.report.summary import resume_line, summary_data, summary_lines

    settings = to_build_config(inputs, config, read, format, tokenize, pack, evaluation, output)
    settings, data = take_stdin(settings)
    # User-provided functions may print, and stdout is for the summary only.
    is_part = settings.output.part is not None
    part, report = None, None
    with ProgressBar(quiet=json) as bar, redirect_stdout(sys.stderr):

        def on_resume(kept: KeptWork) -> None:
            bar.print_line(resume_line(kept))

        if is_part:
            part = build_part(settings, data=data, progress=bar, on_resume=on_resume)
        else:
            report = run(settings, data=data, progress=bar, on_resume=on_resume)
    if part is not None:
        print_json(part_data(part)) if json else print("\n".join(part_lines(part)))
    if report is not None:
        print_json(summary_data(report)) if json else print("\n".join(summary_lines(report)))
    return 0

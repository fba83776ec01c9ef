"""The command `sftprep export`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from sftprep.cli.app import app
from sftprep.cli.console import ProgressBar, print_json
from sftprep.errors import format_count

if TYPE_CHECKING:
    from sftprep.exchange.exports.export import ExportReport

_EXPORT_HELP = """\
Write a finished build in the format of another tool.

All tokens, trained positions, boundaries of sequences and weights survive, or the export is
refused with the reason. The evaluation build becomes the split `validation`. At the end, the
lines are printed that you write in the script of the other tool:

    sftprep export shards --to trl --output for-trl

`trl` and `hf` are read by `datasets.load_dataset`; `hf` has all columns, for your own trainer.
`megatron-bridge` is packed Parquet, `mds` is MosaicML Streaming. For `axolotl`, which packs
itself, each row is one sequence.
"""


@app.command(help=_EXPORT_HELP)
def export(
    directory: str,
    *,
    to: Literal["trl", "hf", "megatron-bridge", "mds", "axolotl"],
    output: str,
    overwrite: bool = False,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Write a finished build in the format of another tool (the help is `_EXPORT_HELP`).

    Parameters
    ----------
    directory
        The output folder of a build, or its URL in a store.
    to
        The format.
    output
        Folder of the export. Nothing is in it until the export is complete.
    overwrite
        Replace another export in the output folder.
    json
        Print the result as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.exchange.exports.export import export as run

    with ProgressBar(quiet=json) as bar:
        report = run(
            os.path.expanduser(directory),
            to=to,
            output=os.path.expanduser(output),
            overwrite=overwrite,
            progress=bar,
        )
    if json:
        print_json(asdict(report))
    else:
        print("\n".join(_summary(report)))
    return 0


def _summary(report: ExportReport) -> Iterator[str]:
    files = f"{format_count(report.files, 'file')} of {report.bytes:,} bytes"
    if report.is_up_to_date:
        yield f"up to date: {files} in {report.output}"
    else:
        yield f"exported {files} to {report.output}"
    for split in report.splits:
        yield (
            f"  {split.name}: {format_count(split.rows, 'row')},"
            f" {format_count(split.sequences, 'sequence')},"
            f" {format_count(split.tokens, 'token')}, {split.trained_tokens:,} trained"
        )
    yield ""
    yield report.script

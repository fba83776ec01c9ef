"""The command `sftprep import`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sftprep.cli.app import app
from sftprep.cli.console import print_json
from sftprep.errors import OutputExists, escape_control, setting

_IMPORT_HELP = """\
Convert the settings of another tool to a config file of `sftprep build`.

It reads the YAML of axolotl (its `datasets:` and what else concerns data) and the
`dataset_info.json` of LLaMA-Factory:

    sftprep import axolotl.yaml --output build.yaml
    sftprep build --config build.yaml --output shards

    sftprep import data/dataset_info.json --datasets alpaca_en,identity --output build.yaml
    sftprep build --config build.yaml --tokenizer Qwen/Qwen3-8B --output shards

Each setting that has no counterpart is a comment in the file, `# not converted: ...`, and a line
on stderr.
"""


@app.command(name="import", help=_IMPORT_HELP)
def import_config(
    file: str,
    *,
    output: str | None = None,
    datasets: str = "",
    overwrite: bool = False,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Convert settings to a config file (the help is `_IMPORT_HELP`).

    Parameters
    ----------
    file
        The YAML of axolotl, or dataset_info.json of LLaMA-Factory.
    output
        The config file to write. Default: stdout.
    datasets
        Names of data sets in dataset_info.json, separated by commas. Default: all.
    overwrite
        Replace the config file.
    json
        Print the settings and notes as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.config.validation import local_folder, split_list
    from sftprep.core.atomic_write import write_bytes
    from sftprep.exchange.imports.convert import import_config as run

    conversion = run(file, datasets=split_list([datasets]))
    text = conversion.to_yaml(f"Converted from {escape_control(file)} by sftprep import")
    if output is not None:
        path = Path(local_folder(output, setting("output")))
        if os.path.lexists(path) and not overwrite:
            raise OutputExists(
                f"{path} exists", remedy=f"replace it with {setting('overwrite', True)}"
            )
        write_bytes(path, text.encode())
    if json:
        print_json({"settings": conversion.settings, "notes": conversion.notes})
        return 0
    for note in conversion.notes:
        print(note, file=sys.stderr)
    if output is None:
        print(text, end="")
    else:
        tokenizer = "" if "tokenizer" in conversion.settings else " --tokenizer NAME_OR_DIR"
        print(f"wrote {output}")
        print(f"build it:  sftprep build --config {output}{tokenizer} --output shards")
    return 0

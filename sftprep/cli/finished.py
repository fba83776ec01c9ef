"""The commands for finished builds."""

from __future__ import annotations

import os

from sftprep.cli.app import app
from sftprep.cli.console import print_json, uses_color
from sftprep.config.validation import local_folder
from sftprep.errors import ConfigError, format_count, setting


@app.command
def merge(
    *directories: str,
    output: str,
    overwrite: bool = False,
    json: bool = False,
    debug: bool = False,
) -> int:
    """Join finished builds of one recipe, without tokenizing or packing anything again.

    The builds must have the same settings, tokenizer and chat template, and no group of records in
    common. Shards are hard links where possible.

    Parameters
    ----------
    directories
        The output folders of the builds.
    output
        Folder of the new build.
    overwrite
        Replace a finished build in the output folder.
    json
        Print the result as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.pipeline.output.merge import merge as run
    from sftprep.report.summary import manifest_line

    folders = [os.path.expanduser(directory) for directory in directories]
    manifest = run(*folders, output=local_folder(output, setting("output")), overwrite=overwrite)
    if json:
        print_json(
            {
                "output": str(manifest.folder),
                "manifest_digest": manifest.digest,
                "data_digest": manifest.data_digest,
                "groups": len(manifest.groups),
                "packs": manifest.rows,
                "tokens": manifest.tokens,
            }
        )
    else:
        builds = format_count(len(folders), "build")
        print(f"merged {builds} in {manifest.folder}: {manifest_line(manifest)}")
    return 0


@app.command
def inspect(
    directory: str,
    *,
    row: int = 0,
    max_length: int | None = None,
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
    max_length
        Tokens in a pack, for a build with --layout sequences; by default that of the build.
    tokenizer
        Folder or Hub name of the tokenizer of the build, if it has moved since.
    full
        Show all text; long sequences are abridged otherwise.
    color
        Show trained text in color; the default on a terminal, unless NO_COLOR is set.
    json
        Print ids, masks and text as JSON.
    debug
        Show a traceback with errors.
    """
    from sftprep.report.draw import draw_pack, pack_data
    from sftprep.report.summary import manifest_line
    from sftprep.shards.reading.open_build import open_shards
    from sftprep.tokenize.loading.decode import load_decoder

    shards = open_shards(os.path.expanduser(directory), max_length=max_length)
    if not -len(shards) <= row < len(shards):
        raise ConfigError(
            f"{setting('row')} is {row}, but {directory} has {format_count(len(shards), 'pack')}",
            remedy=f"use a number from {setting('row', 0)} to {len(shards) - 1}",
        )
    facts = shards.manifest.tokenizer
    decode = load_decoder(
        tokenizer or facts["name"], facts["fingerprint"], added=facts.get("added", ())
    )
    index = row % len(shards)
    pack, manifest = shards[index], shards.manifest
    if json:
        print_json(pack_data(pack, index, manifest, decode))
    else:
        print(manifest_line(manifest))
        print(
            "\n".join(draw_pack(pack, index, manifest, decode, color=uses_color(color), full=full))
        )
    return 0

"""The README of an export, which also tells `datasets` the files of each split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sftprep.exchange.exports.targets import Target
from sftprep.shards.reading.shards import Shards
from sftprep.version import __version__


def data_card(work: Path, builds: Mapping[str, Shards], target: Target, script: str) -> str:
    """Return the text of README.md.

    Args:
        work: The folder with the files of the splits.
        builds: The builds that were exported, by split.
        target: The format.
        script: The lines for the other tool.
    """
    lines = []
    if target.has_data_card:
        # Each file by its name: a pattern could mix the files of two exports.
        lines += ["---", "configs:", "- config_name: default", "  data_files:"]
        for split in builds:
            lines += [f"  - split: {split}", "    path:"]
            names = sorted(path.name for path in (work / split).iterdir())
            lines += [f"    - {split}/{name}" for name in names]
        lines += ["---", ""]
    train = builds["train"].manifest
    language = "yaml" if target.name == "axolotl" else "python"
    lines += [
        f"Tokenized data for {target.name}, written by `sftprep export` {__version__}.",
        "",
        f"- tokenizer: {train.tokenizer['name']}",
        f"- tokens in a row: at most {train.max_length:,}",
        *(f"- {name}: build {shards.manifest.digest}" for name, shards in builds.items()),
        "",
        f"```{language}",
        script,
        "```",
        "",
    ]
    return "\n".join(lines)

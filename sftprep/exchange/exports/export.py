"""Export of a finished build in the format of another tool."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sftprep.config.validation import local_folder
from sftprep.core.atomic_write import write_bytes
from sftprep.errors import ConfigError, ManifestError, ShardError, format_count, setting
from sftprep.exchange.exports.data_card import data_card
from sftprep.exchange.exports.folder import (
    EXPORT_NAME,
    hold_folder,
    read_export,
    replace_folder,
    write_export,
)
from sftprep.exchange.exports.rows import find_targets
from sftprep.exchange.exports.scripts import ScriptFacts, script_for
from sftprep.exchange.exports.targets import TARGETS, Target, check_weights
from sftprep.shards.layout import EVAL_FOLDER, tokenizer_paths
from sftprep.shards.reading.open_build import open_shards
from sftprep.shards.reading.shards import Shards
from sftprep.version import __version__

_LAYOUT = 1
"""Incremented when the files of an export change, so that none of them counts as up to date."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ExportedSplit:
    """What was written of a split.

    Attributes:
        name: `train` or `validation`.
        rows: The rows: packs, or sequences for a tool that packs itself.
        sequences: The sequences in them.
        tokens: Their tokens.
        trained_tokens: The tokens that are trained.
    """

    name: str
    rows: int
    sequences: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The result of an export.

    Attributes:
        target: The format.
        output: The folder.
        splits: What it contains.
        files: The number of its files.
        bytes: Their size.
        script: The lines that a user writes in the other tool.
        is_up_to_date: Whether the folder had this export before, and nothing was written.
    """

    target: str
    output: str
    splits: tuple[ExportedSplit, ...]
    files: int
    bytes: int
    script: str
    is_up_to_date: bool


def export(
    folder: str | os.PathLike[str],
    *,
    to: str,
    output: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> ExportReport:
    """Write a finished build, and its evaluation build, in the format of another tool.

    All tokens, trained positions, boundaries of sequences and weights survive, or the export is
    refused. Nothing is written to `output` until all of it is complete.

    Args:
        folder: The output folder of the build, or its URL in a store.
        to: trl, hf, megatron-bridge, mds or axolotl.
        output: A local folder, which is created.
        overwrite: Whether another export in it is replaced.
        progress: Called with the name of the stage, the packs written, and those in total.

    Returns:
        What was written, and the lines for the other tool.

    Raises:
        ConfigError: The format is unknown, or cannot express the build.
        ManifestError: The folder is not a finished build.
        ShardError: A shard is missing or damaged.
        OutputExists: The output has an export of another build, or other files.
        OutputBusy: Another export is writing to it.
        StorageError: A file cannot be written.

    Example:
        report = export("shards", to="trl", output="for-trl")
        print(report.script)
    """
    if to not in TARGETS:
        raise ConfigError(
            f"{setting('to')} is {to!r}", remedy=f"choose one of {', '.join(TARGETS)}"
        )
    target = TARGETS[to]
    root = Path(local_folder(os.fspath(output), setting("output")))
    builds = _open_splits(folder)
    identity = {
        "layout": _LAYOUT,
        "sftprep_version": __version__,
        "builds": {name: shards.manifest.digest for name, shards in builds.items()},
    }
    script = script_for(to, _facts(os.fspath(output), builds))
    with hold_folder(root):
        previous = read_export(root)
        if previous is not None and _is_same(previous, identity, to):
            return _report(previous, target, root, script, is_up_to_date=True)
        with replace_folder(root, overwrite=overwrite) as work:
            splits = _write_splits(work, builds, target, progress)
            card = data_card(work, builds, target, script)
            write_bytes(work / "README.md", card.encode())
            content = {**identity, "splits": [asdict(split) for split in splits]}
            sizes = write_export(work, content, to)
        return _report({**content, "files": sizes}, target, root, script, is_up_to_date=False)


def _open_splits(folder: str | os.PathLike[str]) -> dict[str, Shards]:
    """Open a build, and its evaluation build if there is one."""
    train = open_shards(folder)
    link = train.manifest.eval
    if not link:
        return {"train": train}
    validation = open_shards(str(train.root / EVAL_FOLDER))
    if validation.manifest.digest != link["digest"]:
        raise ManifestError(
            f"the evaluation build in {validation.root} belongs to another build",
            remedy=f"run the build of {train.root} again",
        )
    return {"train": train, "validation": validation}


def _facts(path: str, builds: dict[str, Shards]) -> ScriptFacts:
    train = builds["train"]
    stored = next(iter(tokenizer_paths(train.manifest.tokenizer)), "").rpartition("/")[0]
    return ScriptFacts(
        path=path,
        tokenizer=str(train.root / stored) if stored else "",
        max_length=max(shards.manifest.max_length for shards in builds.values()),
        has_validation="validation" in builds,
    )


def _is_same(previous: dict[str, Any], identity: dict[str, Any], to: str) -> bool:
    return previous["sftprep_export"] == to and all(
        previous.get(name) == value for name, value in identity.items()
    )


def _write_splits(
    work: Path, builds: dict[str, Shards], target: Target, progress: Progress
) -> list[ExportedSplit]:
    """Write each split to its folder."""
    total, done = sum(map(len, builds.values())), 0
    splits = []
    for name, shards in builds.items():
        (work / name).mkdir()

        def advance(packs: int, done: int = done) -> None:
            progress("export", done + packs, total)

        splits.append(_write_split(work / name, name, shards, target, advance))
        done += len(shards)
    return splits


def _write_split(
    folder: Path, name: str, shards: Shards, target: Target, advance: Callable[[int], None]
) -> ExportedSplit:
    """Write a split, and compare what was written with the manifest.

    Raises:
        ConfigError: The format cannot express a pack.
        ShardError: A shard is damaged, or has other tokens than its manifest says.
    """
    rows = sequences = tokens = trained = 0
    writer = target.open_writer(folder)
    try:
        for number, pack in enumerate(shards, 1):
            check_weights(pack, target)
            target.check(pack, shards.manifest)
            for row in target.to_rows(pack):
                writer.add(row)
                rows += 1
            sequences += len(pack.seq_lengths)
            tokens += len(pack.input_ids)
            trained += int(find_targets(pack).sum())
            advance(number)
        writer.close()
    except BaseException:
        writer.abort()
        raise
    listed = shards.manifest
    if (tokens, trained) != (listed.tokens, listed.trained_tokens):
        raise ShardError(
            f"{shards.root} has {format_count(tokens, 'token')}, of which {trained:,} are trained,"
            f" and its manifest says {listed.tokens:,} and {listed.trained_tokens:,}",
            remedy="build it again",
        )
    return ExportedSplit(name, rows, sequences, tokens, trained)


def _report(
    content: dict[str, Any], target: Target, root: Path, script: str, *, is_up_to_date: bool
) -> ExportReport:
    sizes: dict[str, int] = content["files"]
    return ExportReport(
        target=target.name,
        output=str(root),
        splits=tuple(ExportedSplit(**split) for split in content["splits"]),
        files=len(sizes) + 1,
        bytes=sum(sizes.values()) + (root / EXPORT_NAME).stat().st_size,
        script=script,
        is_up_to_date=is_up_to_date,
    )

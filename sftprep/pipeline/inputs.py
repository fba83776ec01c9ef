"""The inputs of a build: what each source names, found, and marked as training or evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from sftprep.config.build import BuildConfig, SourceEntry
from sftprep.errors import ConfigError
from sftprep.sources.discovery.file_types import kind_of
from sftprep.sources.discovery.files import find_files, reject_duplicates
from sftprep.sources.discovery.hub import HubFile, hub_files, is_hub_name
from sftprep.sources.partition import Source
from sftprep.sources.readers.lines import convert_os_errors

Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Input:
    """One file of a build, or data from memory. entry: number of its source; stamp: None for what
    has no file."""

    source: Source
    entry: int
    stamp: Stamp | None
    evaluation: bool = False


def find_inputs(
    config: BuildConfig, data: Sequence[Source] = (), eval_data: Sequence[Source] = ()
) -> tuple[list[Input], list[SourceEntry]]:
    """All inputs, those to train on first, and the sources that they belong to.

    data, eval_data: sources in memory, used instead of what the config names. Raises InputNotFound,
    FormatError, ConfigError, HubError.
    """
    entries: list[SourceEntry] = []
    inputs: list[Input] = []
    for evaluation, memory in ((False, data), (True, eval_data)):
        asked = config.evaluation.eval_input or config.evaluation.eval_split
        if memory:
            for source in memory:
                inputs.append(
                    Input(_limited(source, config, len(entries)), len(entries), None, evaluation)
                )
                entries.append(SourceEntry((source.name,)))
            continue
        for entry in (config.eval_entries() if asked else ()) if evaluation else config.entries():
            inputs += (
                Input(s, len(entries), stamp(s.file), evaluation)
                for s in _sources(entry, len(entries), config, evaluation=evaluation)
            )
            entries.append(entry)
    if not inputs or inputs[0].evaluation:
        raise ConfigError(
            "no input is given",
            remedy="name a .jsonl file, a glob or a folder: sftprep build data.jsonl ...",
        )
    held = config.evaluation.eval_fraction or any(each.evaluation for each in inputs)
    if config.evaluation.eval_packing is not None and not held:
        raise ConfigError(
            "--eval-packing is given, and no evaluation records are",
            remedy="give --eval-fraction 0.05, say",
        )
    reject_duplicates([each.source.file for each in inputs if each.stamp is not None])
    return inputs, entries


def stamp(file: str) -> Stamp:
    """Return size, times and inode of a file: another stamp is another content.

    Programs can set the time of the content back (`cp -p`, `rsync -t`); they cannot set that of the
    inode. Stamps are only compared within one build, so inputs may be copied between a build that
    was interrupted and its resumption.

    Raises:
        InputUnreadable: it was removed, or may not be looked at.
    """
    with convert_os_errors(file):
        status = os.stat(file)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _sources(
    entry: SourceEntry, number: int, config: BuildConfig, *, evaluation: bool
) -> list[Source]:
    # With --eval-split, each source is searched once for each of the two splits.
    other_split = config.evaluation.eval_split
    if evaluation and other_split is not None:
        other_split = config.read.split or "train"
    files: list[HubFile] = []
    for name in entry.inputs:
        if is_hub_name(name):
            files += hub_files(
                name, config_name=entry.config_name, split=entry.split, revision=entry.revision
            )
        else:
            found = find_files(
                (name,), entry.split, output=config.output.output, other_split=other_split
            )
            files += (HubFile(file, file) for file in found)
    strip = bool(entry.strip_nulls)
    return [
        Source(f.name, kind_of(f.path) or "lines", entry.limit, number, strip, path=f.path)
        for f in files
    ]


def _limited(source: Source, config: BuildConfig, number: int) -> Source:
    return Source(
        source.name, source.kind, config.read.limit, number, config.read.strip_nulls, source.blocks
    )

"""Inputs of a build: the files of each source."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sftprep.config.build import BuildConfig, SourceEntry
from sftprep.config.validation import is_url
from sftprep.errors import ConfigError, InputChanged, InputUnreadable, setting
from sftprep.sources.discovery.files import reject_duplicates
from sftprep.sources.discovery.inputs import files_of_input
from sftprep.sources.partition import Source, source_of
from sftprep.sources.readers.lines import convert_os_errors
from sftprep.stores.folder import Mark, marks_of

Stamp = tuple[int, int, int, int] | Mark
"""Size, modification time, change time and inode of a file; for an object in a store, its mark."""

InputMark = tuple[int, int] | Mark | str
"""What is recorded of an input between builds: size and modification time of a file, or the mark of
an object in a store. Data in memory has a random mark, which no other build knows."""


@dataclass(frozen=True, slots=True)
class Input:
    """One file of a build, or data in memory.

    Attributes:
        source: The file or data, for the readers.
        entry: The index of its entry in the list of sources.
        stamp: The stamp of the file when it was found; None for data in memory.
        evaluation: Whether the records are for evaluation.
    """

    source: Source
    entry: int
    stamp: Stamp | None
    evaluation: bool = False

    @property
    def mark(self) -> InputMark:
        """The mark of the file, or another one each time for data in memory."""
        if self.stamp is None:
            return secrets.token_hex(16)
        return self.stamp if isinstance(self.stamp, Mark) else self.stamp[:2]


def find_inputs(
    config: BuildConfig, data: Sequence[Source] = (), eval_data: Sequence[Source] = ()
) -> tuple[list[Input], list[SourceEntry]]:
    """Find all inputs of a build.

    Args:
        config: The settings of the build.
        data: Training data in memory, used instead of the inputs in the settings.
        eval_data: Evaluation data in memory, likewise.

    Returns:
        The inputs, the training inputs first; and the entries to which they belong.

    Raises:
        ConfigError: No input is named, or one is named twice.
        InputNotFound: A path matches nothing.
        FormatError: A file has an unsupported type.
        HubError: A dataset on the Hub cannot be found.
    """
    entries: list[SourceEntry] = []
    inputs: list[Input] = []
    has_eval_setting = bool(config.evaluation.eval_input or config.evaluation.eval_split)
    for evaluation, memory in ((False, data), (True, eval_data)):
        # Data in memory replaces the inputs in the settings; each of its sources is an entry.
        if memory:
            for data_source in memory:
                source = _with_read_settings(data_source, config, len(entries))
                inputs.append(Input(source, len(entries), None, evaluation))
                entries.append(SourceEntry((source.name,)))
            continue
        if evaluation:
            found_entries = config.eval_entries() if has_eval_setting else ()
        else:
            found_entries = config.entries()
        for entry in found_entries:
            inputs += (
                Input(source, len(entries), mark or stamp(source.file), evaluation)
                for source, mark in _find_sources(
                    entry, len(entries), config, evaluation=evaluation
                )
            )
            entries.append(entry)
    # The training inputs are first, so the first one is for evaluation only if there are none.
    if not inputs or inputs[0].evaluation:
        raise ConfigError(
            "no input is specified",
            remedy="name a .jsonl file, a glob or a folder: sftprep build data.jsonl ...",
        )
    has_evaluation = config.evaluation.eval_fraction or any(each.evaluation for each in inputs)
    if config.evaluation.eval_packing is not None and not has_evaluation:
        raise ConfigError(
            f"{setting('eval_packing')} is specified, but there are no evaluation records",
            remedy=f"specify them, for example with {setting('eval_fraction', 0.05)}",
        )
    reject_duplicates([each.source.file for each in inputs if each.stamp is not None])
    return inputs, entries


def stamp(file: str) -> Stamp:
    """Return the stamp of a file; a file with another stamp has other content.

    Programs can restore the modification time (`cp -p`, `rsync -t`), but not the change time of the
    inode. Stamps are compared only within one build, so inputs may be copied between an interrupted
    build and its resumption.

    Raises:
        InputUnreadable: The file was removed, or is not accessible.
    """
    with convert_os_errors(file):
        status = os.stat(file)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _find_sources(
    entry: SourceEntry, number: int, config: BuildConfig, *, evaluation: bool
) -> list[tuple[Source, Mark | None]]:
    # With eval_split, a source is searched once for each of its two splits, and the search must
    # know the other split to tell the files apart.
    other_split = config.evaluation.eval_split
    if evaluation and other_split is not None:
        other_split = config.read.split or "train"
    is_text = entry.format_config(config.format).format == "text"
    text_unit = entry.text_unit if is_text else None
    files = [
        file
        for name in entry.inputs
        for file in files_of_input(
            name,
            split=entry.split,
            config_name=entry.config_name,
            revision=entry.revision,
            output=config.output.output or None,
            other_split=other_split,
            text_unit=text_unit,
        )
    ]
    strip = bool(entry.strip_nulls)
    return [
        (
            dataclasses.replace(
                source_of(f.path, text_unit),
                name=f.name,
                limit=entry.limit,
                group=number,
                strip_nulls=strip,
                path=f.path,
                size=f.mark and f.mark.size,
            ),
            f.mark,
        )
        for f in files
    ]


def _with_read_settings(source: Source, config: BuildConfig, number: int) -> Source:
    """Apply the settings of all sources to a source in memory."""
    return dataclasses.replace(
        source, limit=config.read.limit, group=number, strip_nulls=config.read.strip_nulls
    )


def absolute_path(source: Source) -> str:
    """Return the path of a file from the root folder, or the URL of an object in a store."""
    return source.file if is_url(source.file) else os.path.abspath(source.file)


def check_unchanged(inputs: Iterable[Input]) -> None:
    """Raise InputChanged if an input file changed since the setup."""
    _check_stamps([(each.source, each.stamp) for each in inputs if each.stamp is not None])


def check_files_unchanged(files: Iterable[tuple[Source, InputMark]]) -> None:
    """Raise InputChanged if one of the files has another mark."""
    _check_stamps([(source, mark) for source, mark in files if not isinstance(mark, str)])


def _check_stamps(files: Sequence[tuple[Source, Stamp | tuple[int, int]]]) -> None:
    """Raise InputChanged if the stamp of a file does not start with the expected numbers."""
    marks = marks_of(source.file for source, expected in files if isinstance(expected, Mark))
    for source, expected in files:
        try:
            if isinstance(expected, Mark):
                is_unchanged = marks.get(source.file) == expected
            else:
                is_unchanged = stamp(source.file)[: len(expected)] == expected
        except InputUnreadable as error:
            raise InputChanged(
                f"{source.name} was removed or replaced while the build ran",
                remedy="put the file back or omit it, and run the build again",
            ) from error
        if not is_unchanged:
            raise InputChanged(
                f"{source.name} changed while the build ran",
                remedy="run the build again when no process writes to the file",
            )

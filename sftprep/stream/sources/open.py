"""Opening of sources: paths, datasets, lists, record functions and mixtures.

Each `_open_...` function takes the number of its first part and returns the source and the number
of the first part after it, so that origins are unique over all inputs.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sftprep.config.build import BuildConfig
from sftprep.config.user_functions import resolve_function
from sftprep.config.validation import TextUnit
from sftprep.errors import ConfigError
from sftprep.pipeline.prepare.setup import inspect_source, log_notices
from sftprep.recipe import Recipe
from sftprep.sources.discovery.files import reject_duplicates
from sftprep.sources.discovery.hub import FoundFile
from sftprep.sources.discovery.inputs import files_of_input
from sftprep.sources.in_memory import dataset_kind
from sftprep.sources.lanes import block_bytes, is_plain
from sftprep.sources.partition import cut, read_partition, source_of
from sftprep.sources.readers.lines import file_size, reject_shorter
from sftprep.sources.readers.to_jsonl import iter_lines
from sftprep.stores.folder import Mark
from sftprep.stream.sources.base import Source
from sftprep.stream.sources.chained import Chain
from sftprep.stream.sources.hf_iterable import DATASET_NAME, ShardedDataset, can_resume_exactly
from sftprep.stream.sources.line_files import LineFiles, reject_changed
from sftprep.stream.sources.mixture import Mixture, OpenedMixture
from sftprep.stream.sources.sequential import Lines, Rows

_PARTITION_BYTES = 1 << 20
"""Partitions of a file that is read from its start; small, since the rest of one is read again
after an error."""
_OBJECT_PARTITION_BYTES = 8 << 20
"""The same for an object in a store, for each of which its mark is requested."""


def open_source(source: Any, config: BuildConfig, recipe: Recipe) -> Source:
    """Open the source of a stream, and read its first records to detect their format.

    Args:
        source: Paths, globs, folders or names on the Hub; a `datasets.Dataset` or
            `IterableDataset`; a sequence of records; a function that returns a new iterator over
            the same records at each call; or a `Mixture` of these.
        config: The settings.
        recipe: The recipe of the stream.

    Raises:
        ConfigError: The source is something else.
        SftprepError: An input is missing or unreadable, or its format is not detected.
    """
    return _open(source, config, recipe, 0)[0]


def _open(source: Any, config: BuildConfig, recipe: Recipe, part: int) -> tuple[Source, int]:
    if isinstance(source, Mixture):
        return _open_mixture(source, config, recipe, part)
    if isinstance(source, (str, os.PathLike)):
        return _open_files((os.fspath(source),), config, recipe, part)
    if (
        isinstance(source, Sequence)
        and source
        and all(isinstance(item, (str, os.PathLike)) for item in source)
    ):
        return _open_files(tuple(os.fspath(item) for item in source), config, recipe, part)
    if hasattr(source, "num_shards") and hasattr(source, "load_state_dict"):
        return _open_iterable_dataset(source, config, recipe, part)
    strip_nulls = config.read.strip_nulls
    if callable(source):
        _reject_same_iterator(source)
        lines: Lines = FunctionLines(source, strip_nulls)
        return _open_rows(lines, _name_of_function(source), None, config, recipe, part)
    if (
        hasattr(source, "__getitem__")
        and hasattr(source, "__len__")
        and not isinstance(source, Mapping)
    ):
        lines = SequenceLines(source, strip_nulls)
        return _open_rows(lines, f"{len(source):,} records", len(source), config, recipe, part)
    raise ConfigError(
        f"a stream cannot be created from a {type(source).__name__}",
        remedy=(
            "pass paths, a dataset, a list of records, or a function that returns a new iterator"
            " over them at each call"
        ),
    )


def _open_mixture(
    mixture: Mixture, config: BuildConfig, recipe: Recipe, part: int
) -> tuple[Source, int]:
    sources, first_parts = [], []
    settings = mixture.transforms or (None,) * len(mixture.sources)
    transforms = tuple(resolve_function(setting) for setting in settings)
    recipes = [dataclasses.replace(recipe, transform=f or recipe.transform) for f in transforms]
    for item, recipe_of_item in zip(mixture.sources, recipes, strict=True):
        first_parts.append(part)
        source, part = _open(item, config, recipe_of_item, part)
        sources.append(source)
    return OpenedMixture(
        tuple(sources),
        tuple(float(weight) for weight in mixture.weights),
        mixture.stop,
        tuple(first_parts),
        transforms,
        tuple(each.cache_key for each in recipes) if any(transforms) else (),
        mixture.mix_by,
    ), part


def _open_files(
    names: tuple[str, ...], config: BuildConfig, recipe: Recipe, part: int
) -> tuple[Source, int]:
    """Open the files matched by the names; each file is a part.

    Consecutive plain files are one source, so that the blocks of all of them are shuffled together.
    """
    strip_nulls = config.read.strip_nulls
    files = [file for name in names for file in _find_files(name, config)]
    reject_duplicates([file.path for file in files])
    sizes = [file_size(file.path) if file.mark is None else file.mark.size for file in files]
    lines = [
        FileLines(file.path, strip_nulls, size, _text_unit(config), file.mark)
        for file, size in zip(files, sizes, strict=True)
    ]
    readings = [
        inspect_source(
            file.name,
            file_lines(0, 0),
            config,
            recipe,
            is_table=source_of(file.path).is_table and not strip_nulls,
        )
        for file, file_lines in zip(files, lines, strict=True)
    ]
    log_notices([file.name for file in files], readings)
    formats = [reading.format for reading in readings]
    # Nulls are removed record by record, so such files are not read by blocks.
    is_block_file = [is_plain(file.path) and not strip_nulls for file in files]
    block = block_bytes(
        [size for size, file in zip(sizes, files, strict=True) if is_plain(file.path)],
        config.pack.lanes,
    )
    sources: list[Source] = []
    first_parts: list[int] = []
    at = 0
    while at < len(files):
        end = at + 1
        while is_block_file[at] and end < len(files) and is_block_file[end]:
            end += 1
        if is_block_file[at]:
            source: Source = LineFiles(
                tuple(file.path for file in files[at:end]),
                tuple(file.name for file in files[at:end]),
                tuple(formats[at:end]),
                tuple(sizes[at:end]),
                block,
                part + at,
                tuple(file.mark for file in files[at:end]),
            )
        else:
            facts = files[at].mark or sizes[at]
            source = Rows(lines[at], files[at].name, formats[at], part + at, facts)
        sources.append(source)
        first_parts.append(part + at)
        at = end
    source = sources[0] if len(sources) == 1 else Chain(tuple(sources), tuple(first_parts))
    return source, part + len(files)


def _find_files(name: str, config: BuildConfig) -> list[FoundFile]:
    read = config.read
    return files_of_input(
        name,
        split=read.split,
        config_name=read.config_name,
        revision=read.revision,
        text_unit=_text_unit(config),
    )


def _text_unit(config: BuildConfig) -> TextUnit | None:
    """Return what a record of plain text is, or None if such files are not read."""
    return config.read.text_unit if config.format.format == "text" else None


def _open_iterable_dataset(
    data: Any, config: BuildConfig, recipe: Recipe, part: int
) -> tuple[Source, int]:
    strip_nulls = config.read.strip_nulls
    if data.num_shards < config.pack.lanes:
        # A copy, since iterating changes the state and the epoch of the dataset.
        lines = DatasetLines(copy.copy(data), strip_nulls)
        return _open_rows(lines, DATASET_NAME, int(data.num_shards), config, recipe, part)
    name = _format_of(DATASET_NAME, iter_lines(data), config, recipe)
    return ShardedDataset(data, name, strip_nulls, part), part + config.pack.lanes


def _open_rows(
    lines: Lines, name: str, facts: Any, config: BuildConfig, recipe: Recipe, part: int
) -> tuple[Source, int]:
    is_table = isinstance(lines, SequenceLines) and dataset_kind(lines.records) == "Dataset"
    format_name = _format_of(name, lines(0, 0), config, recipe, is_table=is_table)
    return Rows(lines, name, format_name, part, facts), part + 1


def _format_of(
    name: str,
    lines: Iterable[bytes],
    config: BuildConfig,
    recipe: Recipe,
    *,
    is_table: bool = False,
) -> str:
    """Return the format of a source, and log what the user should know about it."""
    is_table = is_table and not config.read.strip_nulls
    reading = inspect_source(name, lines, config, recipe, is_table=is_table)
    log_notices([name], [reading])
    return reading.format


# Functions of type `Lines`: they return the lines of an epoch from a number on. They are classes,
# since they are pickled for loader workers.


@dataclass(frozen=True)
class FileLines:
    """The lines or rows of a file.

    Earlier partitions of a table are skipped without reading them.

    Attributes:
        file: The path.
        strip_nulls: Whether keys with the value null are removed.
        size: The size of the file in bytes when the stream was created. Reading raises
            InputChanged if the file has become shorter.
        text_unit: What a record of plain text is; None if such files are not read.
        mark: The mark of an object in a store at that time; None for a file. Reading raises
            InputChanged if it has another one.
    """

    file: str
    strip_nulls: bool = False
    size: int = 0
    text_unit: TextUnit | None = None
    mark: Mark | None = None

    def __call__(self, _epoch: int, start: int) -> Iterator[bytes]:
        at = 0
        self._check_unchanged()  # first: another object may not even be of the same kind
        source = dataclasses.replace(
            source_of(self.file, self.text_unit),
            strip_nulls=self.strip_nulls,
            size=self.mark and self.mark.size,
        )
        size = _PARTITION_BYTES if self.mark is None else _OBJECT_PARTITION_BYTES
        for partition in cut([source], size):
            if partition.kind in ("parquet", "arrow") and partition.end <= start:
                at = partition.end
                continue
            data = read_partition(partition)
            self._check_unchanged()
            for line in _split_lines(data):
                if at >= start:
                    yield line
                at += 1
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if self.mark is None:
            reject_shorter(self.file, file_size(self.file), self.size)
        else:
            reject_changed({self.file: self.mark})


@dataclass(frozen=True)
class FunctionLines:
    """The records of a function, called again for each pass."""

    function: Callable[[], Iterable[Mapping[str, Any]]]
    strip_nulls: bool = False

    def __call__(self, _epoch: int, start: int) -> Iterator[bytes]:
        return iter_lines(islice(iter(self.function()), start, None), strip_nulls=self.strip_nulls)


@dataclass(frozen=True)
class SequenceLines:
    """The records of a list or a `datasets.Dataset`, by index."""

    records: Any
    strip_nulls: bool = False

    def __call__(self, _epoch: int, start: int) -> Iterator[bytes]:
        rows = (self.records[k] for k in range(start, len(self.records)))
        return iter_lines(rows, strip_nulls=self.strip_nulls)


@dataclass(frozen=True)
class DatasetLines:
    """The records of a `datasets.IterableDataset`, in one markable sequence."""

    data: Any
    strip_nulls: bool = False

    def __call__(self, epoch: int, start: int) -> Iterator[bytes]:
        self.data.load_state_dict(None)
        return self._iter_lines(epoch, start)

    def mark(self) -> Any:
        return copy.deepcopy(self.data.state_dict()) if can_resume_exactly(self.data) else None

    def resume(self, epoch: int, state: Any) -> Iterator[bytes]:
        self.data.load_state_dict(copy.deepcopy(state))
        return self._iter_lines(epoch, 0)

    def _iter_lines(self, epoch: int, start: int) -> Iterator[bytes]:
        self.data.set_epoch(epoch)
        return iter_lines(islice(iter(self.data), start, None), strip_nulls=self.strip_nulls)


def _reject_same_iterator(function: Callable[[], Any]) -> None:
    """Raise ConfigError if a function returns the same iterator at each call.

    The records that one pass has read would be missing in the next pass.
    """
    returned = function()
    if isinstance(returned, Iterator) and function() is returned:
        raise ConfigError(
            f"the function {_name_of_function(function)} returns the same iterator each time",
            remedy=(
                "create the iterator inside the function: a stream reads its records again in each"
                " pass, and after a resume"
            ),
        )


def _name_of_function(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _split_lines(data: bytes) -> Iterator[bytes]:
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return (line + b"\n" for line in lines)

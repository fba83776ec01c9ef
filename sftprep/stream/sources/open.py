"""What a stream can be made of: paths, data sets, functions that give records, and mixtures of
them."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sftprep.config.build import BuildConfig
from sftprep.errors import ConfigError
from sftprep.pipeline.setup import format_of
from sftprep.recipe import Recipe
from sftprep.sources.discovery.files import find_files, reject_duplicates
from sftprep.sources.discovery.hub import HubFile, hub_files, is_hub_name
from sftprep.sources.lanes import block_bytes, is_plain
from sftprep.sources.partition import cut, read_partition, source_of
from sftprep.sources.peek import RECORDS_TO_INSPECT, first_records
from sftprep.sources.readers.lines import file_size, reject_shorter
from sftprep.sources.readers.to_jsonl import iter_lines
from sftprep.stream.sources.base import LineFiles, Source
from sftprep.stream.sources.chained import Chain
from sftprep.stream.sources.hf_iterable import ShardedDataset, goes_on_exactly
from sftprep.stream.sources.mixture import Mixed, Mixture
from sftprep.stream.sources.sequential import Lines, Rows

_PIECE = 1 << 20


def open_source(given: Any, config: BuildConfig, recipe: Recipe) -> Source:
    """A source for what the user gave; its first records are looked at.

    given: paths, globs, folders or names on the Hub; a `datasets.Dataset` or `IterableDataset`; a
    sequence of records; a function that returns a new iterator over the records each time, the same
    ones; a Mixture of such. Raises ConfigError for anything else, and what reading and detecting
    formats raise.
    """
    return _opened(given, config, recipe, 0)[0]


def _opened(given: Any, config: BuildConfig, recipe: Recipe, part: int) -> tuple[Source, int]:
    """The source, and the number of the first part after it."""
    if isinstance(given, Mixture):
        sources, firsts = [], []
        for one in given.sources:
            firsts.append(part)
            source, part = _opened(one, config, recipe, part)
            sources.append(source)
        return (
            Mixed(
                tuple(sources), tuple(float(w) for w in given.weights), given.stop, tuple(firsts)
            ),
            part,
        )
    if isinstance(given, (str, os.PathLike)):
        return _files((os.fspath(given),), config, recipe, part)
    if (
        isinstance(given, Sequence)
        and given
        and all(isinstance(one, (str, os.PathLike)) for one in given)
    ):
        return _files(tuple(os.fspath(one) for one in given), config, recipe, part)
    if hasattr(given, "num_shards") and hasattr(given, "load_state_dict"):
        return _iterable_dataset(given, config, recipe, part)
    if callable(given):
        _refuse_one_iterator(given)
        return _rows(
            FunctionLines(given, config.read.strip_nulls),
            _called(given),
            None,
            config,
            recipe,
            part,
        )
    if (
        hasattr(given, "__getitem__")
        and hasattr(given, "__len__")
        and not isinstance(given, Mapping)
    ):
        return _rows(
            SequenceLines(given, config.read.strip_nulls),
            f"{len(given):,} records",
            len(given),
            config,
            recipe,
            part,
        )
    raise ConfigError(
        f"a stream cannot be made of a {type(given).__name__}",
        remedy=(
            "give paths, a data set, a list of records, or a function that returns a new iterator"
            " over them each time"
        ),
    )


def _files(
    names: tuple[str, ...], config: BuildConfig, recipe: Recipe, part: int
) -> tuple[Source, int]:
    """Plain files of lines side by side are one source, so that a shuffled pass mixes them all."""
    strip = config.read.strip_nulls
    found = [file for name in names for file in _found(name, config)]
    reject_duplicates([file.path for file in found])
    sizes = [file_size(file.path) for file in found]
    lines = [FileLines(file.path, strip, size) for file, size in zip(found, sizes, strict=True)]
    formats = [
        format_of(file.name, first_records(each(0, 0)), config, recipe)
        for file, each in zip(found, lines, strict=True)
    ]
    plain = [is_plain(file.path) and not strip for file in found]
    block = block_bytes(
        [size for size, file in zip(sizes, found, strict=True) if is_plain(file.path)],
        config.pack.lanes,
    )
    sources: list[Source] = []
    firsts: list[int] = []
    at = 0
    while at < len(found):
        end = at + 1
        while plain[at] and end < len(found) and plain[end]:
            end += 1
        if plain[at]:
            paths, shown = (
                tuple(file.path for file in found[at:end]),
                tuple(file.name for file in found[at:end]),
            )
            sources.append(
                LineFiles(
                    paths, shown, tuple(formats[at:end]), tuple(sizes[at:end]), block, part + at
                )
            )
        else:
            sources.append(Rows(lines[at], found[at].name, formats[at], part + at, sizes[at]))
        firsts.append(part + at)
        at = end
    return (sources[0] if len(sources) == 1 else Chain(tuple(sources), tuple(firsts))), part + len(
        found
    )


def _found(name: str, config: BuildConfig) -> list[HubFile]:
    read = config.read
    if is_hub_name(name):
        return hub_files(
            name, config_name=read.config_name, split=read.split, revision=read.revision
        )
    return [HubFile(file, file) for file in find_files((name,), read.split)]


def _iterable_dataset(
    given: Any, config: BuildConfig, recipe: Recipe, part: int
) -> tuple[Source, int]:
    if given.num_shards < config.pack.lanes:
        return _rows(
            DatasetLines(copy.copy(given), config.read.strip_nulls),
            "the data set",
            int(given.num_shards),
            config,
            recipe,
            part,
        )
    name = format_of(
        "the data set",
        (dict(row) for row in islice(iter(given), RECORDS_TO_INSPECT)),
        config,
        recipe,
    )
    return ShardedDataset(given, name, config.read.strip_nulls, part), part + config.pack.lanes


def _rows(
    lines: Lines, name: str, known: Any, config: BuildConfig, recipe: Recipe, part: int
) -> tuple[Source, int]:
    return (
        Rows(lines, name, format_of(name, first_records(lines(0, 0)), config, recipe), part, known),
        part + 1,
    )


# Each of these gives the lines of an epoch from a number on. They are classes because they travel
# to loader workers.


@dataclass(frozen=True)
class FileLines:
    """Lines or rows of a file; ranges of a table that come before are not read.

    strip_nulls: leave out keys with null; size: bytes when the stream was made. Raises InputChanged
    where the file is shorter than that.
    """

    file: str
    strip_nulls: bool = False
    size: int = 0

    def __call__(self, _epoch: int, first: int) -> Iterator[bytes]:
        at = 0
        source = dataclasses.replace(source_of(self.file), strip_nulls=self.strip_nulls)
        for partition in cut([source], _PIECE):
            if partition.kind in ("parquet", "arrow") and partition.end <= first:
                at = partition.end
                continue
            data = read_partition(partition)
            self._check()
            for line in _whole_lines(data):
                if at >= first:
                    yield line
                at += 1
        self._check()

    def _check(self) -> None:
        reject_shorter(self.file, file_size(self.file), self.size)


@dataclass(frozen=True)
class FunctionLines:
    """Records that a function gives, which is called anew for each pass."""

    function: Callable[[], Iterable[Mapping[str, Any]]]
    strip_nulls: bool = False

    def __call__(self, _epoch: int, first: int) -> Iterator[bytes]:
        return iter_lines(islice(iter(self.function()), first, None), strip_nulls=self.strip_nulls)


@dataclass(frozen=True)
class SequenceLines:
    """Records by number: a list, or a `datasets.Dataset`."""

    records: Any
    strip_nulls: bool = False

    def __call__(self, _epoch: int, first: int) -> Iterator[bytes]:
        rows = (self.records[k] for k in range(first, len(self.records)))
        return iter_lines(rows, strip_nulls=self.strip_nulls)


@dataclass(frozen=True)
class DatasetLines:
    """A `datasets.IterableDataset`, as one row of records that can be marked."""

    data: Any
    strip_nulls: bool = False

    def __call__(self, epoch: int, first: int) -> Iterator[bytes]:
        self.data.load_state_dict(None)
        return self._lines(epoch, first)

    def mark(self) -> Any:
        return copy.deepcopy(self.data.state_dict()) if goes_on_exactly(self.data) else None

    def go_on(self, epoch: int, state: Any) -> Iterator[bytes]:
        self.data.load_state_dict(copy.deepcopy(state))
        return self._lines(epoch, 0)

    def _lines(self, epoch: int, first: int) -> Iterator[bytes]:
        self.data.set_epoch(epoch)
        return iter_lines(islice(iter(self.data), first, None), strip_nulls=self.strip_nulls)


def _refuse_one_iterator(function: Callable[[], Any]) -> None:
    """Raise ConfigError where a function gives the same iterator each time: what one pass has read,
    the next would lack."""
    made = function()
    if isinstance(made, Iterator) and function() is made:
        raise ConfigError(
            f"the function {_called(function)} gives the same iterator each time",
            remedy=(
                "make the iterator inside the function: a stream reads its records anew in each"
                " pass, and after a resume"
            ),
        )


def _called(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _whole_lines(data: bytes) -> Iterator[bytes]:
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return (line + b"\n" for line in lines)

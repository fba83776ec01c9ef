"""User-provided datasets: their kinds, and their rows as a rereadable source."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import sftprep
from sftprep.errors import ConfigError
from sftprep.shards import is_finished_build
from sftprep.stores import is_url, list_files
from sfttrain.data.streaming import is_stream
from sfttrain.data.token_rows import IndexedRows, has_packed_tokens, has_tokens

HUB_PREFIX = "hf://"
"""The start of the URL of a data set on the Hub."""
_VALID_DATASETS = (
    "pass a datasets.Dataset or IterableDataset, a list of dictionaries, the path of a file of"
    " records, or the folder of a build of `sftprep build`"
)


def is_packs(source: Any) -> bool:
    """Return whether a source holds packs: by index, or as a stream."""
    return callable(getattr(source, "seq_lengths", None)) or is_stream(source)


def is_build(source: Any) -> bool:
    """Return whether a source is the path of a finished build."""
    return isinstance(source, (str, os.PathLike)) and is_finished_build(source)


def open_build(folder: str | os.PathLike[str], max_length: int | None) -> sftprep.Shards:
    """Open the packs of a build.

    Args:
        folder: The folder of the build, or its URL.
        max_length: The requested length of packs, for a build whose packs are planned while they
            are read (layout `sequences`); None for that of the build.

    Raises:
        ManifestError: The folder is not a finished build.
        ShardError: A shard is missing or has another size.
    """
    if max_length is None or sftprep.read_manifest(folder).layout == "packs":
        return sftprep.open_shards(folder)
    return sftprep.open_shards(folder, max_length=max_length)


def to_row_source(source: Any, name: str) -> Any:
    """Convert a dataset to a source with repeatable iteration.

    Args:
        source: The dataset. One that has rows only by index, such as a torch Dataset, is wrapped
            in a sequence; every other dataset is returned unchanged.
        name: The name of the dataset in messages.

    Raises:
        ConfigError: If the rows can be read only once, as those of a generator. The check of the
            first rows would remove them from the training, and each process of a run needs its own
            iteration.
    """
    if source is None or is_packs(source) or isinstance(source, (str, bytes, PurePath, Mapping)):
        return source
    if isinstance(source, Iterable):
        # An iterator returns itself; a source of several iterations returns a new iterator.
        if iter(source) is iter(source):
            raise ConfigError(
                f"{name} is a {type(source).__name__}, which can be read once only",
                remedy=[
                    f"pass list({name})",
                    "use datasets.Dataset.from_generator with the generator function",
                ],
            )
        return source
    if not hasattr(source, "__getitem__"):
        return source
    if not hasattr(source, "__len__"):
        raise ConfigError(
            f"{name} is a {type(source).__name__} that does not say how many rows it has",
            remedy=["give its class a __len__ method", "convert it to a datasets.Dataset"],
        )
    return BoundedRows(source)


class BoundedRows(Sequence[Any]):
    """Rows of a dataset, bounded even if its `__getitem__` is not.

    The `__getitem__` of a dataset may accept an index past the last row.
    """

    def __init__(self, rows: IndexedRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any, /) -> Any:
        """Return one row; raise IndexError past the last row to end an iteration."""
        if not -len(self._rows) <= index < len(self._rows):
            raise IndexError(index)
        return self._rows[index % len(self._rows)]


def needs_tokenizer(source: Any, *, skip_prepare: bool) -> bool:
    """Return whether a dataset must be tokenized.

    Args:
        source: The dataset.
        skip_prepare: Whether tokenized rows are used as they are (skip_prepare_dataset).
    """
    if source is None or is_packs(source) or is_build(source):
        return False
    if isinstance(source, (str, os.PathLike, Mapping)) or not hasattr(source, "__iter__"):
        return True
    first = next(iter(source), None)
    return not (
        isinstance(first, Mapping)
        and (has_packed_tokens(first) or (skip_prepare and has_tokens(first)))
    )


def first_row(source: Any, name: str) -> Mapping[str, Any]:
    """Return the first row of a dataset.

    Args:
        source: The dataset.
        name: The name of the dataset in messages.

    Raises:
        ConfigError: If the dataset is empty, or if the first row is not a mapping.
    """
    try:
        first = next(iter(source), None)
    except TypeError as error:
        raise ConfigError(
            f"{name} is a {type(source).__name__}, which holds no rows", remedy=_VALID_DATASETS
        ) from error
    if first is None:
        raise ConfigError(
            f"{name} holds no rows", remedy="check that it is the dataset that you meant"
        )
    if not isinstance(first, Mapping):
        raise ConfigError(
            f"{name} holds a {type(first).__name__} instead of a row", remedy=_VALID_DATASETS
        )
    return first


def select_split(source: Any, name: str) -> Any:
    """Return the split called train of a DatasetDict, or its only one.

    Any other source is returned unchanged. `name` is the name of the dataset in messages.
    """
    if not isinstance(source, Mapping):
        return source
    if "train" in source or len(source) == 1:
        return source["train"] if "train" in source else next(iter(source.values()))
    raise ConfigError(
        f"{name} has the splits {', '.join(map(str, source))}",
        remedy=f"choose one: {name}=dataset[SPLIT]",
    )


def file_stamps(path: str) -> list[Any] | None:
    """Return path, size and modification time of every file matching a path.

    Args:
        path: A file, a glob, or a folder, of which all files in it and its subfolders are taken;
            also as the URL of an object store.

    Returns:
        For each file, its absolute path, its size in bytes, and its modification time in
        nanoseconds; for each object in a store, its URL, size and tag. None if nothing matches,
        and for a data set on the Hub.

    Raises:
        ConfigError: The protocol of the URL is unknown.
        StorageError: The store cannot be reached.
    """
    if path.startswith(HUB_PREFIX):
        return None
    if is_url(path):
        return [[file.url, *file.mark] for file in list_files(path.rstrip("/"))] or None
    expanded = os.path.expanduser(path)
    matches = sorted(glob.glob(expanded)) or [expanded]  # a file can have brackets in its name
    files = [
        str(file)
        for match in matches
        for file in (
            sorted(p for p in Path(match).rglob("*") if p.is_file())
            if Path(match).is_dir()
            else [Path(match)]
        )
        if file.is_file()
    ]
    return [[os.path.abspath(f), os.path.getsize(f), os.stat(f).st_mtime_ns] for f in files] or None

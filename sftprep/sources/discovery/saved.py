"""Folders saved by `save_to_disk` of `Dataset` and `DatasetDict`.

Not every file in such a folder belongs to the data set: `map`, `filter` and `shuffle` write their
caches next to the data that they were loaded from, and a later save with fewer shards leaves the
old shards behind. The files of the data set are listed in `state.json`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from sftprep.errors import ConfigError, InputUnreadable, setting
from sftprep.sources.readers.lines import LARGEST_LINE, convert_os_errors, open_regular

STATE = "state.json"
"""The file that lists the files of a saved Dataset, under `_data_files`."""

SPLITS = "dataset_dict.json"
"""The file that lists the splits of a saved DatasetDict, each of which is a subfolder."""

_INFO = "dataset_info.json"


@dataclass(frozen=True, slots=True)
class SavedFolder:
    """The part of a folder of `datasets` to be read.

    Attributes:
        list_file: The path of the file that lists the members.
        members: The names of the data files, or of the chosen split, in the folder.
        split: The chosen split; None for a saved Dataset.
        skip_reason: The reason that is logged for everything else in the folder.
    """

    list_file: str
    members: frozenset[str]
    split: str | None
    skip_reason: str


def read_saved_folder(folder: str, split: str | None) -> SavedFolder | None:
    """Return the part of a folder to be read, or None if `datasets` did not save it.

    A folder with the lists of both kinds is a Dataset, as for `datasets.load_from_disk`.

    Args:
        folder: The path.
        split: The requested split; by default train, else the only split.

    Raises:
        InputUnreadable: The list is damaged, or names something outside of the folder.
        ConfigError: The requested split does not exist, or one must be chosen.
    """
    files = _saved_files(folder)
    if files is not None:
        skip_reason = f"not among the files that the {STATE} of a saved data set lists"
        return SavedFolder(os.path.join(folder, STATE), files, None, skip_reason)
    path = os.path.join(folder, SPLITS)
    if not os.path.isfile(path):
        return None
    chosen = choose_split(_saved_splits(path), split, f"the folder {folder}")
    skip_reason = f"not in the split {chosen!r} of a saved data set"
    return SavedFolder(path, frozenset([chosen]), chosen, skip_reason)


def choose_split(splits: list[str], split: str | None, where: str) -> str:
    """Return the requested split, else train, else the only split.

    Args:
        splits: The existing splits.
        split: The requested split, or None.
        where: What has the splits, for errors: "the folder data".

    Raises:
        ConfigError: The requested split does not exist, or one must be chosen.
    """
    example = setting("split", splits[0] if splits else None)
    if split is not None:
        if split not in splits:
            raise ConfigError(
                f"{where} has no split {split!r}",
                remedy=f"choose one of {', '.join(splits)}: {example}",
            )
        return split
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise ConfigError(
        f"{where} has the splits {', '.join(splits)}", remedy=f"choose one: {example}"
    )


def _saved_files(folder: str) -> frozenset[str] | None:
    """Return the names of the files of a saved Dataset, or None for any other folder."""
    path = os.path.join(folder, STATE)
    if not os.path.isfile(path):
        return None
    try:
        names = [str(entry["filename"]) for entry in _read_json(path)["_data_files"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        # Other programs write files of this name too; only next to the other file it is known to be
        # written by `datasets`.
        if not os.path.isfile(os.path.join(folder, _INFO)):
            return None
        raise InputUnreadable(
            f"{path} does not list the files of a data set",
            remedy="save the data set again, or specify the data files by their names",
        ) from error
    _check_inside(names, path, "file")
    return frozenset(names)


def _saved_splits(path: str) -> list[str]:
    """Return the splits of a saved DatasetDict."""
    try:
        names = [str(name) for name in _read_json(path)["splits"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputUnreadable(
            f"{path} does not list the splits of a data set", remedy="save the data set again"
        ) from error
    _check_inside(names, path, "split")
    return names


def _read_json(path: str) -> Any:
    # A file with more bytes is not a list of files: then it is cut off, and its JSON is invalid.
    with convert_os_errors(path), open_regular(path) as file:
        return json.loads(file.read(LARGEST_LINE))


def _check_inside(names: list[str], path: str, what: str) -> None:
    """Raise InputUnreadable for a name outside the folder."""
    outside = [name for name in names if name in ("", ".", "..") or "/" in name]
    if outside:
        raise InputUnreadable(
            f"{path} names a {what} outside of its folder: {outside[0]!r}",
            remedy="do not use this folder, because it was manipulated",
        )

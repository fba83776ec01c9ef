"""Folders of `datasets`, made by `Dataset.save_to_disk` and `DatasetDict.save_to_disk`.

Not every file in them is of the data set: `map`, `filter` and `shuffle` write their caches next to
the data that they were loaded from, and saving again with fewer shards leaves the old ones behind.
What belongs to the data set is listed in a file of the folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from sftprep.errors import ConfigError, InputUnreadable
from sftprep.sources.readers.lines import LARGEST_LINE, open_regular, unreadable

STATE = "state.json"
"""Lists the files of a saved Dataset, under `_data_files`."""
SPLITS = "dataset_dict.json"
"""Lists the splits of a saved DatasetDict, each a subfolder."""
_INFO = "dataset_info.json"


@dataclass(frozen=True, slots=True)
class SavedFolder:
    """What is read of a folder that `datasets` saved.

    Attributes:
        list_file: path of the file that lists it.
        members: names in the folder: of the data files, or of the one split that is chosen.
        split: that split, None for a saved Dataset.
        why_not: the reason that is logged for everything else in the folder.
    """

    list_file: str
    members: frozenset[str]
    split: str | None
    why_not: str


def read_saved_folder(folder: str, split: str | None) -> SavedFolder | None:
    """Return what is read of a folder, or None where `datasets` did not save it.

    A folder that holds both kinds is a Dataset, as it is for `datasets.load_from_disk`.

    Args:
        folder: its path.
        split: the split that was asked for; by default train, else the only one.

    Raises:
        InputUnreadable: its list is damaged, or leads out of the folder.
        ConfigError: a split is to be chosen, or the one asked for is not there.
    """
    files = _saved_files(folder)
    if files is not None:
        why_not = f"not among the files that the {STATE} of a saved data set lists"
        return SavedFolder(os.path.join(folder, STATE), files, None, why_not)
    path = os.path.join(folder, SPLITS)
    if not os.path.isfile(path):
        return None
    chosen = choose_split(_saved_splits(path), split, f"the folder {folder}")
    why_not = f"not in the split {chosen!r} of a saved data set"
    return SavedFolder(path, frozenset([chosen]), chosen, why_not)


def choose_split(splits: list[str], split: str | None, where: str) -> str:
    """The split asked for, else train, else the only one. Raises ConfigError."""
    if split is not None:
        if split not in splits:
            raise ConfigError(
                f"{where} has no split {split!r}",
                remedy=f"give --split with one of: {', '.join(splits)}",
            )
        return split
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise ConfigError(
        f"{where} has the splits {', '.join(splits)}",
        remedy=f"choose one with --split {splits[0] if splits else ''}",
    )


def _saved_files(folder: str) -> frozenset[str] | None:
    """Return the names of the files of a saved Dataset, or None where a folder holds none."""
    path = os.path.join(folder, STATE)
    if not os.path.isfile(path):
        return None
    try:
        names = [str(each["filename"]) for each in _read_json(path)["_data_files"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        # Other programs have files of this name too; next to the other file it is of `datasets`.
        if not os.path.isfile(os.path.join(folder, _INFO)):
            return None
        raise InputUnreadable(
            f"{path} does not list the files of a data set",
            remedy="save the data set again, or name the files that you mean",
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
    # A file with more bytes holds the records of somebody, and is no list of files.
    with unreadable(path), open_regular(path) as file:
        return json.loads(file.read(LARGEST_LINE))


def _check_inside(names: list[str], path: str, what: str) -> None:
    """Raises InputUnreadable for a name that leads out of the folder."""
    outside = [name for name in names if name in ("", ".", "..") or "/" in name]
    if outside:
        raise InputUnreadable(
            f"{path} names a {what} outside of its folder: {outside[0]!r}",
            remedy="do not use this folder: it was tampered with",
        )

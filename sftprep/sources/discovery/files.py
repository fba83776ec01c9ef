"""Which files are meant by paths, globs and folders.

Only what is named is read: nothing in the output folder or our cache, no build in a folder that is
searched (unless it is named itself), no intermediate file of a build, no hidden file, no folder
behind a link. What is skipped is logged once, and what cannot be listed or read is an error.
"""

from __future__ import annotations

import glob
import os
from itertools import takewhile

from sftprep.config.validation import check_local_path, expand_path, printable
from sftprep.errors import ConfigError, FormatError, InputNotFound, InputUnreadable
from sftprep.sources.discovery.file_types import SUFFIXES, kind_of
from sftprep.sources.discovery.hub_splits import HubConfig, files_of_splits
from sftprep.sources.discovery.saved import choose_split, read_saved_folder
from sftprep.sources.discovery.search import (
    FolderSearch,
    check_regular,
    file_identity,
    is_build,
    is_folder,
    work_folder_of,
)
from sftprep.sources.readers.lines import unreadable


def find_files(
    inputs: tuple[str, ...],
    split: str | None = None,
    *,
    output: str | None = None,
    other_split: str | None = None,
) -> list[str]:
    """Find the files that paths, globs and folders name, in the order given, sorted within each.

    Args:
        inputs: what the user wrote.
        split: of a folder made by `DatasetDict.save_to_disk`, "train" by default; of another
            folder, by default all its files, else those whose names tell that split, as on the
            Hub.
        output: folder that is written to: nothing in it is read.
        other_split: a split that another call reads, which is not logged as skipped.

    Raises:
        InputNotFound: a name means no file.
        InputUnreadable: a folder cannot be listed, or a file is a pipe, or a link to nothing.
        FormatError: a kind of file that is not read, or a build.
        ConfigError: the same file twice, a split to choose, a URL, a file in the output folder.
    """
    if not inputs:
        raise ConfigError(
            "no input is given",
            remedy="name a .jsonl file, a glob or a folder: sftprep build data.jsonl ...",
        )
    search = FolderSearch(
        None if output is None else os.path.realpath(output), split, other_split=other_split
    )
    files = [file for name in inputs for file in _expand(name, search)]
    search.report()
    for file in files:
        _check_encoding(file)
    reject_twice(files)
    return files


def reject_twice(files: list[str]) -> None:
    """Raises ConfigError where a file is among them twice."""
    seen: set[object] = set()
    for file in files:
        real = file_identity(file)
        if real in seen:
            raise ConfigError(
                f"{file} is named twice among the inputs",
                remedy="name it once; to train its records more often, give it a repeat in a "
                "mixture (--config, sources:)",
            )
        seen.add(real)


def _check_encoding(path: str) -> None:
    """Raises InputUnreadable for a name that is not UTF-8: manifests could not hold it."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputUnreadable(
            f"{printable(path)} has a name that is not UTF-8", remedy="rename it"
        ) from error


def _refuse_work_files(name: str) -> None:
    """Raises FormatError for the work folder of a build, and for what is in it."""
    folder = work_folder_of(name)
    if folder is not None:
        raise FormatError(
            f"{name} is in {folder}, the intermediate files of a build, which are not records",
            remedy="give the inputs that it was built from",
        )


def _check_input_name(name: str) -> None:
    """Raises ConfigError for a name that is not a path, and for one in a folder that does not
    exist and looks like a URL."""
    expand_path(name, "an input")
    first = name.partition("/")[0]
    if "://" in name or not (os.path.lexists(first) or os.path.lexists(name)):
        _check_encoding(name)
        check_local_path(name, "the input")


def _expand(name: str, search: FolderSearch) -> list[str]:
    _check_input_name(name)
    if search.is_output(os.path.realpath(name)):
        raise ConfigError(
            f"the input {name} is in the output folder",
            remedy="give another --output, or move the input away",
        )
    _refuse_work_files(name)
    if is_folder(name):
        return _inside(name, search)
    if search.split not in (None, "train"):
        raise ConfigError(
            f"{name} has no split {search.split!r}: files have none",
            remedy="name the file that you mean, or a folder",
        )
    if not os.path.lexists(name):
        return _matching(name, search)
    check_regular(name)
    if kind_of(name) is None:
        raise FormatError(
            f"{name} is not a kind of file that is read: {', '.join(SUFFIXES)}",
            remedy="convert it to JSON lines, one object a line, or rename it if it is one of "
            "these already",
        )
    return [name]


def _matching(pattern: str, search: FolderSearch) -> list[str]:
    """The files that a pattern matches, and the data files in the folders that it matches."""
    at = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    literal = list(takewhile(lambda part: not glob.has_magic(part), parts))
    _refuse_work_files(at + "/".join(literal))
    found = set(search.match(parts, at))
    folders = sorted(path for path in found if is_folder(path))
    files = sorted(found.difference(folders))
    for file in files:
        check_regular(file)
    wrong = [file for file in search.distinct(files) if kind_of(file) is None]
    if wrong:
        raise FormatError(
            f"{pattern} matches {wrong[0]}, which is not a kind of file that is read: "
            f"{', '.join(SUFFIXES)}",
            remedy="narrow the pattern",
        )
    named = not glob.has_magic(parts[-1])
    searched: list[str] = []
    for folder in folders:
        if "**" in parts and os.path.islink(folder):
            search.pass_link(folder)
        elif not folder.startswith(tuple(f"{top}/" for top in searched)) and (
            search.enters(folder, named=named)
        ):
            searched.append(folder)
            files += _of_split(folder, search.files_below(folder), search)
    matches = search.distinct(files)
    if not matches:
        search.report()
        raise InputNotFound(
            f"{pattern} does not exist, and matches no file as a pattern",
            remedy="check the path; quote patterns: 'data/*.jsonl'",
        )
    return matches


def _inside(folder: str, search: FolderSearch) -> list[str]:
    """The data files in a folder, those of hidden folders left out."""
    saved = read_saved_folder(folder, search.split)
    if saved is not None and saved.split is not None:
        search.entries(folder)  # notes the other splits
        folder = os.path.join(folder, saved.split)
    with unreadable(folder):
        found_build = is_build(folder)
    if found_build:
        raise FormatError(
            f"the folder {folder} is a build of sftprep: its records are tokenized already",
            remedy="give the inputs that it was built from, or train on it: sfttrain run",
        )
    found = search.walk(folder)
    if not found:
        search.report()
        raise InputNotFound(
            f"the folder {folder} holds no {', '.join(SUFFIXES)} file",
            remedy="name a folder with data, or convert the files",
        )
    return _of_split(folder, found, search)


def _of_split(folder: str, found: list[str], search: FolderSearch) -> list[str]:
    """Return those of the files in a folder that are of the split asked for, and note the others.

    Raises:
        ConfigError: none is.
    """
    split = search.split
    if split is None or read_saved_folder(folder, split) is not None:
        return found
    # Of data sets that were saved, the search has found the split by their own lists.
    by_name = [file for file in found if not search.is_in_saved_split(file)]
    if not by_name:
        return found
    paths = {os.path.relpath(file, folder): file for file in by_name}
    splits = files_of_splits(HubConfig("default", None), list(paths), one_kind=False)
    chosen: set[str] = set()
    if split in splits or len(by_name) == len(found):
        named = splits[choose_split(list(splits), split, f"the folder {folder}")]
        chosen = {paths[path] for path in named}
    for path, file in paths.items():
        if file not in chosen and path not in splits.get(search.other_split or "", ()):
            search.skip(f"not of the split {split!r} by their names", file)
    return sorted(chosen.union(file for file in found if search.is_in_saved_split(file)))

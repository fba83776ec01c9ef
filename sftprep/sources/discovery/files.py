"""The files named by paths, globs and folders.

Only what the user names is read. A search of a folder skips the output folder, the cache of
sftprep, builds and their intermediate files, hidden files, and folders behind links, unless they
are named themselves. What is skipped is logged once; what cannot be listed or read is an error, so
that no records are lost without notice.
"""

from __future__ import annotations

import glob
import os
from itertools import takewhile

from sftprep.config.validation import TextUnit, check_local_path, expand_path, printable
from sftprep.errors import ConfigError, FormatError, InputNotFound, InputUnreadable, setting
from sftprep.shards.layout import SHARD_FOLDER
from sftprep.sources.discovery.file_types import SUFFIXES, is_plain_text, kind_of
from sftprep.sources.discovery.hub_splits import HubConfig, files_of_splits
from sftprep.sources.discovery.paths import (
    build_as_input,
    check_regular,
    file_identity,
    input_in_output,
    is_build,
    is_folder,
    work_folder_of,
)
from sftprep.sources.discovery.saved import choose_split, read_saved_folder
from sftprep.sources.discovery.search import FolderSearch
from sftprep.sources.readers.lines import convert_os_errors


def find_files(
    inputs: tuple[str, ...],
    split: str | None = None,
    *,
    output: str | None = None,
    other_split: str | None = None,
    text_unit: TextUnit | None = None,
) -> list[str]:
    """Return the files named by paths, globs and folders, in input order.

    The files of one input are sorted.

    Args:
        inputs: What the user wrote.
        split: The requested split. Of a folder that `DatasetDict.save_to_disk` wrote, the default
            is "train". Of another folder, the default is all its files; otherwise the files whose
            names contain the split, as on the Hub.
        output: The folder that is written to; nothing in it is read.
        other_split: A split that another call reads, which is not logged as skipped.
        text_unit: What a record of plain text is; None if such files are not read.

    Raises:
        InputNotFound: A name matches no file.
        InputUnreadable: A folder cannot be listed, or a file is a pipe or a broken link.
        FormatError: An input is a kind of file that is not read, or a build.
        ConfigError: An input is a URL, is in the output folder, or is named twice; or a split must
            be chosen.
    """
    if not inputs:
        raise ConfigError(
            "no input is specified",
            remedy="specify a .jsonl file, a glob or a folder: sftprep build data.jsonl ...",
        )
    search = FolderSearch(
        None if output is None else os.path.realpath(output),
        split,
        other_split=other_split,
        text_unit=text_unit,
    )
    files = [file for name in inputs for file in _expand_input(name, search)]
    search.report()
    for file in files:
        _check_encoding(file)
    reject_duplicates(files)
    return files


def reject_duplicates(files: list[str]) -> None:
    """Check for duplicate files, also by another path, a link or a hard link.

    Raises:
        ConfigError: A file occurs twice.
    """
    seen: set[object] = set()
    for file in files:
        identity = file_identity(file)
        if identity in seen:
            raise ConfigError(
                f"{file} is named twice among the inputs",
                remedy="name it once; to train on its records more often, set `repeat` of its"
                " source in a mixture (a config file with `sources`)",
            )
        seen.add(identity)


def _check_encoding(path: str) -> None:
    """Raise InputUnreadable unless a name is valid UTF-8.

    No manifest can contain such a name.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputUnreadable(
            f"{printable(path)} has a name that is not UTF-8", remedy="rename it"
        ) from error


def _reject_work_files(name: str) -> None:
    """Raise FormatError for the work folder of a build, and for everything in it."""
    folder = work_folder_of(name)
    if folder is not None:
        raise FormatError(
            f"{name} is in {folder}, which holds the intermediate files of a build, not records",
            remedy="use the inputs of that build",
        )


def _check_input_name(name: str) -> None:
    """Raise ConfigError unless a name is a local path."""
    expand_path(name, "an input")
    first = name.partition("/")[0]
    # "s3:/x" looks like a URL, but is accepted as a path if a folder "s3:" exists.
    if "://" in name or not (os.path.lexists(first) or os.path.lexists(name)):
        _check_encoding(name)
        check_local_path(name, "the input")


def _expand_input(name: str, search: FolderSearch) -> list[str]:
    _check_input_name(name)
    if search.is_output(os.path.realpath(name)):
        raise input_in_output(name)
    _reject_work_files(name)
    is_pattern = not os.path.lexists(name) or _matches_others(name)
    if not is_pattern and is_folder(name):
        return _search_folder(name, search)
    if search.split not in (None, "train"):
        raise ConfigError(
            f"{name} has no split {search.split!r}, because files have no splits",
            remedy="specify the file with the records of this split, or a folder",
        )
    if is_pattern:
        return _match_pattern(name, search)
    check_regular(name)
    if kind_of(name, search.text_unit) is None:
        raise FormatError(
            f"{name} is not a kind of file that is read: {', '.join(SUFFIXES)}",
            remedy=f"read its lines as texts, try: {setting('format', 'text')}"
            if is_plain_text(name)
            else "convert it to JSON lines, or rename it if it is one of these kinds already",
        )
    return [name]


def _matches_others(path: str) -> bool:
    """Return whether an existing path is also a pattern for itself and others.

    It is then read as the pattern: a file named `*.jsonl` must not hide the other files.

    Raises:
        ConfigError: The pattern matches others and not the path, so either may be meant.

    Example:
        "a?.jsonl" matches the file "a?.jsonl" and "a1.jsonl"; "a[1].jsonl" matches only the latter
    """
    matches = set(glob.glob(path, recursive=True)) if glob.has_magic(path) else set()
    others = matches - {path}
    if others and path not in matches:
        raise ConfigError(
            f"{path} exists, and as a pattern it matches {min(others)} instead",
            remedy=f"write {glob.escape(path)} for {path}; name other files one by one",
        )
    return bool(others)


def _match_pattern(pattern: str, search: FolderSearch) -> list[str]:
    """Return the files matching a pattern, and the data files in matching folders."""
    root = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    literal = list(takewhile(lambda part: not glob.has_magic(part), parts))
    _reject_work_files(root + "/".join(literal))
    # 1. The paths that match. Files must be of a kind that is read: the user named them.
    found = set(search.match(parts, root))
    folders = sorted(path for path in found if is_folder(path))
    files = sorted(found.difference(folders))
    for file in files:
        check_regular(file)
    wrong = [
        file for file in search.remove_duplicates(files) if kind_of(file, search.text_unit) is None
    ]
    if wrong:
        raise FormatError(
            f"{pattern} matches {wrong[0]}, which is not a kind of file that is read: "
            f"{', '.join(SUFFIXES)}",
            remedy="use a narrower pattern",
        )
    # 2. The data files in folders that match.
    is_named = not glob.has_magic(parts[-1])
    searched: list[str] = []
    for folder in folders:
        if "**" in parts and os.path.islink(folder):
            search.note_link(folder)
        # A folder within a folder that was searched already is not searched again.
        elif not folder.startswith(tuple(f"{top}/" for top in searched)) and (
            search.can_enter(folder, named=is_named)
        ):
            searched.append(folder)
            files += _select_split(folder, search.list_data_files(folder), search)
    matches = search.remove_duplicates(files)
    if not matches:
        search.report()
        raise InputNotFound(
            f"{pattern} does not exist, and matches no file as a pattern",
            remedy="check the path; patterns must be quoted: 'data/*.jsonl'",
        )
    return matches


def _search_folder(folder: str, search: FolderSearch) -> list[str]:
    """Return the data files in a folder and its subfolders, except hidden ones."""
    saved = read_saved_folder(folder, search.split)
    if saved is not None and saved.split is not None:
        search.list_folder(folder)  # notes the other splits as skipped
        folder = os.path.join(folder, saved.split)
    with convert_os_errors(folder):
        found_build = is_build(folder)
    if found_build:
        shards = os.path.join(folder, SHARD_FOLDER)
        raise build_as_input(f"the folder {folder}", folder, shards)
    found = search.find_data_files(folder)
    if not found:
        search.report()
        raise InputNotFound(
            f"the folder {folder} contains no {', '.join(SUFFIXES)} file",
            remedy=[
                "specify a folder with data, or convert the files",
                f"read plain text files with {setting('format', 'text')}",
            ],
        )
    return _select_split(folder, found, search)


def _select_split(folder: str, files: list[str], search: FolderSearch) -> list[str]:
    """Return the files of the requested split in a folder, and note the others.

    Raises:
        ConfigError: No file belongs to it.
    """
    split = search.split
    if split is None or read_saved_folder(folder, split) is not None:
        return files
    # In saved data sets, the search selected the split by their own lists, not by names.
    by_name = [file for file in files if not search.is_in_saved_split(file)]
    if not by_name:
        return files
    paths = {os.path.relpath(file, folder): file for file in by_name}
    splits = files_of_splits(HubConfig("default", None), list(paths), one_kind=False)
    chosen: set[str] = set()
    if split in splits or len(by_name) == len(files):
        names = splits[choose_split(list(splits), split, f"the folder {folder}")]
        chosen = {paths[path] for path in names}
    for path, file in paths.items():
        if file not in chosen and path not in splits.get(search.other_split or "", ()):
            search.skip(f"not of the split {split!r} by their names", file)
    return sorted(chosen.union(file for file in files if search.is_in_saved_split(file)))

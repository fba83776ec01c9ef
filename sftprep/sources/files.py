"""Which files are meant by paths, globs and folders.

Only what is named is read: nothing below the output folder, no build in a folder that is searched
(unless it is named itself), no folder behind a link. What is skipped is logged once, and what
cannot be listed or read is an error.
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from sftprep.choices import check_local_path
from sftprep.errors import ConfigError, FormatError, InputNotFound, InputUnreadable
from sftprep.shards.layout import SHARD_FOLDER, is_build_folder
from sftprep.sources.file_types import SUFFIXES, is_about_data, is_data, kind_of
from sftprep.sources.hub_splits import HubConfig, files_of_splits
from sftprep.sources.lines import unreadable

SAVED_SPLITS = "dataset_dict.json"

_log = logging.getLogger(__name__)


def find_files(
    inputs: tuple[str, ...], split: str | None = None, *, output: str | None = None
) -> list[str]:
    """Find the files that paths, globs and folders name, in the order given, sorted within each.

    Args:
        inputs: what the user wrote.
        split: of a folder made by `DatasetDict.save_to_disk`, "train" by default; of another
            folder, by default all its files, else those whose names tell that split, as on the
            Hub.
        output: folder that is written to: nothing in it is read.

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
    search = _Search(None if output is None else os.path.realpath(output))
    files = [file for name in inputs for file in _expand(name, split, search)]
    search.report()
    refuse_twice(files)
    return files


def refuse_twice(files: list[str]) -> None:
    """Raises ConfigError where a file is among them twice."""
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            raise ConfigError(
                f"{file} is named twice among the inputs",
                remedy="name it once; to train its records more often, give it a repeat in a "
                "mixture (--config, sources:)",
            )
        seen.add(real)


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


class _Search:
    """Lists folders for `find_files`, and collects what it skips.

    output: real path of the folder that is written to.
    """

    def __init__(self, output: str | None) -> None:
        self.output = output
        self._skipped: dict[str, list[str]] = {}
        """Why -> paths."""

    def is_output(self, real: str) -> bool:
        """Whether a real path is the output folder or in it."""
        return self.output is not None and f"{real}/".startswith(f"{self.output}/")

    def walk(self, top: str) -> list[str]:
        """Return the data files in a folder and its subfolders, sorted; each once."""
        found: list[str] = []
        inside = f"{os.path.realpath(top)}/"
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            for entry in self.entries(folder):
                if entry.is_dir(follow_symlinks=False):
                    waiting += [entry.path] if self.enters(entry.path) else []
                elif _is_folder(entry.path):
                    # What is in there is read anyway, if the link leads to another place in `top`.
                    if not f"{os.path.realpath(entry.path)}/".startswith(inside):
                        why = "links to folders, which are read only if they are named"
                        self._skip(why, entry.path)
                elif self._is_wanted(entry.path):
                    found.append(entry.path)
        return self.distinct(found)

    def distinct(self, paths: list[str]) -> list[str]:
        """Return the paths of different files, sorted; of several to one, the one without links."""
        kept: dict[str, str] = {}
        for path in sorted(paths, key=lambda path: (os.path.islink(path), path)):
            real = os.path.realpath(path)
            if self.is_output(real):
                self._skip("the output folder", path)
            elif kept.setdefault(real, path) != path:
                self._skip("links to files that are read already", path)
        return sorted(kept.values())

    def match(self, parts: Sequence[str], at: str = "") -> Iterator[str]:
        """Yield the paths that match a pattern, as `glob.glob(recursive=True)` does.

        `glob` skips folders that cannot be listed; here they are an error.

        Args:
            parts: the pattern, split at slashes.
            at: folder in which it is searched for, with a slash at its end.
        """
        if not parts:
            yield at.removesuffix("/")
            return
        head, rest = parts[0], parts[1:]
        if not glob.has_magic(head):
            if os.path.lexists(at + head):
                yield from self.match(rest, f"{at}{head}/")
            return
        if head == "**":
            rest = rest or ["*"]
            yield from self.match(rest, at)
        for entry in self.entries(at or ".", hidden=head.startswith(".")):
            path = at + entry.name
            if head == "**":
                if entry.is_dir(follow_symlinks=False) and self.enters(path):
                    yield from self.match(parts, f"{path}/")
            # A pattern that goes on with the folder of shards means builds.
            elif fnmatchcase(entry.name, head) and (
                not rest or (_is_folder(path) and self.enters(path, rest[0] == SHARD_FOLDER))
            ):
                yield from self.match(rest, f"{path}/")

    def entries(self, folder: str, *, hidden: bool = False) -> list[os.DirEntry[str]]:
        """List a folder without hidden entries; nothing where it is not a folder."""
        with unreadable(folder):
            try:
                with os.scandir(folder) as entries:
                    return [e for e in entries if hidden or not e.name.startswith(".")]
            except (FileNotFoundError, NotADirectoryError):
                return []

    def enters(self, folder: str, named: bool = False) -> bool:
        """Whether what is in a subfolder is read. named: also where it is a build."""
        with unreadable(folder):
            if self.is_output(os.path.realpath(folder)):
                self._skip("the output folder", folder)
                return False
            if not named and is_build_folder(Path(folder)):
                self._skip("a build of sftprep, which is read only if it is named", folder)
                return False
        return True

    def report(self) -> None:
        """Log what was skipped."""
        for why, paths in self._skipped.items():
            more = f" and {len(paths) - 5:,} more" if len(paths) > 5 else ""
            _log.warning("not read: %s%s (%s)", ", ".join(sorted(paths)[:5]), more, why)

    def _is_wanted(self, path: str) -> bool:
        if is_data(os.path.basename(path)):
            check_regular(path)
            return True
        if not is_about_data(path):
            self._skip("not a kind of file that is read", path)
        return False

    def _skip(self, why: str, path: str) -> None:
        if path not in self._skipped.setdefault(why, []):
            self._skipped[why].append(path)


def check_regular(path: str) -> None:
    """Check that a path is of a file, or of a link to one.

    Raises:
        InputUnreadable: it is something else, such as a pipe, which would be waited for.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise InputUnreadable(
            f"{path} is a link to a file that does not exist",
            remedy="fetch that file (git lfs pull, git annex get), or remove the link",
        ) from error
    except OSError as error:
        raise InputUnreadable(
            f"cannot read {path}: {error.strerror}", remedy="check that it may be read"
        ) from error
    if not stat.S_ISREG(mode):
        raise InputUnreadable(
            f"{path} is not a file, but a pipe, a socket or a device",
            remedy="write its content to a file first",
        )


def _is_folder(path: str) -> bool:
    """Whether a path is of a folder, or of a link to one. Raises InputUnreadable."""
    with unreadable(path):
        try:
            return stat.S_ISDIR(os.stat(path).st_mode)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return False
            raise


def _expand(name: str, split: str | None, search: _Search) -> list[str]:
    if not os.path.lexists(name):
        check_local_path(name, "the input")
    if search.is_output(os.path.realpath(name)):
        raise ConfigError(
            f"the input {name} is in the output folder",
            remedy="give another --output, or move the input away",
        )
    if _is_folder(name):
        return _inside(name, split, search)
    if split not in (None, "train"):
        raise ConfigError(
            f"{name} has no split {split!r}: files have none",
            remedy="name the file that you mean, or a folder",
        )
    if os.path.lexists(name):
        check_regular(name)
        if kind_of(name) is None:
            raise FormatError(
                f"{name} is not a kind of file that is read: {', '.join(SUFFIXES)}",
                remedy="convert it to JSON lines, one object a line, or rename it if it is one of "
                "these already",
            )
        return [name]
    at = "/" if name.startswith("/") else ""
    parts = [part for part in name.split("/") if part]
    found = {match for match in search.match(parts, at) if not _is_folder(match)}
    for match in found:
        check_regular(match)
    matches = search.distinct(list(found))
    if not matches:
        search.report()
        raise InputNotFound(
            f"{name} does not exist, and matches no file as a pattern",
            remedy="check the path; quote patterns: 'data/*.jsonl'",
        )
    wrong = [match for match in matches if kind_of(match) is None]
    if wrong:
        raise FormatError(
            f"{name} matches {wrong[0]}, which is not a kind of file that is read: "
            f"{', '.join(SUFFIXES)}",
            remedy="narrow the pattern",
        )
    return matches


def _inside(folder: str, split: str | None, search: _Search) -> list[str]:
    """The data files in a folder, those of hidden folders left out."""
    if os.path.isfile(os.path.join(folder, SAVED_SPLITS)):
        splits = _saved_splits(os.path.join(folder, SAVED_SPLITS))
        folder = os.path.join(folder, choose_split(splits, split, f"the folder {folder}"))
    with unreadable(folder):
        is_build = is_build_folder(Path(folder))
    if is_build:
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
    if split is None or os.path.isfile(os.path.join(folder, "state.json")):
        return found
    splits_of = files_of_splits(
        HubConfig("default", None), [os.path.relpath(file, folder) for file in found]
    )
    chosen = choose_split(list(splits_of), split, f"the folder {folder}")
    return sorted(os.path.join(folder, file) for file in splits_of[chosen])


def _saved_splits(path: str) -> list[str]:
    """Return the splits of a folder made by `DatasetDict.save_to_disk`."""
    try:
        with unreadable(path), open(path, "rb") as file:
            splits = json.loads(file.read())["splits"]
        names = [str(name) for name in splits]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputUnreadable(
            f"{path} does not list the splits of a data set", remedy="save the data set again"
        ) from error
    outside = [name for name in names if name in ("", ".", "..") or "/" in name]
    if outside:
        raise InputUnreadable(
            f"{path} names a split outside of its folder: {outside[0]!r}",
            remedy="do not use this folder: it was tampered with",
        )
    return names

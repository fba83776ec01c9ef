"""Search of folders for data files, with a list of what is skipped."""

from __future__ import annotations

import errno
import glob
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from sftprep.config.cache_location import cache_dir
from sftprep.config.validation import printable
from sftprep.errors import InputUnreadable
from sftprep.shards.layout import (
    MANIFEST_NAME,
    SHARD_FOLDER,
    WORK_FOLDER,
    has_work_folder,
    is_build_folder,
)
from sftprep.shards.ownership import is_shard
from sftprep.shards.schema import SHARD_NAME
from sftprep.sources.discovery.file_types import (
    is_about_data,
    is_data,
    is_named_like_metadata,
    kind_of,
)
from sftprep.sources.discovery.saved import SPLITS, STATE, SavedFolder, read_saved_folder
from sftprep.sources.readers.lines import unreadable

_INTERMEDIATE = "intermediate files of a build"
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Errors of the system for a path that leads nowhere."""

_log = logging.getLogger(__name__)


class FolderSearch:
    """Lists folders for `files.find_files`, and collects what it skips.

    Attributes:
        output: real path of the folder that is written to.
        split: the split that was asked for.
        other_split: a split that another search reads, which is not noted as skipped.
    """

    def __init__(
        self, output: str | None, split: str | None = None, *, other_split: str | None = None
    ) -> None:
        self.output = output
        self.split = split
        self.other_split = other_split
        self._cache = os.path.realpath(cache_dir())
        self._skipped: dict[str, list[str]] = {}
        """Why -> paths."""
        self._links: list[str] = []
        """Links to folders that were not followed."""
        self._listed: set[str] = set()
        """Real paths of the folders that were listed."""
        self._saved_splits: list[str] = []
        """Folders of the splits that were chosen of saved data sets, with a slash at their end."""

    def is_output(self, real: str) -> bool:
        """Whether a real path is the output folder or in it."""
        return self.output is not None and f"{real}/".startswith(f"{self.output}/")

    def is_in_saved_split(self, path: str) -> bool:
        """Whether a path is in the split that was chosen of a saved data set."""
        return path.startswith(tuple(self._saved_splits))

    def walk(self, top: str) -> list[str]:
        """Return the data files in a folder and its subfolders, sorted; each once."""
        return self.distinct(self.files_below(top))

    def files_below(self, top: str) -> list[str]:
        """Return the data files in a folder and its subfolders."""
        found: list[str] = []
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            for entry in self.entries(folder):
                if entry.is_dir(follow_symlinks=False):
                    if self.enters(entry.path):
                        waiting.append(entry.path)
                elif is_folder(entry.path):
                    self.pass_link(entry.path)
                elif self._is_wanted(entry.path):
                    found.append(entry.path)
        return found

    def pass_link(self, path: str) -> None:
        """Note a link to a folder that is not followed."""
        self._links.append(path)

    def distinct(self, paths: list[str]) -> list[str]:
        """Return the paths of different files, sorted; of several to one, the one without links."""
        kept: dict[object, str] = {}
        for path in sorted(set(paths), key=lambda path: (os.path.islink(path), path)):
            if self.is_output(os.path.realpath(path)):
                self.skip("the output folder", path)
            elif os.path.islink(path) and work_folder_of(path) is not None:
                self.skip(_INTERMEDIATE, path)
            elif kept.setdefault(file_identity(path), path) != path:
                self.skip("links to files that are read already", path)
        return sorted(kept.values())

    def match(self, parts: Sequence[str], at: str = "") -> Iterator[str]:
        """Yield the paths that match a pattern, as `glob.glob(recursive=True)` does.

        `glob` skips folders that cannot be listed and links to nothing that may have been one;
        here they are an error.

        Args:
            parts: the pattern, split at slashes.
            at: folder in which it is searched for, with a slash at its end.
        """
        if not parts:
            yield at.removesuffix("/")
            return
        head, rest = parts[0], parts[1:]
        if not glob.has_magic(head):
            if _exists(at + head):
                yield from self.match(rest, f"{at}{head}/")
            return
        if head == "**":
            rest = rest or ["*"]
            yield from self.match(rest, at)
        wants_files = head != "**" and not rest
        for entry in self.entries(at or ".", head, files=wants_files):
            path = at + entry.name
            if head == "**":
                if entry.is_dir(follow_symlinks=False):
                    if self.enters(path):
                        yield from self.match(parts, f"{path}/")
                elif is_folder(path):
                    self.pass_link(path)
                else:
                    reject_broken_link(path)
            elif fnmatchcase(entry.name, head) and (not rest or self._leads_on(path, rest)):
                yield from self.match(rest, f"{path}/")

    def _leads_on(self, path: str, rest: Sequence[str]) -> bool:
        """Whether the rest of a pattern is searched for in a path that its first part matches."""
        if not is_folder(path):
            reject_broken_link(path)
            return False
        # A pattern that goes on with the folder of shards means builds.
        return self.enters(path, build=rest[0] == SHARD_FOLDER)

    def entries(
        self, folder: str, pattern: str = "*", *, files: bool = True
    ) -> list[os.DirEntry[str]]:
        """List a folder without hidden entries; nothing where it is not a folder.

        Hidden entries that would match a pattern are listed if it starts with a dot, and noted as
        skipped otherwise: folders, and where `files` are wanted, those of data. In a folder that
        `datasets` saved, the same holds for what is not of the data set or of another split.

        Raises:
            InputUnreadable: it cannot be listed, or a file or split of a saved data set that
                matches the pattern is missing.
        """
        self._listed.add(os.path.realpath(folder))
        found = []
        with unreadable(folder):
            try:
                with os.scandir(folder) as entries:
                    listed = list(entries)
            except (FileNotFoundError, NotADirectoryError):
                return []
        saved = self._saved_in(folder, {entry.name for entry in listed}, pattern, files=files)
        for entry in listed:
            if entry.name.startswith(".") and not pattern.startswith("."):
                if fnmatchcase(entry.name, pattern):
                    self._note_hidden(os.path.normpath(entry.path), files=files)
            elif saved is None or entry.name in saved.members:
                found.append(entry)
            elif fnmatchcase(entry.name, pattern):
                self._note_not_saved(os.path.normpath(entry.path), saved, files=files)
        return found

    def _saved_in(
        self, folder: str, names: set[str], pattern: str, *, files: bool
    ) -> SavedFolder | None:
        """Return what is read of a folder with these names in it, if `datasets` saved it."""
        if not names.intersection((STATE, SPLITS)):
            return None
        saved = read_saved_folder(folder, self.split)
        if saved is None:
            return None
        if saved.split is not None:
            self._saved_splits.append(os.path.join(folder, saved.split, ""))
        missing = sorted(name for name in saved.members - names if fnmatchcase(name, pattern))
        if missing and (files or saved.split is not None):
            raise InputUnreadable(
                f"{os.path.join(folder, missing[0])} is missing: {saved.list_file} lists it",
                remedy="copy or save the data set again, or name the files that you mean",
            )
        return saved

    def _note_not_saved(self, path: str, saved: SavedFolder, *, files: bool) -> None:
        reject_broken_link(path)
        if saved.split is not None and os.path.basename(path) == self.other_split:
            return
        if is_folder(path) or (files and not is_about_data(path)):
            self.skip(saved.why_not, path)

    def _note_hidden(self, path: str, *, files: bool) -> None:
        if is_folder(path):
            with unreadable(path):
                os.scandir(path).close()
            self.skip("hidden", path)
        elif files and kind_of(path) is not None:
            self.skip("hidden", path)

    def enters(self, folder: str, *, named: bool = False, build: bool = False) -> bool:
        """Whether what is in a subfolder is read.

        Args:
            folder: the subfolder.
            named: whether the user wrote its own name, and not a pattern.
            build: also where it is a build.
        """
        real = os.path.realpath(folder)
        with unreadable(folder):
            why = None
            if self.is_output(real):
                why = "the output folder"
            elif real == self._cache:
                why = "the cache of sftprep"
            elif os.path.basename(real) == WORK_FOLDER and has_work_folder(Path(real).parent):
                why = _INTERMEDIATE
            elif not build and is_build(folder):
                why = "a build of sftprep, which is read only if it is named"
            elif not named and _holds_shards(real):
                left = "" if is_build(os.path.dirname(real)) else " without a manifest"
                why = f"shards of a build{left}, which are read only if they are named"
        if why is not None:
            self.skip(why, folder)
        return why is None

    def report(self) -> None:
        """Log what was skipped, but for folders that were listed by another path."""
        for link in self._links:
            self.skip("links to folders, which are read only if they are named", link)
        for why, skipped in self._skipped.items():
            paths = [path for path in skipped if os.path.realpath(path) not in self._listed]
            if not paths:
                continue
            more = f" and {len(paths) - 5:,} more" if len(paths) > 5 else ""
            shown = ", ".join(map(printable, sorted(paths)[:5]))
            _log.warning("not read: %s%s (%s)", shown, more, why)

    def _is_wanted(self, path: str) -> bool:
        if is_data(os.path.basename(path)):
            check_regular(path)
            return True
        # Its name does not tell what it led to: that may have been a folder of data.
        reject_broken_link(path)
        if is_named_like_metadata(path):
            self.skip("files with names of metadata, which are read only if they are named", path)
        elif not is_about_data(path):
            self.skip("not a kind of file that is read", path)
        return False

    def skip(self, why: str, path: str) -> None:
        """Note a path that is not read, for `report`."""
        if path not in self._skipped.setdefault(why, []):
            self._skipped[why].append(path)


def work_folder_of(path: str) -> Path | None:
    """Return the work folder of a build that a path leads to or into, None where it is not."""
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        with unreadable(str(folder)):
            if folder.name == WORK_FOLDER and has_work_folder(folder.parent):
                return folder
    return None


def file_identity(path: str) -> object:
    """Return what two paths of the same file have in common, also hard links."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def check_regular(path: str) -> None:
    """Check that a path is of a file, or of a link to one.

    Raises:
        InputUnreadable: it is something else, such as a pipe, which would be waited for.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        reject_broken_link(path)
        raise InputUnreadable(
            f"cannot read {path}: {error.strerror}", remedy="check that it may be read"
        ) from error
    if not stat.S_ISREG(mode):
        raise InputUnreadable(
            f"{path} is not a file, but a pipe, a socket or a device",
            remedy="write its content to a file first",
        )


def reject_broken_link(path: str) -> None:
    """Check that a path is not a link to nothing.

    Raises:
        InputUnreadable: it is one, or a link to itself, or that cannot be told.
    """
    with unreadable(path):
        if not os.path.islink(path):
            return
        try:
            os.stat(path)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            what = "itself" if error.errno == errno.ELOOP else "a path that does not exist"
            raise InputUnreadable(
                f"{path} is a link to {what}",
                remedy="fetch what it leads to (git lfs pull, git annex get), mount its disk, or"
                " remove the link",
            ) from error


def is_folder(path: str) -> bool:
    """Whether a path is of a folder, or of a link to one. Raises InputUnreadable."""
    with unreadable(path):
        try:
            return stat.S_ISDIR(os.stat(path).st_mode)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return False
            raise


def _exists(path: str) -> bool:
    """Whether a path exists, also as a link to nothing. Raises InputUnreadable if it may not be
    looked at."""
    with unreadable(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def is_build(folder: str) -> bool:
    """Whether a folder holds a build. Raises InputUnreadable where that cannot be told."""
    manifest = os.path.join(folder, MANIFEST_NAME)
    if (
        os.path.isdir(os.path.join(folder, SHARD_FOLDER))
        and os.path.exists(manifest)
        and not os.access(manifest, os.R_OK)
    ):
        raise InputUnreadable(
            f"cannot read {manifest}, which tells whether {folder} is a build of sftprep",
            remedy="check that it may be read, or name the files that you mean",
        )
    return is_build_folder(Path(folder))


def _holds_shards(real: str) -> bool:
    """Whether a real path is of the folder of a build's shards, also if its manifest is lost."""
    return os.path.basename(real) == SHARD_FOLDER and any(
        SHARD_NAME.fullmatch(name) and is_shard(Path(real, name)) for name in os.listdir(real)
    )

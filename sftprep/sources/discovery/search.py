"""The search of folders for data files, with a list of what is skipped and why.

`glob` and `os.walk` omit folders that they cannot list, and links whose target does not exist. Here
these are errors, because the records behind them would be missing without notice.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from sftprep.config.cache_location import cache_dir
from sftprep.config.validation import TextUnit, printable
from sftprep.errors import InputUnreadable
from sftprep.shards.layout import SHARD_FOLDER, WORK_FOLDER, has_work_folder
from sftprep.sources.discovery.file_types import (
    is_data,
    is_metadata,
    is_named_like_metadata,
    is_plain_text,
    kind_of,
)
from sftprep.sources.discovery.paths import (
    check_regular,
    file_identity,
    has_groups,
    has_shards,
    is_build,
    is_folder,
    path_exists,
    reject_broken_link,
    work_folder_of,
)
from sftprep.sources.discovery.saved import SPLITS, STATE, SavedFolder, read_saved_folder
from sftprep.sources.readers.lines import convert_os_errors

_PLAIN_TEXT = "not a kind that is read, except with the format text"
_INTERMEDIATE = "intermediate files of a build"
_log = logging.getLogger(__name__)


class FolderSearch:
    """The search of `files.find_files`, with a record of skipped paths.

    Attributes:
        output: The real path of the folder that is written to; None if there is none.
        split: The requested split.
        other_split: A split that another search reads, which is not noted as skipped.
        text_unit: What a record of plain text is; None if such files are not read.
    """

    def __init__(
        self,
        output: str | None,
        split: str | None = None,
        *,
        other_split: str | None = None,
        text_unit: TextUnit | None = None,
    ) -> None:
        self.output = output
        self.split = split
        self.other_split = other_split
        self.text_unit = text_unit
        self._cache = os.path.realpath(cache_dir())
        self._skipped: dict[str, list[str]] = {}  # reason -> paths
        self._links: list[str] = []  # links to folders that were not followed
        self._listed: set[str] = set()  # real paths of the folders that were listed
        # Folders of the chosen splits of saved data sets, each with a slash at its end.
        self._saved_splits: list[str] = []

    def is_output(self, real: str) -> bool:
        """Return whether a real path is the output folder or is inside of it."""
        return self.output is not None and f"{real}/".startswith(f"{self.output}/")

    @cached_property
    def _output_files(self) -> frozenset[object]:
        """Return the files in the output folder, possibly shared by hard links."""
        if self.output is None:
            return frozenset()
        return frozenset(
            file_identity(os.path.join(folder, name))
            for folder, _, names in os.walk(self.output)
            for name in names
        )

    def is_in_saved_split(self, path: str) -> bool:
        """Return whether a path is in the chosen split of a saved data set."""
        return path.startswith(tuple(self._saved_splits))

    def find_data_files(self, top: str) -> list[str]:
        """Return the data files in a folder tree, sorted, without duplicates."""
        return self.remove_duplicates(self.list_data_files(top))

    def list_data_files(self, top: str) -> list[str]:
        """Return the data files in a folder and its subfolders."""
        found: list[str] = []
        # A stack, not recursion: folders may be nested more deeply than Python's recursion limit.
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            for entry in self.list_folder(folder):
                if entry.is_dir(follow_symlinks=False):
                    if self.can_enter(entry.path):
                        waiting.append(entry.path)
                elif is_folder(entry.path):
                    self.note_link(entry.path)
                elif self._is_wanted(entry.path):
                    found.append(entry.path)
        return found

    def note_link(self, path: str) -> None:
        """Note a link to a folder as not followed."""
        self._links.append(path)

    def remove_duplicates(self, paths: list[str]) -> list[str]:
        """Return the paths of different files, sorted.

        Of several paths to the same file, one that is not a link is preferred.
        """
        kept: dict[object, str] = {}
        for path in sorted(set(paths), key=lambda path: (os.path.islink(path), path)):
            identity = file_identity(path)
            if self.is_output(os.path.realpath(path)) or identity in self._output_files:
                self.skip("the output folder", path)
            elif os.path.islink(path) and work_folder_of(path) is not None:
                self.skip(_INTERMEDIATE, path)
            elif kept.setdefault(identity, path) != path:
                self.skip("links to files that are read already", path)
        return sorted(kept.values())

    def match(self, parts: Sequence[str], base: str = "") -> Iterator[str]:
        """Yield the paths matching a pattern, like `glob.glob(recursive=True)`.

        Args:
            parts: The pattern, split at slashes.
            base: The folder in which it is searched, with a slash at its end.

        Raises:
            InputUnreadable: A folder cannot be listed, or a link that may have led to a folder is
                broken.
        """
        if not parts:
            yield base.removesuffix("/")
            return
        head, rest = parts[0], parts[1:]
        if not glob.has_magic(head):
            if path_exists(base + head):
                yield from self.match(rest, f"{base}{head}/")
            return
        if head == "**":
            # "**" matches no folder at all too, and at the end it matches files.
            rest = rest or ["*"]
            yield from self.match(rest, base)
        wants_files = head != "**" and not rest
        for entry in self.list_folder(base or ".", head, files=wants_files):
            path = base + entry.name
            if head == "**":
                if entry.is_dir(follow_symlinks=False):
                    if self.can_enter(path):
                        yield from self.match(parts, f"{path}/")
                elif is_folder(path):
                    self.note_link(path)
                else:
                    reject_broken_link(path)
            elif fnmatchcase(entry.name, head) and (not rest or self._can_continue(path, rest)):
                yield from self.match(rest, f"{path}/")

    def _can_continue(self, path: str, rest: Sequence[str]) -> bool:
        """Return whether to search a path for the rest of a pattern.

        The path matches the first part of the pattern.
        """
        if not is_folder(path):
            reject_broken_link(path)
            return False
        # A pattern that continues with the folder of shards refers to builds.
        return self.can_enter(path, build=rest[0] == SHARD_FOLDER)

    def list_folder(
        self, folder: str, pattern: str = "*", *, files: bool = True
    ) -> list[os.DirEntry[str]]:
        """Return the readable entries of a folder; none if it is not a folder.

        Hidden entries are returned only if the pattern starts with a dot. In a folder that
        `datasets` saved, only the files of the data set or of the chosen split are returned.
        Entries that match the pattern and are not returned are noted as skipped.

        Args:
            folder: The path.
            pattern: What the names of the entries are matched with by the caller.
            files: Whether files are of interest, and not only folders.

        Raises:
            InputUnreadable: The folder cannot be listed, or a file or split of a saved data set
                that matches the pattern is missing.
        """
        self._listed.add(os.path.realpath(folder))
        found = []
        with convert_os_errors(folder):
            try:
                with os.scandir(folder) as entries:
                    listed = list(entries)
            except (FileNotFoundError, NotADirectoryError):
                return []
        saved = self._read_saved(folder, {entry.name for entry in listed}, pattern, files=files)
        for entry in listed:
            if entry.name.startswith(".") and not pattern.startswith("."):
                if fnmatchcase(entry.name, pattern):
                    self._note_hidden(os.path.normpath(entry.path), files=files)
            elif saved is None or entry.name in saved.members:
                found.append(entry)
            elif fnmatchcase(entry.name, pattern):
                self._note_not_saved(os.path.normpath(entry.path), saved, files=files)
        return found

    def _read_saved(
        self, folder: str, names: set[str], pattern: str, *, files: bool
    ) -> SavedFolder | None:
        """Return the part of a folder to be read, if `datasets` saved it."""
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
                f"{os.path.join(folder, missing[0])} is missing, but {saved.list_file} lists it",
                remedy="copy or save the data set again, or specify the data files by their names",
            )
        return saved

    def _note_not_saved(self, path: str, saved: SavedFolder, *, files: bool) -> None:
        reject_broken_link(path)
        if saved.split is not None and os.path.basename(path) == self.other_split:
            return
        if is_folder(path) or (files and not is_metadata(path)):
            self.skip(saved.skip_reason, path)

    def _note_hidden(self, path: str, *, files: bool) -> None:
        if is_folder(path):
            # It must be possible to list it: whether it has data would be unknown otherwise.
            with convert_os_errors(path):
                os.scandir(path).close()
            self.skip("hidden", path)
        elif files and kind_of(path) is not None:
            self.skip("hidden", path)

    def can_enter(self, folder: str, *, named: bool = False, build: bool = False) -> bool:
        """Return whether to read a subfolder's files; otherwise note it as skipped.

        Args:
            folder: The subfolder.
            named: Whether the user wrote its name, and not a pattern.
            build: Whether a build is read too.
        """
        real = os.path.realpath(folder)
        with convert_os_errors(folder):
            reason = None
            if self.is_output(real):
                reason = "the output folder"
            elif real == self._cache:
                reason = "the cache of sftprep"
            elif os.path.basename(real) == WORK_FOLDER and has_work_folder(Path(real).parent):
                reason = _INTERMEDIATE
            elif not build and is_build(folder):
                reason = "a build of sftprep, which is read only if it is named"
            elif not named and has_shards(real):
                lost = "" if is_build(os.path.dirname(real)) else " without a manifest"
                reason = f"shards of a build{lost}, which are read only if they are named"
            elif has_groups(real):
                return False  # metadata of a build, like its manifest
        if reason is not None:
            self.skip(reason, folder)
        return reason is None

    def report(self) -> None:
        """Log all skipped paths, except folders listed by another path."""
        for link in self._links:
            self.skip("links to folders, which are read only if they are named", link)
        for reason, skipped in self._skipped.items():
            # At most five paths: a folder may contain thousands of skipped files.
            paths = [path for path in skipped if os.path.realpath(path) not in self._listed]
            if not paths:
                continue
            more = f" and {len(paths) - 5:,} more" if len(paths) > 5 else ""
            shown = ", ".join(map(printable, sorted(paths)[:5]))
            _log.warning("not read: %s%s (%s)", shown, more, reason)

    def _is_wanted(self, path: str) -> bool:
        if is_data(os.path.basename(path), self.text_unit):
            check_regular(path)
            return True
        # The name of a broken link does not show whether it led to a folder of data.
        reject_broken_link(path)
        is_text = is_plain_text(path)
        if is_named_like_metadata(path) or (is_text and self.text_unit is not None):
            self.skip("files with names of metadata, which are read only if they are named", path)
        elif not is_metadata(path):
            self.skip(_PLAIN_TEXT if is_text else "not a kind of file that is read", path)
        return False

    def skip(self, reason: str, path: str) -> None:
        """Note a path as not read, for `report`."""
        if path not in self._skipped.setdefault(reason, []):
            self._skipped[reason].append(path)

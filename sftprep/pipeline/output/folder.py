"""The output folder of a build: claim it, work in it, and commit atomically.

A build works in `OUTPUT/spill`, the work folder, which it creates and marks. Everything that is not
final is in it: spills, recipes, finished shards, manifests. The commit has three steps:

1. write the names of the files that it will put in place, and those of the previous build, to
   `spill/commit.json`;
2. move the files to these names, the manifest last: until then, a reader sees the previous build.
   The data card is the last but one, so it never names a file that is not there;
3. remove the files that only the previous build has, and the work folder.

The rules for files that may be removed or replaced are in contents.py.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sftprep.core.atomic_write import (
    is_temporary_name,
    storage_errors,
    sync_folder,
    temporary_name,
    write_bytes,
)
from sftprep.errors import StorageError, setting
from sftprep.pipeline.output.contents import (
    card_notice,
    check_contents,
    check_not_in_build,
    list_paths,
    user_files_error,
    work_files,
)
from sftprep.shards.group import files_of_group
from sftprep.shards.layout import (
    BUILD_FOLDERS,
    CARD_NAME,
    COMMIT_NAME,
    EVAL_FOLDER,
    IDENTITY_NAME,
    LEASE_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    MARKER_NAME,
    RECIPE_PATTERN,
    SPILL_PATTERN,
    WORK_FOLDER,
    has_work_folder,
    is_file,
    is_folder,
    is_work_folder_created,
    mark_work_folder,
    tokenizer_paths,
)
from sftprep.shards.locks import exclusive
from sftprep.shards.manifest import Manifest
from sftprep.shards.manifest_size import manifest_bytes
from sftprep.shards.ownership import commit_bytes

HELD_NAMES = {MARKER_NAME, LOCK_NAME, LEASE_NAME}
"""Names in the work folder that stay while a build holds it."""
REUSABLE_NAME = re.compile(rf"{SPILL_PATTERN}|{RECIPE_PATTERN}")
"""Paths in the work folder that `keep_spill` keeps in addition."""
_USELESS_NAME = re.compile(
    rf"{'|'.join(map(re.escape, (*HELD_NAMES, IDENTITY_NAME)))}|{RECIPE_PATTERN}"
)
"""Paths in the work folder that save no work unless there is a spill."""


@dataclass(frozen=True, kw_only=True)
class OutputFolder:
    """An output folder claimed by this build.

    Attributes:
        root: The folder.
        previous: The paths in it that earlier builds put in place, relative to `root`.
    """

    root: Path
    previous: frozenset[str]

    @property
    def work(self) -> Path:
        """The folder of spills, recipes and uncommitted files."""
        return self.root / WORK_FOLDER

    def staging(self, *, evaluation: bool) -> Path:
        """Return the folder for the files of a build before the commit.

        In it, the files have the same paths as later in the folder of the build.
        """
        return self.work / EVAL_FOLDER if evaluation else self.work

    def commit(
        self, manifest: Manifest, evaluation: Manifest | None, card: bytes, *, keep_spill: bool
    ) -> Path:
        """Replace the previous build by the finished one; return its folder.

        After each of these errors, except for a disk error between the moves, the previous build is
        unchanged.

        Args:
            manifest: The manifest of the training build.
            evaluation: The manifest of the evaluation build, if there is one.
            card: The data card. It is not written if the folder has a README.md of a user.
            keep_spill: Whether to keep the spills.

        Raises:
            ConfigError: A manifest is larger than the largest one that can be read.
            OutputExists: Files of a user appeared in the folder while the build ran.
            StorageError: A file cannot be written.
        """
        with storage_errors(self.root):
            found = self._check_unchanged()
            staged = self.stage(manifest, evaluation)
            if CARD_NAME in found or not os.path.lexists(self.root / CARD_NAME):
                staged.insert(-1, self.stage_card(card))
            else:
                card_notice(self.root).log()
            names = {name for _, name in staged}
            # Shards of groups that have not changed stay where the previous build put them.
            staged = [(path, name) for path, name in staged if not self._is_in_place(path, name)]
            # Found before the first move, so that the commit is not left half done.
            _check_writable(self.root, names | self.previous)
            commit_content = commit_bytes(sorted(names | self.previous))
            write_bytes(self.work / COMMIT_NAME, commit_content)
            _move_into_place(self.root, staged)
            # Manifests are removed first, so that no reader takes the rest for a build.
            obsolete = sorted(
                self.previous - names, key=lambda name: not name.endswith(MANIFEST_NAME)
            )
            _remove(self.root, obsolete)
            self.clean(keep_spill=keep_spill)
        return self.root

    def clean(self, *, keep_spill: bool) -> None:
        """Remove the files of this build from the work folder, apart from spills to keep."""
        _clean_work_folder(self.work, keep_spill=keep_spill)

    def _is_in_place(self, path: Path, name: str) -> bool:
        return name in self.previous and not path.exists() and (self.root / name).exists()

    def _check_unchanged(self) -> set[str]:
        """Check that no other program put files into the folder while the build ran.

        Returns:
            The paths that earlier builds put in place.
        """
        found = check_contents(self.root, overwrite=True)
        if appeared := found - self.previous:
            raise user_files_error(self.root, sorted(appeared))
        return found

    def stage_card(self, card: bytes) -> tuple[Path, str]:
        """Write the data card to the work folder; return it with its final name."""
        write_bytes(self.work / CARD_NAME, card)
        return self.work / CARD_NAME, CARD_NAME

    def stage(self, manifest: Manifest, evaluation: Manifest | None) -> list[tuple[Path, str]]:
        """Write the manifests to the work folder; list all files with their final names.

        The files are moved in this order. The manifest of the training build is the last one: it
        names all other files, so moving it commits the build and its evaluation build.
        """
        staged = _staged_files(self.work, "", manifest)
        if evaluation is not None:
            staged += _staged_files(self.work, f"{EVAL_FOLDER}/", evaluation)
            name = f"{EVAL_FOLDER}/{manifest.eval['manifest']}"
            staged.append((self.work / EVAL_FOLDER / MANIFEST_NAME, name))
            write_bytes(staged[-1][0], manifest_bytes(evaluation))
        staged.append((self.work / MANIFEST_NAME, MANIFEST_NAME))
        write_bytes(staged[-1][0], manifest_bytes(manifest))
        return staged


def _staged_files(work: Path, prefix: str, manifest: Manifest) -> list[tuple[Path, str]]:
    """List the files of a build apart from its manifest, with their final names.

    Args:
        work: The work folder.
        prefix: The path of the build in the output folder: "", or "eval/".
        manifest: Its manifest.
    """
    names = [*tokenizer_paths(manifest.tokenizer)]
    for entry, group in zip(manifest.groups, manifest.read_groups(), strict=True):
        names += (f"{prefix}{name}" for name in files_of_group(entry, group))
    return [(work / name, name) for name in names]


@contextmanager
def claim_output(root: Path, *, overwrite: bool) -> Iterator[OutputFolder]:
    """Create the output folder, and hold it while the block runs.

    Args:
        root: The output folder.
        overwrite: Whether a finished build in it may be replaced.

    Raises:
        OutputExists: The folder contains a finished build that may not be replaced, or files of a
            user, or it is inside the folder of another build.
        OutputBusy: Another build holds the folder.
        StorageError: The folder cannot be written.
    """
    with created_folders(root):
        with storage_errors(root):
            if not has_work_folder(root):
                check_contents(root, overwrite=overwrite)
                create_work_folder(root)
        with _hold_folder(root, overwrite=overwrite) as output:
            yield output


@contextmanager
def created_folders(root: Path) -> Iterator[None]:
    """Create the output folder while the block runs.

    At the end, the folder and its parents are removed if this build created them and they are
    empty.
    """
    with storage_errors(root):
        check_not_in_build(root)
        created = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in created:
            _remove_empty(folder)


@contextmanager
def _hold_folder(root: Path, *, overwrite: bool) -> Iterator[OutputFolder]:
    """Hold an output folder with a marked work folder while the block runs.

    The spills of a build that fails are kept and reused. If there are none, the work folder is
    removed as well, unless its marker says that a user created it.
    """
    work = root / WORK_FOLDER
    remedy = f"wait until it has ended, or choose another {setting('output')} folder"
    with exclusive(work / LOCK_NAME, "another build, or a part of one,", root, remedy=remedy):
        with storage_errors(root):
            # Checked again, because another build may have ended since the first check.
            previous = check_contents(root, overwrite=overwrite)
            if not has_work_folder(root):
                create_work_folder(root)
            marker = os.lstat(work / MARKER_NAME)
            is_created = is_work_folder_created(work)
            _remove_abandoned_parents(root)
        try:
            yield OutputFolder(root=root, previous=frozenset(previous))
        finally:
            if all(_USELESS_NAME.fullmatch(name) for name in work_files(work)):
                _clean_work_folder(work, keep_spill=False)
                # While the lock is held, no other build marks or locks the folder.
                if _is_same_file(work / MARKER_NAME, marker):
                    names = {name for name, _ in list_paths(work)}
                    if is_created and names <= HELD_NAMES:
                        _remove_work_folder(root)
                    else:
                        (work / MARKER_NAME).unlink(missing_ok=True)


# --- the work folder ------------------------------------------------------------------------------


def create_work_folder(root: Path) -> None:
    """Create and mark the work folder.

    It is created in a temporary parent and moved, so that it has its marker from the start: after a
    kill between the two steps, nothing would tell an empty folder from one of a user, and it would
    stay for good.
    """
    work = root / WORK_FOLDER
    if work.exists():
        # A lock without a marker is what a kill leaves at the end of a build, which created the
        # folder. Otherwise a user created it.
        mark_work_folder(root, created=is_file(work / LOCK_NAME))
        return
    parent = root / temporary_name(WORK_FOLDER)
    try:
        (parent / WORK_FOLDER).mkdir(parents=True)
        mark_work_folder(parent, created=True)
        os.rename(parent / WORK_FOLDER, work)
    except (OSError, StorageError):
        # Another build may have been faster; its lock shows whether it still runs.
        if not has_work_folder(root):
            raise
    finally:
        _remove_temporary_parent(parent)


def _remove_work_folder(root: Path) -> None:
    """Remove a work folder of a build, with its marker and lock.

    It is moved to a temporary parent first, for the same reason as in `create_work_folder`.
    """
    parent = root / temporary_name(WORK_FOLDER)
    with suppress(OSError):  # a folder that cannot be removed stays marked, for the next build
        parent.mkdir()
        os.rename(root / WORK_FOLDER, parent / WORK_FOLDER)
    _remove_temporary_parent(parent)


def _remove_temporary_parent(parent: Path) -> None:
    """Remove the temporary parent of a work folder, with all files of builds in it."""
    work = parent / WORK_FOLDER
    with suppress(OSError):
        for name in list(work_files(work)):
            (work / name).unlink(missing_ok=True)
    _remove_empty(work)
    _remove_empty(parent)


def _remove_abandoned_parents(root: Path) -> None:
    """Remove the temporary parents left by killed builds."""
    for name, is_regular in list_paths(root):
        if not is_regular and is_temporary_name(name) and is_folder(root / name):
            _remove_temporary_parent(root / name)


def _clean_work_folder(work: Path, *, keep_spill: bool) -> None:
    """Remove the files of builds in a work folder, except the marker and the lock.

    Args:
        work: The work folder.
        keep_spill: Whether to keep the spills and the recipes too.
    """
    for name in list(work_files(work)):
        if name not in HELD_NAMES and not (keep_spill and REUSABLE_NAME.fullmatch(name)):
            (work / name).unlink(missing_ok=True)
    _remove_empty_folders(work)


# --- changes to the folder ------------------------------------------------------------------------


def _check_writable(root: Path, names: set[str]) -> None:
    """Raise StorageError if a file cannot be moved into a folder, or removed from it."""
    for folder in {root / parent for name in names for parent in Path(name).parents}:
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            with storage_errors(folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _move_into_place(root: Path, staged: list[tuple[Path, str]]) -> None:
    """Move files to their final names, in order.

    Before the data card and the manifest are moved, the folders of all files before them are synced
    to the disk.
    """
    for _, name in staged:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    unsynced: set[Path] = {root}
    for path, name in staged:
        if name in (CARD_NAME, MANIFEST_NAME):
            for folder in unsynced:
                sync_folder(folder)
            unsynced = set()
        os.replace(path, root / name)
        unsynced |= {root / parent for parent in Path(name).parents}
    sync_folder(root)


def _remove(root: Path, names: list[str]) -> None:
    """Remove files, and emptied folders below `root`."""
    for name in names:
        (root / name).unlink(missing_ok=True)
    folders = {parent for name in names for parent in Path(name).parents if parent.name}
    # The deepest folders first.
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        _remove_empty(root / folder)


def _remove_empty_folders(work: Path) -> None:
    """Remove the empty folders of a build in a work folder, the deepest ones first."""
    for folder, _, _ in os.walk(work, topdown=False):
        name = os.path.relpath(folder, work)
        if BUILD_FOLDERS.fullmatch(name):
            _remove_empty(Path(folder))


def _is_same_file(path: Path, status: os.stat_result) -> bool:
    """Return whether a path still is the file with this status."""
    try:
        return os.path.samestat(os.lstat(path), status)
    except FileNotFoundError:
        return False


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it does not exist, or is not empty
        folder.rmdir()

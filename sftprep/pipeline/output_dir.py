"""The output folder: which of its paths belong to builds, and how a build is put in place.

A build works in `OUTPUT/spill`, a folder that it creates and marks as its own. Everything that is
not final is in there: spills, recipes, finished shards, manifests. The commit
1. writes the names of the files that it puts in place, and those of the build before, to
   `spill/commit.json`;
2. moves the files to these names, the manifest last: until then, a reader sees the build before;
3. removes what only the build before has, and the work folder.

A file is removed or replaced only if its content shows that a build wrote it, and it is in the
marked work folder, or the manifest of the build in the folder or `commit.json` names it; a damaged
shard that the manifest names is replaced too. Any other file belongs to somebody else: the build
refuses to start, or to commit, and names it. Hidden files stay where they are, and links are never
followed.
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
from sftprep.errors import ManifestError, OutputExists, StorageError
from sftprep.shards.layout import (
    COMMIT_NAME,
    EVAL_FOLDER,
    LOCK_NAME,
    MANIFEST_NAME,
    MARKER_NAME,
    RECIPE_PATTERN,
    REJECTED_NAME,
    SHARD_FOLDER,
    SPILL_PATTERN,
    WORK_FOLDER,
    has_work_folder,
    is_build_folder,
    is_file,
    is_folder,
    is_work_folder_created,
    mark_work_folder,
)
from sftprep.shards.locks import exclusive
from sftprep.shards.manifest import Manifest, read_manifest
from sftprep.shards.manifest_size import manifest_bytes
from sftprep.shards.ownership import commit_bytes, committed_names, is_final_file, is_work_file
from sftprep.shards.schema import SHARD_PATTERN

_FINAL_NAME = re.compile(rf"(eval/)?(manifest\.json|shards/{SHARD_PATTERN})|rejected\.jsonl")
"""Paths in the output folder that builds put in place."""
_KEPT_NAMES = {MARKER_NAME, LOCK_NAME}
"""Names in the work folder that stay while a build holds it."""
_SPILL_NAME = re.compile(rf"{SPILL_PATTERN}|{RECIPE_PATTERN}")
"""Paths in the work folder that --keep-spill keeps besides those."""
_WORTHLESS_NAME = re.compile(rf"{'|'.join(map(re.escape, _KEPT_NAMES))}|{RECIPE_PATTERN}")
"""Paths in the work folder that save no work if there is nothing else."""


@dataclass(frozen=True, kw_only=True)
class OutputFolder:
    """An output folder that this build has claimed.

    root: the folder; before: the paths in it that earlier builds put in place, relative to it.
    """

    root: Path
    before: frozenset[str]

    @property
    def work(self) -> Path:
        """Folder of the spills, the recipes and whatever is not committed yet."""
        return self.root / WORK_FOLDER

    def staging(self, *, evaluation: bool) -> Path:
        """Create the folder in which shards are written before the commit."""
        folder = self.work / (EVAL_FOLDER if evaluation else SHARD_FOLDER)
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def commit(self, manifest: Manifest, evaluation: Manifest | None, *, keep_spill: bool) -> None:
        """Put a finished build in place of the one before.

        In each of these cases but a disk error between the moves, the build before is as it was.

        Raises:
            ConfigError: a manifest is larger than what can be read back.
            OutputExists: files of somebody else appeared in the folder while the build ran.
            StorageError: a file cannot be written.
        """
        with storage_errors(self.root):
            self._check_unchanged()
            staged = self._staged(manifest, evaluation)
            names = {name for _, name in staged}
            _check_writable(self.root, names | self.before)
            write_bytes(self.work / COMMIT_NAME, commit_bytes(sorted(names | self.before)))
            _move_into_place(self.root, staged)
            # The manifest first, so that nobody takes what is left for a build.
            left = sorted(self.before - names, key=lambda name: not name.endswith(MANIFEST_NAME))
            _remove(self.root, left)
            _clean_work_folder(self.work, keep_spill=keep_spill)

    def _check_unchanged(self) -> None:
        """Check that nobody else put files into the folder while the build ran."""
        appeared = _check_contents(self.root, overwrite=True) - self.before
        if appeared:
            raise _foreign_files(self.root, sorted(appeared))

    def _staged(self, manifest: Manifest, evaluation: Manifest | None) -> list[tuple[Path, str]]:
        """Write the manifests to the work folder, and list all files with their final names.

        They are moved in this order: where the manifest of the build is, all of it is.
        """
        work, last = self.work, []
        held_out = () if evaluation is None else evaluation.shards
        if evaluation is not None:
            last.append((work / f"eval-{MANIFEST_NAME}", f"{EVAL_FOLDER}/{MANIFEST_NAME}"))
            write_bytes(last[-1][0], manifest_bytes(evaluation))
        if (work / REJECTED_NAME).exists():
            last.append((work / REJECTED_NAME, REJECTED_NAME))
        last.append((work / MANIFEST_NAME, MANIFEST_NAME))
        write_bytes(last[-1][0], manifest_bytes(manifest))
        return [
            *((work / SHARD_FOLDER / s.name, f"{SHARD_FOLDER}/{s.name}") for s in manifest.shards),
            *(
                (work / EVAL_FOLDER / s.name, f"{EVAL_FOLDER}/{SHARD_FOLDER}/{s.name}")
                for s in held_out
            ),
            *last,
        ]


@contextmanager
def claim_output(root: Path, *, overwrite: bool) -> Iterator[OutputFolder]:
    """Create the output folder and hold it while the build runs.

    Raises:
        OutputExists: it holds a finished build (without `overwrite`), or files of somebody else, or
            it is in the folder of another build.
        OutputBusy: another build holds it.
        StorageError: it cannot be written.
    """
    with _created_folders(root):
        with storage_errors(root):
            if not has_work_folder(root):
                _check_contents(root, overwrite=overwrite)
                _mark(root)
        with _held(root, overwrite=overwrite) as output:
            yield output


@contextmanager
def _created_folders(root: Path) -> Iterator[None]:
    """Create the output folder while the block runs.

    At the end, it and its parents are removed if this build created them and left nothing there.
    """
    with storage_errors(root):
        _check_not_in_build(root)
        created = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in created:
            _remove_empty(folder)


@contextmanager
def _held(root: Path, *, overwrite: bool) -> Iterator[OutputFolder]:
    """Hold an output folder with a marked work folder while the block runs.

    What a build did before it failed is kept and reused. If there is nothing to keep, the work
    folder is removed as well, unless the marker says that a user created it.
    """
    work = root / WORK_FOLDER
    remedy = "wait for it to end, or give another --output"
    with exclusive(work / LOCK_NAME, "another build", root, remedy=remedy):
        with storage_errors(root):
            # Another build may have ended since the first look.
            before = _check_contents(root, overwrite=overwrite)
            if not has_work_folder(root):
                _mark(root)
            marker = os.lstat(work / MARKER_NAME)
            is_created = is_work_folder_created(work)
            _remove_left_transits(root)
        try:
            yield OutputFolder(root=root, before=frozenset(before))
        finally:
            if all(_WORTHLESS_NAME.fullmatch(name) for name in _work_files(work)):
                _clean_work_folder(work, keep_spill=False)
                # While the lock is held, nobody else marks the folder or locks it.
                if _is_same_file(work / MARKER_NAME, marker):
                    if is_created and {name for name, _ in _entries(work, set())} <= _KEPT_NAMES:
                        _remove_work_folder(root)
                    else:
                        (work / MARKER_NAME).unlink(missing_ok=True)


def _check_not_in_build(root: Path) -> None:
    """Raises OutputExists where a folder is inside the folder of another build."""
    for parent in Path(os.path.realpath(root)).parents:
        if is_build_folder(parent):
            raise OutputExists(
                f"{root} is inside {parent}, which holds a build",
                remedy="give an --output folder outside of it",
            )


def _mark(root: Path) -> None:
    """Create and mark the work folder.

    A folder that a build creates has its marker from the start: after a kill between the two, an
    empty folder could be a user's and would stay for good.
    """
    work = root / WORK_FOLDER
    if work.exists():
        # Our lock is all that is left where a kill hit the end of a build, after the marker.
        mark_work_folder(root, created=is_file(work / LOCK_NAME))
        return
    transit = root / temporary_name(WORK_FOLDER)
    try:
        (transit / WORK_FOLDER).mkdir(parents=True)
        mark_work_folder(transit, created=True)
        os.rename(transit / WORK_FOLDER, work)
    except (OSError, StorageError):
        # Another build may have been faster; whether it still runs is seen from its lock.
        if not has_work_folder(root):
            raise
    finally:
        _remove_transit(transit)


def _remove_work_folder(root: Path) -> None:
    """Remove a work folder that a build created, with the marker and the lock in it.

    It leaves its name first, whole, for the same reason as in `_mark`.
    """
    transit = root / temporary_name(WORK_FOLDER)
    with suppress(OSError):  # a folder that cannot be removed stays marked, and the next build's
        transit.mkdir()
        os.rename(root / WORK_FOLDER, transit / WORK_FOLDER)
    _remove_transit(transit)


def _remove_transit(transit: Path) -> None:
    """Remove a folder that held a work folder before it had its name, or after."""
    work = transit / WORK_FOLDER
    with suppress(OSError):
        for name in list(_work_files(work)):
            (work / name).unlink(missing_ok=True)
    _remove_empty(work)
    _remove_empty(transit)


def _remove_left_transits(root: Path) -> None:
    """Remove what builds that were killed in `_mark` or `_remove_work_folder` left."""
    for name, regular in _entries(root, set()):
        if not regular and is_temporary_name(name) and is_folder(root / name):
            _remove_transit(root / name)


# --- whose paths are in the folder -------------------------------------------------------------


def _check_contents(root: Path, *, overwrite: bool) -> set[str]:
    """Return the paths in a folder that earlier builds put in place.

    Raises:
        OutputExists: there are others, or a finished build that is not to be replaced.
    """
    manifest, problem = _manifest_in(root)
    known = _known_paths(root, manifest)
    own: set[str] = set()
    folders = {SHARD_FOLDER, EVAL_FOLDER, f"{EVAL_FOLDER}/{SHARD_FOLDER}", WORK_FOLDER}
    if has_work_folder(root):
        own = {f"{WORK_FOLDER}/{name}" for name in _work_files(root / WORK_FOLDER)}
        folders |= {f"{WORK_FOLDER}/{SHARD_FOLDER}", f"{WORK_FOLDER}/{EVAL_FOLDER}"}
    elif _is_left_lock(root / WORK_FOLDER / LOCK_NAME):
        own = {f"{WORK_FOLDER}/{LOCK_NAME}"}
    found = {name: regular for name, regular in _entries(root, folders) if "/." not in f"/{name}"}
    foreign = sorted(
        name for name, regular in found.items() if not (regular and name in known | own)
    )
    if foreign:
        raise _foreign_files(root, foreign, problem)
    if manifest is not None and not overwrite:
        inputs = ", ".join(info.path for info in manifest.inputs[:3])
        raise OutputExists(
            f"{root} holds a finished build of {manifest.rows:,} packs from {inputs}",
            remedy="give --overwrite to replace it, or another --output",
        )
    return known & found.keys()


def _foreign_files(root: Path, names: list[str], problem: str = "") -> OutputExists:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return OutputExists(
        f"{root} holds files that do not belong to a build in it: "
        f"{', '.join(names[:5])}{more}" + (f" ({problem})" if problem else ""),
        remedy="give an --output folder that is new or empty, or move these files away",
    )


def _is_left_lock(path: Path) -> bool:
    """Whether a lock without a marker is what a kill left, at the end of a build."""
    return (
        is_folder(path.parent)
        and is_file(path)
        and path.stat().st_size > 0
        and (is_work_file(path.parent, path.name))
    )


def _known_paths(root: Path, manifest: Manifest | None) -> set[str]:
    """Return the paths that the manifests in a folder and its `commit.json` name.

    A name alone proves nothing: a user may have put a file there since, or have written the
    `commit.json`. Only shards that a manifest names count without a look at them, since a rebuild
    is what repairs damaged ones.
    """
    known = _committed_names(root) if has_work_folder(root) else set()
    unproven = known | {REJECTED_NAME}
    if manifest is not None:
        named = _names_of(manifest)
        evaluation = None
        if manifest.eval.get("folder") == EVAL_FOLDER and is_folder(root / EVAL_FOLDER):
            evaluation, _ = _manifest_in(root / EVAL_FOLDER)
        # With another digest, it is a build of its own that somebody made in this folder.
        if evaluation is not None and evaluation.digest == manifest.eval.get("digest"):
            names = _names_of(evaluation)
            named |= {f"{EVAL_FOLDER}/{name}" for name in names - {REJECTED_NAME}}
            named |= names & {REJECTED_NAME}
        known |= named
        unproven -= named - {REJECTED_NAME}
    return known - {name for name in unproven if not _is_own(root / name)}


def _is_own(path: Path) -> bool:
    return is_file(path) and is_final_file(path)


def _committed_names(root: Path) -> set[str]:
    path = root / WORK_FOLDER / COMMIT_NAME
    names = committed_names(path) if is_file(path) else None
    return {name for name in names or () if _FINAL_NAME.fullmatch(name)}


def _manifest_in(folder: Path) -> tuple[Manifest | None, str]:
    """Return the manifest in a folder, or None and what is wrong with it."""
    if not is_file(folder / MANIFEST_NAME):
        return None, ""
    try:
        return read_manifest(folder), ""
    except ManifestError as error:
        return None, error.message


def _names_of(manifest: Manifest) -> set[str]:
    names = {MANIFEST_NAME, *(f"{SHARD_FOLDER}/{info.name}" for info in manifest.shards)}
    accounting = manifest.accounting
    if accounting.rejected or {"duplicate", "near_duplicate"} & accounting.left_out.keys():
        names.add(REJECTED_NAME)
    return names


def _work_files(work: Path) -> Iterator[str]:
    """Yield the files in a work folder that builds have put there, relative to it."""
    if not is_folder(work):
        return
    for name, regular in _entries(work, {SHARD_FOLDER, EVAL_FOLDER}):
        if regular and is_work_file(work, name):
            yield name


def _entries(root: Path, folders: set[str]) -> list[tuple[str, bool]]:
    """List a folder: each path relative to it, and whether it is a regular file.

    folders: these are entered and not listed, where they are folders and not links to one.
    """
    found, waiting = [], [""]
    while waiting:
        inside = waiting.pop()
        with os.scandir(root / inside) as entries:
            for entry in entries:
                name = inside + entry.name
                if name in folders and entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{name}/")
                else:
                    found.append((name, entry.is_file(follow_symlinks=False)))
    return found


# --- changes to the folder ---------------------------------------------------------------------


def _check_writable(root: Path, names: set[str]) -> None:
    """Raises StorageError where a file cannot be put into a folder, or removed from it."""
    for folder in {root / parent for name in names for parent in Path(name).parents}:
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            with storage_errors(folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _move_into_place(root: Path, staged: list[tuple[Path, str]]) -> None:
    """Rename files, in order; each is on the disk under its name before a manifest is."""
    for _, name in staged:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    unsynced: set[Path] = {root}
    for path, name in staged:
        if name.endswith(MANIFEST_NAME):
            for folder in unsynced:
                sync_folder(folder)
            unsynced = set()
        os.replace(path, root / name)
        unsynced.add((root / name).parent)
    sync_folder(root)


def _remove(root: Path, names: list[str]) -> None:
    """Remove files, and the folders below `root` that are empty then."""
    for name in names:
        (root / name).unlink(missing_ok=True)
    folders = {parent for name in names for parent in Path(name).parents if parent.name}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        _remove_empty(root / folder)


def _clean_work_folder(work: Path, *, keep_spill: bool) -> None:
    """Remove what builds have put into a work folder, but for the marker, the lock and, if they are
    kept, the spills."""
    for name in list(_work_files(work)):
        if name not in _KEPT_NAMES and not (keep_spill and _SPILL_NAME.fullmatch(name)):
            (work / name).unlink(missing_ok=True)
    for folder in (SHARD_FOLDER, EVAL_FOLDER):
        _remove_empty(work / folder)


def _is_same_file(path: Path, status: os.stat_result) -> bool:
    """Whether a file is still the one with this status."""
    try:
        return os.path.samestat(os.lstat(path), status)
    except FileNotFoundError:
        return False


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not there, or not empty
        folder.rmdir()

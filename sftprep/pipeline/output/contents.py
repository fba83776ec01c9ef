"""Contents of an output folder, and their owners: builds or a user.

A build removes or replaces a file only if the content of the file shows that a build wrote it, and
one of these holds:

1. the file is in the marked work folder;
2. the manifest of the build in the folder names it;
3. `commit.json`, which an interrupted commit leaves, names it.

A damaged shard that the manifest names is replaced as well, because a new build is what repairs it.
Every other file belongs to a user: the build refuses to start, or to commit, and names the file.
Hidden files are ignored, and so is a `README.md` that no build wrote. Links are never followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from sftprep.core.notices import Notice
from sftprep.errors import ManifestError, OutputExists, format_count, setting
from sftprep.shards.group import files_of_group
from sftprep.shards.layout import (
    BUILD_FOLDERS,
    CARD_NAME,
    COMMIT_NAME,
    EVAL_FOLDER,
    EVAL_MANIFEST_PATTERN,
    GROUP_FILE_PATTERN,
    GROUP_FOLDER,
    LEASE_NAME,
    LOCK_NAME,
    REJECTED_FOLDER,
    SHARD_FOLDER,
    TOKENIZER_FILES,
    TOKENIZER_PATTERN,
    WORK_FOLDER,
    group_path,
    has_work_folder,
    is_build_folder,
    is_file,
    is_folder,
    manifest_file,
    rejected_path,
    tokenizer_paths,
)
from sftprep.shards.manifest import Manifest, read_manifest
from sftprep.shards.ownership import committed_names, is_final_file, is_work_file
from sftprep.shards.schema import SHARD_PATTERN
from sftprep.stores.folder import BuildFolder

FINAL_NAME = re.compile(
    rf"(eval/)?(manifest\.json|{SHARD_FOLDER}/{SHARD_PATTERN}"
    rf"|{GROUP_FOLDER}/{GROUP_FILE_PATTERN}\.(json|index)"
    rf"|{REJECTED_FOLDER}/{GROUP_FILE_PATTERN}\.jsonl)"
    rf"|eval/{EVAL_MANIFEST_PATTERN}"
    rf"|{TOKENIZER_PATTERN}/({'|'.join(TOKENIZER_FILES)})"
)
"""Paths in the output folder to which a commit moves files, apart from the data card."""
NOT_THE_SAME = "which is not known to have the inputs, settings and versions of this command"
"""The description of a finished build that is not up to date; data in memory cannot be compared."""
_OLD_REJECTED_NAME = "rejected.jsonl"
"""The rejected records of a build before version 2.0."""


def check_not_in_build(root: Path) -> None:
    """Check that a folder is not inside the folder of another build.

    Raises:
        OutputExists: It is.
    """
    for parent in Path(os.path.realpath(root)).parents:
        if is_build_folder(parent):
            raise inside_build_error(root, parent)


def inside_build_error(root: BuildFolder, parent: BuildFolder) -> OutputExists:
    """Return the error for an output folder inside the folder of another build."""
    return OutputExists(
        f"{root} is inside {parent}, which holds a build",
        remedy=f"choose an {setting('output')} folder outside of it",
    )


def check_contents(root: Path, *, overwrite: bool) -> set[str]:
    """Check that an output folder may be used; return the paths of the build in it.

    Args:
        root: The output folder.
        overwrite: Whether a finished build in the folder may be replaced.

    Returns:
        The paths that earlier builds put in place, relative to `root`.

    Raises:
        OutputExists: The folder contains files of a user, or a finished build that may not be
            replaced.
    """
    manifest, problem = _read_manifest_in(root)
    # 1. The paths that may be replaced: those of the build in the folder, and the work files.
    final_paths = _final_paths(root, manifest)
    # These folders are entered, and everything in them must belong to a build too.
    folders = re.compile(rf"{BUILD_FOLDERS.pattern}|{WORK_FOLDER}")
    work_paths: set[str] = set()
    if has_work_folder(root):
        work_paths = {f"{WORK_FOLDER}/{name}" for name in work_files(root / WORK_FOLDER)}
        in_work = rf"{WORK_FOLDER}/({BUILD_FOLDERS.pattern})"
        folders = re.compile(rf"{folders.pattern}|{in_work}")
    elif _is_abandoned_lock(root / WORK_FOLDER / LOCK_NAME):
        work_paths = {f"{WORK_FOLDER}/{LOCK_NAME}", f"{WORK_FOLDER}/{LEASE_NAME}"}
    # 2. Everything else belongs to a user, apart from hidden paths; so does a folder or a link with
    # one of our names.
    found = {name: regular for name, regular in list_paths(root, folders) if "/." not in f"/{name}"}
    user_paths = sorted(
        name
        for name, is_regular in found.items()
        if name != CARD_NAME and not (is_regular and name in final_paths | work_paths)
    )
    if user_paths:
        raise user_files_error(root, user_paths, problem)
    if manifest is not None and not overwrite:
        raise _finished_build_error(root, manifest)
    return final_paths & found.keys()


def check_not_finished(root: Path) -> None:
    """Check that an output folder has no finished build.

    Raises:
        OutputExists: It has one.
    """
    manifest, _ = _read_manifest_in(root)
    if manifest is not None:
        raise _finished_build_error(root, manifest)


def _finished_build_error(root: Path, manifest: Manifest) -> OutputExists:
    paths = [info.path for info in manifest.inputs]
    more = f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""
    inputs = ", ".join(paths[:3]) + more
    return OutputExists(
        f"{root} holds a finished build of {format_count(manifest.rows, 'pack')} from {inputs},"
        f" {NOT_THE_SAME}",
        remedy=[
            f"replace it with {setting('overwrite', True)}",
            f"choose another {setting('output')} folder",
        ],
    )


def user_files_error(root: BuildFolder, names: list[str], problem: str = "") -> OutputExists:
    """Return the error for a user's files in an output folder.

    Args:
        root: The output folder.
        names: The paths of the files, relative to `root`.
        problem: Why the manifest in the folder does not name them, if it is damaged.
    """
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return OutputExists(
        f"{root} holds files that do not belong to a build in it: "
        f"{', '.join(names[:5])}{more}" + (f" ({problem})" if problem else ""),
        remedy=[
            f"choose an {setting('output')} folder that is new or empty",
            "move these files to another folder",
        ],
    )


def card_notice(root: object) -> Notice:
    """Return the notice that a `README.md` of a user stays in the output."""
    return Notice(
        f"{root}/{CARD_NAME} is not a data card as a build wrote it, so it stays as it is, and may"
        " list other files than those of the build",
        remedy="remove or rename it, and build again, to get the data card",
    )


def work_files(work: Path) -> Iterator[str]:
    """Yield the files of builds in a work folder, relative to it."""
    if not is_folder(work):
        return
    for name, is_regular in list_paths(work, BUILD_FOLDERS):
        if is_regular and is_work_file(work, name):
            yield name


def list_paths(root: Path, folders: re.Pattern[str] | None = None) -> list[tuple[str, bool]]:
    """List the paths in a folder.

    Args:
        root: The folder.
        folders: The pattern of paths that are entered and not listed, if they are folders and not
            links; None if there are none.

    Returns:
        Each path, relative to `root`, and whether it is a regular file.
    """
    found, to_enter = [], [""]
    while to_enter:
        parent = to_enter.pop()
        with os.scandir(root / parent) as entries:
            for entry in entries:
                name = parent + entry.name
                is_entered = folders is not None and folders.fullmatch(name)
                if is_entered and entry.is_dir(follow_symlinks=False):
                    to_enter.append(f"{name}/")
                else:
                    found.append((name, entry.is_file(follow_symlinks=False)))
    return found


def _is_abandoned_lock(path: Path) -> bool:
    """Return whether a kill at the end of a build left a lock without a marker."""
    return (
        is_folder(path.parent)
        and is_file(path)
        and path.stat().st_size > 0
        and is_work_file(path.parent, path.name)
    )


def _final_paths(root: Path, manifest: Manifest | None) -> set[str]:
    """Return the paths named by the manifests in a folder and by its `commit.json`.

    A name alone proves nothing: a user may have replaced the file, or have written the
    `commit.json`. So every file is examined, except the shards that a manifest names: a new build
    is what repairs damaged ones.
    """
    to_examine = _committed_paths(root) if has_work_folder(root) else set()
    listed: set[str] = set()
    if manifest is not None:
        to_examine.add(CARD_NAME)
        _add_paths(root, "", manifest, listed, to_examine)
        evaluation = None
        if manifest.eval.get("folder") == EVAL_FOLDER and is_folder(root / EVAL_FOLDER):
            evaluation, _ = _read_manifest_in(root / EVAL_FOLDER)
        # With another digest, it is a separate build that a user made in this folder.
        if evaluation is not None and evaluation.digest == manifest.eval.get("digest"):
            _add_paths(root, f"{EVAL_FOLDER}/", evaluation, listed, to_examine)
    return listed | {name for name in to_examine - listed if _is_build_file(root / name)}


def _is_build_file(path: Path) -> bool:
    return is_file(path) and is_final_file(path)


def _committed_paths(root: Path) -> set[str]:
    """Return the paths named by `commit.json` in the work folder."""
    path = root / WORK_FOLDER / COMMIT_NAME
    names = committed_names(path) if is_file(path) else None
    return {name for name in names or () if name == CARD_NAME or FINAL_NAME.fullmatch(name)}


def _read_manifest_in(folder: Path) -> tuple[Manifest | None, str]:
    """Return the manifest in a folder, or None with an error message.

    The message is "" without a manifest.
    """
    if not is_file(manifest_file(folder)):
        return None, ""
    try:
        return read_manifest(folder), ""
    except ManifestError as error:
        return None, error.message


def _add_paths(
    root: Path, prefix: str, manifest: Manifest, listed: set[str], to_examine: set[str]
) -> None:
    """Add the paths that a manifest names.

    Args:
        root: The output folder.
        prefix: The path of the build in it: "", or "eval/".
        manifest: The manifest.
        listed: Receives the manifest, the files of its groups, and their shards.
        to_examine: Receives the paths that belong to the build only if their content shows it.
    """
    listed.add(prefix + manifest_file(root / prefix).name)
    to_examine.update(tokenizer_paths(manifest.tokenizer))
    for number, entry in enumerate(manifest.groups):
        rejected = rejected_path(entry.key, entry.rejected) if entry.rejected else None
        if rejected is not None:
            to_examine.add(prefix + rejected)
        elif not manifest.has_slices:
            to_examine.add(_OLD_REJECTED_NAME)
        try:
            names = files_of_group(entry, manifest.read_group(number))
        except ManifestError:
            # The key of the group is known, but not the names of its shards and its index.
            listed.add(prefix + group_path(entry.key, entry.digest))
            to_examine.update(_paths_with_key(root, prefix, entry.key))
            continue
        listed.update(prefix + name for name in names if name != rejected)


def _paths_with_key(root: Path, prefix: str, key: str) -> Iterator[str]:
    """Yield the paths of files that may belong to a group of a build in `root`."""
    for folder, start in ((f"{prefix}{SHARD_FOLDER}/{key}", ""), (f"{prefix}{GROUP_FOLDER}", key)):
        if is_folder(root / folder):
            names = (name for name, _ in list_paths(root / folder) if name.startswith(start))
            yield from (f"{folder}/{name}" for name in names)

"""Names in the folder of a build, and how such a folder is recognised."""

from __future__ import annotations

import json
from pathlib import Path

from sftprep.core.atomic_write import write_bytes
from sftprep.core.regular_files import read_regular_file

MANIFEST_NAME = "manifest.json"
SHARD_FOLDER = "shards"
EVAL_FOLDER = "eval"
WORK_FOLDER = "spill"
"""Everything that an unfinished build writes is in here."""
MARKER_NAME = "build.json"
LOCK_NAME = "lock"
COMMIT_NAME = "commit.json"
REJECTED_NAME = "rejected.jsonl"
SPILL_PATTERN = r"[0-9a-f]{40}\.arrow"
"""Names of spills in the work folder."""
RECIPE_PATTERN = r"recipe-[0-9a-f]{16}\.jsonl"
"""Names of recipes in the work folder."""

LARGEST_MANIFEST = 64 * 1024 * 1024
"""Bytes; a larger manifest is neither read nor written."""

_MARKERS = {
    created: json.dumps(
        {"sftprep": "an unfinished build works in this folder", "created": created}
    ).encode()
    + b"\n"
    for created in (True, False)
}
"""Whether a build created the work folder -> content of the marker in it."""


def mark_work_folder(root: Path, *, created: bool) -> None:
    """Mark a work folder, so that it can be told from a folder of a user.

    Args:
        root: the folder of the build.
        created: whether a build created the work folder; otherwise it is never removed.

    Raises:
        StorageError: it cannot be written.
    """
    write_bytes(root / WORK_FOLDER / MARKER_NAME, _MARKERS[created])


def has_work_folder(root: Path) -> bool:
    """Whether an unfinished build works in a folder, or kept its spills there."""
    return is_folder(root / WORK_FOLDER) and is_marker(root / WORK_FOLDER / MARKER_NAME)


def is_marker(path: Path) -> bool:
    """Whether a file is the marker of a work folder."""
    return _marker_content(path) in _MARKERS.values()


def is_work_folder_created(work: Path) -> bool:
    """Whether the marker of a work folder says that a build created the folder."""
    return _marker_content(work / MARKER_NAME) == _MARKERS[True]


def _marker_content(path: Path) -> bytes:
    try:
        return b"" if path.is_symlink() else read_regular_file(path, 4096)
    except OSError:
        return b""


def is_build_folder(root: Path) -> bool:
    """Whether a folder holds a build of this project, finished or not."""
    return has_work_folder(root) or has_manifest(root / MANIFEST_NAME)


def has_manifest(path: Path) -> bool:
    """Whether a file is the manifest of a build."""
    try:
        content = read_regular_file(path, LARGEST_MANIFEST)
        if len(content) > LARGEST_MANIFEST:
            return False
        found = json.loads(content)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"format_version", "sftprep_version"} <= found.keys()


def is_folder(path: Path) -> bool:
    """Whether a path is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def is_file(path: Path) -> bool:
    """Whether a path is a regular file and not a link to one."""
    return path.is_file() and not path.is_symlink()

"""Names of the files in a build's folder, and tests for such a folder."""

from __future__ import annotations

import json
from pathlib import Path

from sftprep.core.atomic_write import write_bytes
from sftprep.core.regular_files import read_regular_file

MANIFEST_NAME = "manifest.json"
SHARD_FOLDER = "shards"
EVAL_FOLDER = "eval"
WORK_FOLDER = "spill"  # contains everything that an unfinished build writes
MARKER_NAME = "build.json"
LOCK_NAME = "lock"
COMMIT_NAME = "commit.json"
REJECTED_NAME = "rejected.jsonl"
SPILL_PATTERN = r"[0-9a-f]{40}\.arrow"  # names of spills in the work folder
RECIPE_PATTERN = r"recipe-[0-9a-f]{16}\.jsonl"  # names of recipes in the work folder

LARGEST_MANIFEST = 64 * 1024 * 1024
"""Size limit of a manifest in bytes: a larger one is neither read nor written."""

# Content of the marker file, by whether a build created the work folder. These bytes are compared
# exactly, so a change would turn the work folders of earlier versions into folders of a user.
_MARKERS = {
    created: json.dumps(
        {"sftprep": "an unfinished build works in this folder", "created": created}
    ).encode()
    + b"\n"
    for created in (True, False)
}


def mark_work_folder(root: Path, *, created: bool) -> None:
    """Write the marker of a work folder, to tell it from a user's folder.

    Args:
        root: The folder of the build.
        created: Whether a build created the work folder; if not, no build ever removes it.

    Raises:
        StorageError: The marker cannot be written.
    """
    write_bytes(root / WORK_FOLDER / MARKER_NAME, _MARKERS[created])


def has_work_folder(root: Path) -> bool:
    """Return whether a folder contains the work folder of a build."""
    return is_folder(root / WORK_FOLDER) and is_marker(root / WORK_FOLDER / MARKER_NAME)


def is_marker(path: Path) -> bool:
    """Return whether a file has the content of a marker, by which builds know their work folder."""
    return _read_marker(path) in _MARKERS.values()


def is_work_folder_created(work: Path) -> bool:
    """Return whether, according to its marker, a build created a work folder."""
    return _read_marker(work / MARKER_NAME) == _MARKERS[True]


def _read_marker(path: Path) -> bytes:
    try:
        # A link may lead to a file of the user that happens to be a copy of a marker.
        return b"" if path.is_symlink() else read_regular_file(path, 4096)
    except OSError:
        return b""


def is_build_folder(root: Path) -> bool:
    """Return whether a folder holds a build of this project, finished or not."""
    return has_work_folder(root) or has_manifest(root / MANIFEST_NAME)


def has_manifest(path: Path) -> bool:
    """Return whether a file is the manifest of a build."""
    try:
        content = read_regular_file(path, LARGEST_MANIFEST)
        if len(content) > LARGEST_MANIFEST:
            return False
        manifest = json.loads(content)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"format_version", "sftprep_version"} <= manifest.keys()


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def is_file(path: Path) -> bool:
    """Return whether a path is a regular file and not a link to one."""
    return path.is_file() and not path.is_symlink()

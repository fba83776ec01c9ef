"""Names in the folder of a build, and how such a folder is recognised."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sftprep.shards.files import write_bytes

MANIFEST_NAME = "manifest.json"
SHARD_FOLDER = "shards"
EVAL_FOLDER = "eval"
WORK_FOLDER = "spill"
"""Everything that an unfinished build writes is in here."""
MARKER_NAME = "build.json"
REJECTED_NAME = "rejected.jsonl"

LARGEST_MANIFEST = 64 * 1024 * 1024
"""Bytes; a larger manifest is neither read nor written."""

_MARKER = b'{"sftprep": "an unfinished build works in this folder"}\n'


def mark_work_folder(root: Path) -> None:
    """Create the work folder of a build, with the marker that tells it from a folder of a user.

    Raises:
        StorageError: it cannot be written.
    """
    (root / WORK_FOLDER).mkdir(exist_ok=True)
    write_bytes(root / WORK_FOLDER / MARKER_NAME, _MARKER)


def has_work_folder(root: Path) -> bool:
    """Whether an unfinished build works in a folder, or kept its spills there."""
    marker = root / WORK_FOLDER / MARKER_NAME
    return is_folder(root / WORK_FOLDER) and is_file(marker) and marker.read_bytes() == _MARKER


def is_build_folder(root: Path) -> bool:
    """Whether a folder holds a build of this project, finished or not."""
    return has_work_folder(root) or _has_manifest(root)


def _has_manifest(root: Path) -> bool:
    path = root / MANIFEST_NAME
    try:
        if not path.is_file() or os.path.getsize(path) > LARGEST_MANIFEST:
            return False
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"format_version", "sftprep_version"} <= found.keys()


def is_folder(path: Path) -> bool:
    """Whether a path is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def is_file(path: Path) -> bool:
    """Whether a path is a regular file and not a link to one."""
    return path.is_file() and not path.is_symlink()

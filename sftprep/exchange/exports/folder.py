"""The folder of an export: written under a temporary name, and renamed when it is complete.

`export.json` in it names the build, the format and all files. An export is replaced only as a
whole, and only if its folder has no other file. A reader sees the previous export, then, for the
moment between two renames, no folder, and then the new one, and never a part of one.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sftprep.core.atomic_write import (
    is_temporary_name,
    storage_errors,
    sync_folder,
    temporary_name,
    write_bytes,
)
from sftprep.core.regular_files import read_regular_file
from sftprep.errors import OutputExists, setting
from sftprep.pipeline.output.contents import check_not_in_build
from sftprep.pipeline.output.folder import created_folders
from sftprep.shards.layout import is_build_folder, is_folder
from sftprep.shards.locks import exclusive

EXPORT_NAME = "export.json"
_FORMAT_FIELD = "sftprep_export"
_LARGEST_EXPORT_FILE = 64 << 20  # bytes


def read_export(root: Path) -> dict[str, Any] | None:
    """Return the content of `export.json`, or None if the folder has no complete export.

    Args:
        root: The folder. Each listed file must exist and have the listed size.
    """
    try:
        content = json.loads(read_regular_file(root / EXPORT_NAME, _LARGEST_EXPORT_FILE))
        sizes: dict[str, int] = content["files"]
        is_complete = _FORMAT_FIELD in content and all(
            (root / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if is_complete else None


def write_export(root: Path, content: dict[str, Any], target: str) -> dict[str, int]:
    """Write `export.json`, which completes an export; return the sizes of the other files."""
    sizes = {name: (root / name).stat().st_size for name in _list_files(root)}
    listed = {_FORMAT_FIELD: target, **content, "files": sizes}
    write_bytes(root / EXPORT_NAME, json.dumps(listed, indent=1, sort_keys=True).encode() + b"\n")
    return sizes


@contextmanager
def hold_folder(root: Path) -> Iterator[None]:
    """Keep other exports from the same folder while the block runs.

    What exports that were killed left next to the folder is removed, except for the previous export
    if one of them was killed between the two renames: it gets its name back.

    Raises:
        OutputExists: The folder is a build, or inside of one.
        OutputBusy: Another export holds it.
        StorageError: The parent folder cannot be written.
    """
    if is_build_folder(root):
        raise OutputExists(
            f"{root} contains a build", remedy=f"choose another {setting('output')} folder"
        )
    check_not_in_build(root)
    with storage_errors(root):
        if not root.is_dir() and os.path.lexists(root):
            raise OutputExists(
                f"{root} is not a folder", remedy=f"choose another {setting('output')} folder"
            )
    remedy = f"wait until it has ended, or choose another {setting('output')} folder"
    lock = root.with_name(f".{root.name}.lock")
    with created_folders(root), exclusive(lock, "another export", root, remedy=remedy):
        with storage_errors(root):
            for path in root.parent.glob(f".{glob.escape(root.name)}.*.tmp"):
                if not is_temporary_name(path.name) or not is_folder(path):
                    continue
                if read_export(path) and not os.listdir(root):
                    os.rename(path, root)
                else:
                    shutil.rmtree(path)
        yield


@contextmanager
def replace_folder(root: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder, which replaces `root` when the block ends without an error.

    Args:
        root: The folder of the export, which the caller holds.
        overwrite: Whether an export in it may be replaced.

    Raises:
        OutputExists: The folder contains files that are not those of an export, or an export that
            may not be replaced.
        StorageError: A file cannot be written.
    """
    _check_contents(root, overwrite=overwrite)
    work = root.with_name(temporary_name(root.name))
    try:
        with storage_errors(root):
            work.mkdir()
            yield work
            sync_folder(work)
            _check_contents(root, overwrite=overwrite)
            old = root.with_name(temporary_name(root.name))
            os.rename(root, old)
            os.rename(work, root)
            sync_folder(root.parent)
            shutil.rmtree(old)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_contents(root: Path, *, overwrite: bool) -> None:
    """Check that a folder is empty, or has an export that may be replaced."""
    found = set(_list_files(root))
    if not found:
        return
    export = read_export(root)
    others = found - {EXPORT_NAME} - set(export["files"] if export else ())
    if export is None or others:
        first = min(others or found)
        raise OutputExists(
            f"{root} contains {first}, which is not a file of a complete export",
            remedy=f"remove it, or choose another {setting('output')} folder",
        )
    if not overwrite:
        raise OutputExists(
            f"{root} contains another export, for {export[_FORMAT_FIELD]}",
            remedy=f"replace it with {setting('overwrite', True)}, or choose another"
            f" {setting('output')} folder",
        )


def _list_files(root: Path) -> list[str]:
    """List everything below a folder that is not a folder, by its relative path."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), root)
        for folder, folders, names in os.walk(root)
        for name in [*names, *(name for name in folders if os.path.islink(f"{folder}/{name}"))]
    )

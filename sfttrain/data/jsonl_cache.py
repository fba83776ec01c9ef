"""Rows of a dataset as a file of JSON lines, named by its content, so that a build reads it as any
other."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from sftprep import json_lines
from sftprep.shards import storage_errors


def write_rows(
    rows: Callable[[], Iterable[Mapping[str, Any]]], folder: Path, *, known_as: str | None
) -> tuple[Path, str]:
    """Write the rows, unless they are there already; the file, and the digest of its content.

    rows: starts an iteration over them; known_as: what `datasets` calls this state of a dataset,
    None where nothing names it. Raises StorageError where the folder cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / f"known-{known_as}" if known_as else None
        if link is not None and link.is_symlink() and link.exists():
            path = folder / os.readlink(link)
            return path, path.stem
        _remove_orphans(folder)
        handle, half = _own_file(folder)
    state = xxhash.xxh3_128()
    try:
        with os.fdopen(handle, "wb") as file:
            for lines in json_lines(rows()):
                state.update(lines)
                with storage_errors(folder):
                    file.write(lines)
        content = state.hexdigest()
        path = folder / f"{content}.jsonl"
        _name(Path(half), path)
    finally:
        Path(half).unlink(missing_ok=True)
    if link is not None:
        link.unlink(missing_ok=True)
        with suppress(FileExistsError):  # another process was quicker, with the same content
            link.symlink_to(path.name)
    return path, content


def _name(half: Path, path: Path) -> None:
    """Give a file its name, unless that stands for the same content already.

    A build may be reading the file of that name, and would take another one in its place for a
    change.
    """
    try:
        os.link(half, path)
    except FileExistsError:
        if path.stat().st_size != half.stat().st_size:  # cut off, when the machine went down
            os.replace(half, path)
    except OSError:  # a file system without hard links
        os.replace(half, path)


def _own_file(folder: Path) -> tuple[int, str]:
    """A new file, locked for as long as it is written, so that others can tell that somebody
    does."""
    while True:
        handle, path = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(
            path
        ):  # between its making and the lock it may have been taken for an orphan
            return handle, path
        os.close(handle)


def _remove_orphans(folder: Path) -> None:
    """Remove what writers left behind that were killed: files that nobody has locked."""
    for path in folder.glob(".*.tmp"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError):
            continue  # it is being written, or somebody else was quicker

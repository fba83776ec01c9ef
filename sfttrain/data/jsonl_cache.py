"""Rows of a dataset as a JSON Lines file named by its content.

A build reads such a file like any other input, and two datasets with equal rows share one file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from sftprep import json_lines
from sftprep.errors import StorageError
from sftprep.shards import hold_lock, is_temporary_name, storage_errors, temporary_name

_MOST_ATTEMPTS = 100


def write_rows(
    rows: Callable[[], Iterable[Mapping[str, Any]]], folder: Path, *, known_as: str | None
) -> tuple[Path, str]:
    """Write rows as JSON Lines, unless the folder has them already.

    Args:
        rows: Starts an iteration over the rows. It is not called if `known_as` names a file.
        folder: The folder of the files; it is created if necessary.
        known_as: The fingerprint that `datasets` assigns to this state of a dataset; None if the
            rows have no fingerprint.

    Returns:
        The path of the file, and the digest of its content.

    Raises:
        StorageError: If the folder cannot be written to.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / f"known-{known_as}" if known_as else None
        if link is not None and link.is_symlink() and link.exists():
            path = folder / os.readlink(link)
            return path, path.stem
        _remove_orphans(folder)
    state = xxhash.xxh3_128()
    with _locked_temporary_file(folder) as (file, temporary):
        for lines in json_lines(rows()):
            state.update(lines)
            # Only the write is inside: an OSError of the user's own rows passes unchanged.
            with storage_errors(folder):
                file.write(lines)
        with storage_errors(folder):
            file.flush()
        content = state.hexdigest()
        path = folder / f"{content}.jsonl"
        _rename_unless_present(temporary, path)
    if link is not None:
        link.unlink(missing_ok=True)
        with suppress(FileExistsError):  # another process made the same link first
            link.symlink_to(path.name)
    return path, content


def _rename_unless_present(temporary: Path, path: Path) -> None:
    """Give a file its final name, unless a complete file has this name.

    A build may be reading the file of that name. It would report a replacement as a changed input,
    although the content is the same.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A shorter file was truncated by a crash of the machine.
        if path.stat().st_size != temporary.stat().st_size:
            os.replace(temporary, path)
    except OSError:  # the file system has no hard links
        os.replace(temporary, path)


@contextmanager
def _locked_temporary_file(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Create a temporary file, with a lock as the sign of its use, and remove it at the end."""
    for _ in range(_MOST_ATTEMPTS):
        path = folder / temporary_name("rows")
        with ExitStack() as stack:
            with storage_errors(folder):
                file = open(path, "xb", opener=_open_private)  # noqa: SIM115
                stack.enter_context(hold_lock(file, path, wait=True))
            # Another process may have removed it as an orphan before it was locked.
            if path.exists():
                stack.callback(path.unlink, missing_ok=True)
                yield file, path
                return
    raise StorageError(
        f"a temporary file in {folder} was removed {_MOST_ATTEMPTS} times",
        remedy="check that no other program removes files there",
    )


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _remove_orphans(folder: Path) -> None:
    """Remove the temporary files of killed processes; they are not locked any more.

    The checksum in their names distinguishes them from files of the user.
    """
    for path in folder.glob(".rows.*.tmp"):
        try:
            if not is_temporary_name(path.name) or not stat.S_ISREG(path.lstat().st_mode):
                continue
            with hold_lock(path.open("rb"), path):
                path.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError):
            continue  # a process is writing it, or another process removed it

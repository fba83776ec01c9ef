"""Atomic writing of files: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from sftprep.errors import StorageError, setting


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file atomically and durably.

    The data is on the disk before the file gets its name, and the name is on the disk when this
    function returns.

    Args:
        path: The file, which is replaced if it exists.
        write: Called with the open file.

    Raises:
        StorageError: The file cannot be written (disk full, no permission). The file at `path` is
            unchanged, and the temporary file is removed.
    """

    write_named(path.parent, path.name, write, lambda: path.name)


def create_folder(folder: Path) -> None:
    """Create a folder with its parents, unless it exists.

    Raises:
        StorageError: It cannot be created.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes to a file atomically and durably, as `write_file` does."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_file(path, write)


def write_named(
    folder: Path, working_name: str, write: Callable[[BinaryIO], None], name_of: Callable[[], str]
) -> str:
    """Write a file with a name based on its content, like `write_file`.

    Args:
        folder: The folder of the file.
        working_name: The name for the temporary file and for errors.
        write: Called with the open file.
        name_of: Called after the data is on the disk; returns the name of the file.

    Returns:
        The name.

    Raises:
        StorageError: The file cannot be written.
    """
    with storage_errors(folder / working_name), temporary_path(folder / working_name) as temporary:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            # Without this, the file could be empty after a power failure, under its final name.
            os.fsync(file.fileno())
        name = name_of()
        os.replace(temporary, folder / name)
        sync_folder(folder)
    return name


@contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """Yield an unused path in the folder of `path`, and remove its file at the end.

    The caller writes the file and renames it to `path` inside the `with` block.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """Return a name for the temporary file of `name`.

    The name is unique among all processes on all machines that share the folder. It ends in a
    checksum of itself, by which `is_temporary_name` distinguishes it from the files of users.
    """
    token = secrets.token_hex(8)  # not the process id, which is not unique among machines
    return f".{name}.{token}{_checksum_of(name, token)}.tmp"


def is_temporary_name(name: str) -> bool:
    """Return whether a file name was created by `temporary_name`."""
    match = _TEMPORARY_NAME.fullmatch(name)
    return match is not None and match["check"] == _checksum_of(match["name"], match["token"])


_TEMPORARY_NAME = re.compile(r"\.(?P<name>.+)\.(?P<token>[0-9a-f]{16})(?P<check>[0-9a-f]{8})\.tmp")


def _checksum_of(name: str, token: str) -> str:
    return sha256(f"sftprep {name} {token}".encode()).hexdigest()[:8]


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk.

    Renamed files then survive a power failure. Windows cannot open folders, so it does nothing
    there.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_MORE_FILES = ["raise the limit on open files (ulimit -n)", f"use fewer {setting('workers')}"]


@contextmanager
def storage_errors(path: Path, *, folder_setting: str = "output") -> Iterator[None]:
    """Convert an OSError in the `with` block to a StorageError with a remedy.

    Args:
        path: The file or folder that is written.
        folder_setting: The name of the setting that chooses the folder.
    """
    try:
        yield
    except OSError as error:
        # Alternatives are lists, since a trainer has no setting for the size of shards.
        elsewhere = f"choose another {setting(folder_setting)}"
        remedies = {
            errno.ENOSPC: (
                f"free some space, or write to another disk with {setting(folder_setting)};"
                " finished parts are kept and reused"
            ),
            errno.EDQUOT: (
                "your quota is used up: free some space, or write to another disk with"
                f" {setting(folder_setting)}"
            ),
            errno.EFBIG: [
                "raise the limit on file sizes (ulimit -f)",
                f"lower {setting('shard_tokens')}",
            ],
            errno.EMFILE: _MORE_FILES,
            errno.ENFILE: _MORE_FILES,
            errno.EACCES: f"check the permissions of the folder, or {elsewhere}",
            errno.EROFS: f"the file system is read-only: {elsewhere}",
            errno.ENOTDIR: f"a part of the path is a file: {elsewhere}",
            errno.EEXIST: f"a file has the path of a required folder: {elsewhere}",
        }
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            remedy=remedies.get(
                error.errno or 0, "check the disk, then run the same command again"
            ),
        ) from error


@contextmanager
def open_file_errors() -> Iterator[None]:
    """Convert the error of too many open files to a StorageError.

    Any call can raise that error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise StorageError(
            f"{error.strerror}: {error.filename or 'a pipe to another process'}",
            remedy=_MORE_FILES,
        ) from error

"""Files that are either whole or not there: written under a temporary name, synced, renamed."""

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

from sftprep.errors import StorageError


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Make `path` hold what `write` writes, or leave it as it was.

    The data is on the disk before the name is, and the name before this returns. Raises
    StorageError (disk full, no permission); the temporary file is removed then.
    """

    write_named(path.parent, path.name, write, lambda: path.name)


def write_bytes(path: Path, content: bytes) -> None:
    """Make `path` hold these bytes, or leave it as it was; as `write_file`."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_file(path, write)


def temporary_name(name: str) -> str:
    """Return a name for a file that is renamed to `name` when it is complete.

    No two processes use the same one, on any machines that share the folder. The name ends in a
    check sum of itself, by which `is_temporary_name` tells it from the names of users.
    """
    token = secrets.token_hex(8)
    return f".{name}.{token}{_check_of(name, token)}.tmp"


def is_temporary_name(name: str) -> bool:
    """Whether `temporary_name` made a file name."""
    found = _TEMPORARY_NAME.fullmatch(name)
    return found is not None and found["check"] == _check_of(found["name"], found["token"])


_TEMPORARY_NAME = re.compile(r"\.(?P<name>.+)\.(?P<token>[0-9a-f]{16})(?P<check>[0-9a-f]{8})\.tmp")


def _check_of(name: str, token: str) -> str:
    return sha256(f"sftprep {name} {token}".encode()).hexdigest()[:8]


def write_named(
    folder: Path, working_name: str, write: Callable[[BinaryIO], None], name_of: Callable[[], str]
) -> str:
    """As `write_file`, for a file whose name is known only when it is on the disk: then `name_of`
    is called. Returns the name."""
    temporary = folder / temporary_name(working_name)
    with storage_errors(folder / working_name):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            name = name_of()
            os.replace(temporary, folder / name)
            sync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)
    return name


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about `path` into a StorageError with a remedy."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: (
                "free some space, or build on another disk with --output; what is done so far is"
                " kept and reused"
            ),
            errno.EDQUOT: (
                "your quota is used up: free some space, or build elsewhere with --output"
            ),
            errno.EFBIG: (
                "a limit on file sizes is set (ulimit -f): raise it, or lower --shard-tokens"
            ),
            errno.EACCES: "check the permissions of the folder, or choose another --output",
            errno.EROFS: "the file system is read-only: choose another --output",
            errno.ENOTDIR: "a part of the path is a file: choose another --output",
            errno.EEXIST: "a file stands where a folder is needed: choose another --output",
        }
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            remedy=remedies.get(
                error.errno or 0, "check the disk, then run the same command again"
            ),
        ) from error

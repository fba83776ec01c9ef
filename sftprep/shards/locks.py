"""Locks on folders, so that no two processes write to one."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sftprep.core.atomic_write import storage_errors
from sftprep.errors import OutputBusy, OutputExists

_ATTEMPTS = 20
"""How often a lock file is opened again because another process removed it meanwhile."""


@contextmanager
def exclusive(path: Path, what: str, folder: Path, *, remedy: str) -> Iterator[None]:
    """Hold a lock file while the block runs; it is removed at the end.

    The system drops the lock when its process ends, however it ends; a file that is left behind
    means nothing.

    Args:
        path: the file.
        what: what another process would be: "another build".
        folder: what it would write to.
        remedy: for the error.

    Raises:
        OutputBusy: another process holds it.
        OutputExists: the file is not a lock file; it is not changed then.
        StorageError: it cannot be written or locked.
    """
    import fcntl

    lock = None
    for _ in range(_ATTEMPTS):
        with storage_errors(path):
            opened = _open_lock(path)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                with opened:
                    holder = _holder(opened.read(_LARGEST_LOCK))
                raise OutputBusy(f"{what}{holder} is writing to {folder}", remedy=remedy) from error
        # Whoever held it before may have removed the file between our open and our lock: then it
        # locks nothing.
        if _is_at(path, opened):
            lock = opened
            break
        opened.close()
    if lock is None:
        raise OutputBusy(f"{path} is removed again and again", remedy=remedy)
    with lock:
        with storage_errors(path):
            if not is_lock_content(lock.read(_LARGEST_LOCK)):
                raise _not_a_lock(path, "holds something else")
            lock.seek(0)
            lock.truncate(0)
            lock.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode())
            lock.flush()
        try:
            yield
        finally:
            if _is_at(path, lock):
                path.unlink(missing_ok=True)


def is_lock_content(content: bytes) -> bool:
    """Whether a lock file holds this: nothing yet, or the process that held it."""
    return not content.strip(b"\0") or bool(_holder(content))


_LARGEST_LOCK = 4096


def _open_lock(path: Path) -> BinaryIO:
    """Open or create a lock file. A file that has a second name is not one: writing to it would
    change a file elsewhere."""
    try:
        before = os.lstat(path)
        if not stat.S_ISREG(before.st_mode):
            raise _not_a_lock(path, "is a link, or not a file")
    except FileNotFoundError:
        pass
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        lock = os.fdopen(os.open(path, flags, 0o666), "r+b")
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            # Whoever held it has ended between two looks of ours, and removed its folder.
            raise OutputBusy(f"{path} has just been removed", remedy="run it again") from error
        if error.errno != errno.ELOOP:
            raise
        raise _not_a_lock(path, "is a link, or not a file") from error
    status = os.fstat(lock.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        lock.close()
        raise _not_a_lock(path, "is a hard link to another file")
    return lock


def _not_a_lock(path: Path, what: str) -> OutputExists:
    return OutputExists(
        f"{path} has the name of a lock file, and {what}", remedy="move it away, if it is yours"
    )


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _holder(content: bytes) -> str:
    try:
        facts = json.loads(content)
        return f" (process {facts['pid']} on {facts['host']})"
    except (ValueError, KeyError, TypeError):
        return ""

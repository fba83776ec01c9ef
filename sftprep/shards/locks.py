"""Locks on folders, so that no two processes write to one."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sftprep.errors import OutputBusy, OutputExists
from sftprep.shards.files import storage_errors


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
        OutputExists: the file is a link.
        StorageError: it cannot be written or locked.
    """
    import fcntl

    with storage_errors(path):
        lock = _open_lock(path)
    with lock:
        with storage_errors(path):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it before may have removed the file between our open and our lock:
                # then it locks nothing.
                held = os.path.samestat(os.fstat(lock.fileno()), os.lstat(path))
            except (BlockingIOError, FileNotFoundError):
                held = False
            if not held:
                lock.seek(0)
                holder = _holder(lock.read())
                raise OutputBusy(f"{what}{holder} is writing to {folder}", remedy=remedy)
            lock.truncate(0)
            lock.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode())
            lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _open_lock(path: Path) -> BinaryIO:
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    try:
        return open(path, "a+b", opener=opener)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            # Whoever held it has ended between two looks of ours, and removed its folder.
            raise OutputBusy(f"{path} has just been removed", remedy="run it again") from error
        if error.errno != errno.ELOOP:
            raise
        raise OutputExists(f"{path} is a link", remedy="remove it, if it is not yours") from error


def _holder(content: bytes) -> str:
    try:
        facts = json.loads(content)
        return f" (process {facts['pid']} on {facts['host']})"
    except (ValueError, KeyError, TypeError):
        return ""

"""Lock files against simultaneous writing to the same folder."""

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

_ATTEMPTS = 20  # how often a lock file is reopened because another process removed it meanwhile
_LARGEST_LOCK = 4096  # bytes; a lock file holds one short JSON object


@contextmanager
def exclusive(path: Path, what: str, folder: Path, *, remedy: str) -> Iterator[None]:
    """Hold a lock file while the block runs, and remove the file at the end.

    The operating system releases the lock when the process ends, even if it is killed. A lock file
    that is left behind therefore locks nothing.

    Args:
        path: The lock file.
        what: What the other process is called in the error, such as "another build".
        folder: The folder that the lock protects, for the error.
        remedy: The remedy of the error.

    Raises:
        OutputBusy: Another process holds the lock.
        OutputExists: The file is not a lock file; it is left unchanged.
        StorageError: The file cannot be written or locked.
    """
    with _acquire(path, what, folder, remedy, shared=False) as lock:
        with storage_errors(path):
            # Checked only under the lock: before that, another process may be writing its content.
            if not is_lock_content(lock.read(_LARGEST_LOCK)):
                raise _not_a_lock(path, "it has other content")
            lock.seek(0)
            lock.truncate(0)
            lock.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode())
            lock.flush()
        try:
            yield
        finally:
            if _is_at(path, lock):
                path.unlink(missing_ok=True)


@contextmanager
def shared(path: Path, what: str, folder: Path, *, remedy: str) -> Iterator[None]:
    """Hold a lock file together with other processes that share it.

    It excludes those that hold it with `exclusive`. The file stays: other processes may hold it.

    Args:
        path: As for `exclusive`.
        what: As for `exclusive`.
        folder: As for `exclusive`.
        remedy: As for `exclusive`.

    Raises:
        OutputBusy: Another process holds the lock exclusively.
        OutputExists: The file is not a lock file; it is left unchanged.
        StorageError: The file cannot be locked.
    """
    with _acquire(path, what, folder, remedy, shared=True) as lock:
        with storage_errors(path):
            if not is_lock_content(lock.read(_LARGEST_LOCK)):
                raise _not_a_lock(path, "it has other content")
            lock.truncate(0)  # the process that it names has ended
        yield


def _acquire(path: Path, what: str, folder: Path, remedy: str, *, shared: bool) -> BinaryIO:
    """Open and lock a lock file."""
    import fcntl

    for _ in range(_ATTEMPTS):
        with storage_errors(path):
            file = _open_lock(path)
            try:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                with file:
                    holder = _describe_holder(file.read(_LARGEST_LOCK))
                raise OutputBusy(f"{what}{holder} is writing to {folder}", remedy=remedy) from error
        # The previous holder may have removed the file between our open and our lock. We then hold
        # a lock on a deleted file, which excludes nobody, so try again.
        if _is_at(path, file):
            return file
        file.close()
    raise OutputBusy(f"other processes keep removing {path}", remedy=remedy)


def is_lock_content(content: bytes) -> bool:
    """Return whether bytes are the content of a lock file.

    It is empty, or it describes the process that held the lock. Zero bytes count as empty: a
    machine that crashed may leave a file like that.
    """
    return not content.strip(b"\0") or bool(_describe_holder(content))


def _open_lock(path: Path) -> BinaryIO:
    """Open or create a lock file.

    A link, and a file with a second name, is not accepted as a lock file: writing to it would
    change a file elsewhere.
    """
    try:
        before = os.lstat(path)
        if not stat.S_ISREG(before.st_mode):
            raise _not_a_lock(path, "it is a link, or not a regular file")
    except FileNotFoundError:
        pass
    try:
        # O_NOFOLLOW and O_NONBLOCK: a link or a pipe may have replaced the file since the lstat.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        lock = os.fdopen(os.open(path, flags, 0o666), "r+b")
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            # O_CREAT fails like this if the folder is missing: the previous holder ended after the
            # lstat above, and removed its folder.
            raise OutputBusy(f"{path} has just been removed", remedy="run it again") from error
        if error.errno != errno.ELOOP:
            raise
        raise _not_a_lock(path, "it is a link, or not a regular file") from error
    status = os.fstat(lock.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        lock.close()
        raise _not_a_lock(path, "it is a hard link to another file")
    return lock


def _not_a_lock(path: Path, reason: str) -> OutputExists:
    return OutputExists(
        f"{path} has the name of a lock file, but {reason}",
        remedy="if the file is yours, move it to another folder",
    )


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Return whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _describe_holder(content: bytes) -> str:
    """Return the process recorded in a lock file, for an error; "" if there is none."""
    try:
        holder = json.loads(content)
        return f" (process {holder['pid']} on {holder['host']})"
    except (ValueError, KeyError, TypeError):
        return ""

"""Lock files against simultaneous writing to the same folder."""

from __future__ import annotations

import errno
import getpass
import json
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sftprep.core.atomic_write import storage_errors
from sftprep.core.file_locks import hold_lock
from sftprep.core.regular_files import open_regular_file
from sftprep.errors import OutputBusy, OutputExists

_ATTEMPTS = 20  # how often a lock file is reopened because another process removed it meanwhile
_LARGEST_LOCK = 4096  # bytes; a lock file holds one short JSON object
# O_NOFOLLOW and O_NONBLOCK: a link or a pipe may replace the file between lstat and open. Windows
# lacks both, and has O_BINARY.
_SAFE_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


@contextmanager
def exclusive(path: Path, what: str, folder: Path, *, remedy: str) -> Iterator[None]:
    """Hold a lock file while the block runs, and remove the file at the end.

    The lock ends with the process, even if it is killed; see `hold_lock`. A lock file that is left
    behind therefore locks nothing.

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
            lock.write(_lock_content())
            lock.flush()
        try:
            yield
        finally:
            if _is_at(path, lock):
                # Windows does not remove open files.
                with suppress(PermissionError):
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


@contextmanager
def _acquire(
    path: Path, what: str, folder: Path, remedy: str, *, shared: bool
) -> Iterator[BinaryIO]:
    """Open and lock a lock file while the block runs."""
    for _ in range(_ATTEMPTS):
        with ExitStack() as stack:
            with storage_errors(path):
                file = _open_lock(path)
                try:
                    stack.enter_context(hold_lock(file, path, shared=shared))
                except BlockingIOError as error:
                    raise _busy(path, what, folder, remedy, error.filename) from error
            # The previous holder may have removed the file between our open and our lock. We then
            # hold a lock on a deleted file, which excludes nobody, so try again.
            if _is_at(path, file):
                yield file
                return
    raise OutputBusy(f"other processes keep removing {path}", remedy=remedy)


def _busy(path: Path, what: str, folder: Path, remedy: str, lease: str | None) -> OutputBusy:
    """Return the error of a lock that another process holds."""
    content = b""
    with suppress(OSError), open_regular_file(path) as file:  # it may just have been removed
        content = file.read(_LARGEST_LOCK)
    remedies = [remedy]
    if lease is not None:
        remedies.append(f"if that process has ended on another machine, remove {lease}")
    return OutputBusy(f"{what}{_describe_holder(content)} is writing to {folder}", remedy=remedies)


def _lock_content() -> bytes:
    """Describe this process, for the error of others."""
    holder = {"pid": os.getpid(), "host": platform.node()}
    with suppress(KeyError, OSError, ImportError):  # a user id without a name, as in containers
        holder["user"] = getpass.getuser()
    holder["since"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return json.dumps(holder).encode()


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
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | _SAFE_FLAGS, 0o666), "r+b")
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
        user = f" of {holder['user']}" if "user" in holder else ""
        since = f", since {holder['since']}" if "since" in holder else ""
        return f" (process {holder['pid']}{user} on {holder['host']}{since})"
    except (ValueError, KeyError, TypeError):
        return ""

"""Locks on files, which end with the process that holds them.

1. `flock` where the system and the file system have it. The system releases it when the process
   ends, even if it is killed, and other processes can share it. It reaches all machines that mount
   a folder by NFS, or by Lustre with the option `flock`.
2. Otherwise (Windows; a file system without `flock`) a `SoftFileLease` of filelock: a file
   `<name>.lease` that names the process and shows by its time that the process runs. A lease of a
   process that ended is replaced at once on the same machine, and on another one only by a process
   that waits. It cannot be shared, so a shared lock only checks that no process holds the lock.

A lease is the second choice, because it is weaker. A process that is suspended for longer than the
lease (30 s) loses it to one that waits. Replacing a lease exchanges two names, which NFS and Lustre
refuse: there, the lease of a killed process stays until a user removes it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from filelock import SoftFileLease

_WITHOUT_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""Errors of a file system without `flock`."""
_SHARING_SECONDS = 5.0
"""How long a shared lock waits for others that only check a lease, as it does."""


@contextmanager
def hold_lock(
    file: IO[Any], path: Path, *, shared: bool = False, wait: bool = False
) -> Iterator[None]:
    """Hold the lock of an open file while the block runs, and close the file at the end.

    Args:
        file: The file.
        path: Its path.
        shared: Whether other processes may hold the lock too, if they share it as well.
        wait: Whether to wait for other processes.

    Raises:
        BlockingIOError: Another process holds the lock. `filename` is its lease, if it is one: a
            file to remove if that process ended on another machine.
        OSError: The file cannot be locked.
    """
    with file:
        lease = None
        if not _try_flock(file, shared=shared, wait=wait):
            lease = _take_lease(lease_path(path), shared=shared, wait=wait)
        try:
            yield
        finally:
            if lease is not None:
                lease.release()
            elif fcntl is not None:
                # Closing is not enough: a child that was forked meanwhile has the same open file.
                fcntl.flock(file, fcntl.LOCK_UN)


def lease_path(path: Path) -> Path:
    """Return the path of the lease of a lock file, where there is no `flock`."""
    return path.with_name(f"{path.name}.lease")


def is_lease(content: bytes) -> bool:
    """Return whether bytes are the content of a lease: empty while it is being written."""
    return not content or content.startswith(b"filelock/")


def _try_flock(file: IO[Any], *, shared: bool, wait: bool) -> bool:
    """Lock a file with `flock`; return whether there is such a lock.

    A child process that was forked keeps it until one of the two unlocks the file.
    """
    if fcntl is None:
        return False
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _WITHOUT_FLOCK:
            return False
        raise
    return True


def _take_lease(path: Path, *, shared: bool, wait: bool) -> SoftFileLease | None:
    """Take a lease; release it at once if the lock is shared."""
    from filelock import SoftFileLease, Timeout

    lease = SoftFileLease(path, thread_local=False)
    try:
        # Without waiting, no lease of a process on another machine expires here.
        lease.acquire(timeout=-1 if wait else _SHARING_SECONDS if shared else 0)
    except Timeout as error:
        message = os.strerror(errno.EWOULDBLOCK)
        raise BlockingIOError(errno.EWOULDBLOCK, message, str(path)) from error
    if not shared:
        return lease
    lease.release()
    return None

"""Files that others may have replaced by a pipe or a device: opened without waiting for one."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO


class NotRegularError(OSError):
    """A path that leads to a pipe, device, socket or folder, where a regular file is needed."""

    def __init__(self) -> None:
        super().__init__("it is not a regular file")
        self.strerror = "it is not a regular file"


def open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading.

    Raises:
        NotRegularError: it is not a regular file, nor a link to one.
        OSError: it cannot be opened.
    """
    return open(path, "rb", opener=_open_without_waiting)


def read_regular_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a file, one byte more than `limit` at most. Raises as `open_regular_file`."""
    with open_regular_file(path) as file:
        return file.read(limit + 1)


def _open_without_waiting(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise NotRegularError

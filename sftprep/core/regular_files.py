"""Opening of files without waiting, even at the path of a pipe or device."""

from __future__ import annotations

import os
import stat
from io import BufferedReader


class NotRegularError(OSError):
    """A path of a pipe, device, socket or folder where a regular file is required."""

    def __init__(self) -> None:
        super().__init__("it is not a regular file")
        self.strerror = "it is not a regular file"


def open_regular_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        NotRegularError: The path is not a regular file or a link to one.
        OSError: The file cannot be opened.
    """
    return open(path, "rb", opener=_open_without_waiting)


def read_regular_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read at most `limit + 1` bytes of a regular file.

    The extra byte tells the caller that the file is longer than `limit`.

    Raises:
        NotRegularError: The path is not a regular file or a link to one.
        OSError: The file cannot be opened or read.
    """
    with open_regular_file(path) as file:
        return file.read(limit + 1)


def _open_without_waiting(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe waits for a writer, possibly forever.
    # Windows has neither flag, and no pipes in folders; `open` passes what it needs.
    more_flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags | more_flags)
    # The check is on the open file: the path may be replaced between a check and the opening.
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise NotRegularError

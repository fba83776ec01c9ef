"""Objects as files that are read by position, in few requests."""

from __future__ import annotations

import io
from typing import BinaryIO

from sftprep.errors import StorageError
from sftprep.stores.folder import StoreFolder

_READ_AHEAD = 8 << 20
_BUFFER = 64 << 10


def open_object(url: str, *, read_ahead: int = _READ_AHEAD) -> BinaryIO:
    """Open an object for reading.

    Args:
        url: Its URL.
        read_ahead: The least number of bytes of a request, apart from the last one.

    Raises:
        FileNotFoundError: The object does not exist; raised when it is read.
        StorageError: The store cannot be reached; raised when it is read.
    """
    return io.BufferedReader(_RangeReader(url, read_ahead), _BUFFER)


def least_size(file: BinaryIO) -> int:
    """Return the size of an opened object as far as its reads have shown it."""
    assert isinstance(file, io.BufferedReader)
    assert isinstance(file.raw, _RangeReader)
    return file.raw.least_size


class _RangeReader(io.RawIOBase):
    """An object, read in ranges: the last one is kept.

    Attributes:
        least_size: The end of the ranges that were read; the size of the object at its end.
    """

    def __init__(self, url: str, read_ahead: int) -> None:
        parent, _, self._name = url.rpartition("/")
        self._folder, self._read_ahead = StoreFolder(parent), read_ahead
        self._position = 0
        self._start, self._data = 0, b""  # the range that is kept
        self._is_complete = False  # whether it reaches the end of the object
        self.least_size = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, counted from the start or from the current position."""
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the size of an object is not known")
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer, with fewer bytes at the end of the range that is kept."""
        offset = self._position - self._start
        if not 0 <= offset < len(self._data):
            if self._is_complete and self._position >= self.least_size:
                return 0
            self._fetch(len(buffer))
            offset = 0
        found = memoryview(self._data)[offset : offset + len(buffer)]
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def _fetch(self, size: int) -> None:
        start, size = self._position, max(size, self._read_ahead)
        try:
            data = self._folder.read_range(self._name, start, start + size)
        except StorageError:
            # Stores answer a range behind the end of an object with an error.
            if self._folder.mark(self._name).size > start:
                raise
            data = b""
        self._start, self._data = start, data
        if len(data) < size:
            self._is_complete, self.least_size = True, start + len(data)
        else:
            self.least_size = max(self.least_size, start + size)

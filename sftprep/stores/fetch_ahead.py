"""Objects that are fetched into the cache in the background, before a reader uses them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from sftprep.config.cache_location import cache_limit
from sftprep.errors import SftprepError
from sftprep.stores.cache import local_file
from sftprep.stores.folder import StoreFolder

_LARGEST_SHARE = 0.5
"""The most of the limit of the cache that one request takes, so that it does not remove copies
which it has just fetched."""


class NeededFile(NamedTuple):
    """A file of a build that a reader will use; the arguments of `local_file`."""

    name: str
    digest: str
    size: int | None


class FetchAhead:
    """A thread of this process that fetches files of a build in the order of their use.

    A request replaces the one before, because it starts later in the same order. The thread ends
    when it has fetched everything, or at the first error. The error is not kept: the reader fetches
    the file itself when it uses it, and raises what is still wrong then.

    Args:
        folder: The folder of the build.
    """

    def __init__(self, folder: StoreFolder) -> None:
        self._folder = folder
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._requested: Iterator[NeededFile] | None = None  # what the thread takes next

    def request(self, files: Iterable[NeededFile]) -> None:
        """Fetch files in the background, in this order.

        Args:
            files: The files; the thread iterates over them.
        """
        if os.getpid() != self._process:  # a process that was forked has no thread
            self._reset()
        with self._lock:
            self._requested = iter(files)
            if self._thread is None or not self._thread.is_alive():
                # A daemon, so that the end of the process does not wait for a transfer. What it
                # leaves in the cache is removed like any other copy.
                self._thread = threading.Thread(
                    target=self._run, name="sftprep-fetch-ahead", daemon=True
                )
                self._thread.start()

    def wait(self) -> None:
        """Wait until the thread has ended."""
        if (thread := self._thread) is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                files, self._requested = self._requested, None
                if files is None:
                    self._thread = None
                    return
            with suppress(SftprepError):
                self._fetch(files)

    def _fetch(self, files: Iterator[NeededFile]) -> None:
        room = _LARGEST_SHARE * cache_limit()
        for file in files:
            room -= file.size or 0
            if room < 0 or self._requested is not None:
                return
            with local_file(self._folder, *file):
                pass

"""File systems that fail at a chosen change: a build that is killed, a network that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from sftprep.stores import folder
from sftprep.stores.protocols import open_file_system

_CHANGES = {"put_file", "rm_file", "pipe_file", "call_s3", "call"}
"""The methods of the file systems of fsspec by which a build changes a store."""
Watch = Callable[[str, Callable[[], Any]], Any]


class Killed(BaseException):
    """The end of a build that is killed; no code handles it."""


class _Watched:
    def __init__(self, system: Any, watch: Watch) -> None:
        self._system, self._watch = system, watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._system, name)
        if name not in _CHANGES:
            return found
        return lambda *args, **kwargs: self._watch(
            str(args[-1] if name in ("put_file", "call") else args[0]),
            lambda: found(*args, **kwargs),
        )


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Pass each change of a store to a function, one after the other.

    Args:
        watch: Called with what is changed, and a function that makes the change.
    """

    def open_watched(url: str) -> tuple[Any, str]:
        system, path = open_file_system(url)
        return _Watched(system, watch), path

    with (
        patch.object(folder, "open_file_system", open_watched),
        patch.object(folder, "_REQUESTS_AT_ONCE", 1),
    ):
        yield


def killed_before(change: int, action: Callable[[], object]) -> bool:
    """Run `action`, and kill it before its n-th change to a store; return whether it was killed."""
    left = change

    def watch(_: str, make: Callable[[], Any]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed  # a killed build changes nothing afterwards either
        return make()

    try:
        with watched(watch):
            action()
    except Killed:
        return True
    return False

"""Failures at a chosen change or request: a build that is killed, a server that goes down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
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


class FailingServer:
    """A WSGI application that answers requests up to a chosen one, and then with an error.

    Args:
        app: The application behind it.

    Attributes:
        requests: The number of requests so far.
        fails_from: The number of the first request that fails, from 0; None for none.
        carries_out: Whether the first request that fails is carried out, and its response lost.
        is_down: Whether all later requests fail too.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app, self._lock = app, threading.Lock()
        self.requests = 0
        self.fails_from: int | None = None
        self.carries_out, self.is_down = False, True

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            number, self.requests = self.requests, self.requests + 1
        first = self.fails_from
        if first is None or number < first or (number > first and not self.is_down):
            return self._app(environ, start_response)
        if number == first and self.carries_out:
            list(self._app(environ, lambda *_: None))
        start_response("503 Service Unavailable", [("Content-Length", "0")])
        return [b""]

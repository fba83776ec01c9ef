"""The reference encoder in a process beside this one (reference_server.py): it loads there once,
for all processes of a build."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sftprep.core.subprocesses import module_command, module_environment
from sftprep.tokenize.encoders.base import Encoder, Tokens, flat_tokens
from sftprep.tokenize.loading.spec import TokenizerSpec

_PATIENCE = 1.0
"""Seconds in which a child that was started has to listen."""


class ServerAddress(NamedTuple):
    """Where a child answers, and the key that it asks for; other processes may be told."""

    address: str
    key: bytes


class ReferenceServer:
    """`tokenizers` on a spec, in a child process that is started at once and ends with this object.

    Loading a large vocabulary takes 0.3 s and holds the interpreter's lock, so a thread would not
    help, and in each process of a build it would be loaded again. place: None where no child can be
    started.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        self.place: ServerAddress | None = None
        self._end: Callable[[], object] = lambda: None
        try:
            folder = tempfile.mkdtemp(prefix="sftprep-")
            child = subprocess.Popen(
                module_command("sftprep.tokenize.equivalence.reference_server"),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=module_environment(),
            )
        except OSError:
            return
        address = (
            rf"\\.\pipe\{Path(folder).name}"
            if sys.platform == "win32"
            else str(Path(folder, "reference"))
        )
        self.place = ServerAddress(address, secrets.token_bytes(32))
        asked = pickle.dumps((*self.place, spec.split_special_tokens, len(spec.json)))
        # The pipe takes less than a spec at a time, and the child reads it when it has imported
        # what it needs.
        threading.Thread(target=_tell, args=(child, asked, spec.json), daemon=True).start()
        self._end = weakref.finalize(self, _end, child, folder)

    def close(self) -> None:
        """End the child."""
        self._end()


class ReferenceClient:
    """An encoder for a few texts, which a child has; where that does not answer, it is loaded
    here."""

    def __init__(self, place: ServerAddress | None, here: Callable[[], Encoder]) -> None:
        """here: makes the encoder in this process."""
        self._place, self._here = place, here
        self._child: Connection | None = None
        # A thread waits for a child that still loads; one, so that answers come in the order of the
        # questions.
        self._thread = None if place is None else ThreadPoolExecutor(1)
        self._process = os.getpid()

    def ask(self, texts: Sequence[str]) -> Callable[[], Tokens]:
        """Have texts encoded while this process does something else; what it gets waits for their
        ids.

        The answer raises TokenizerError as `HfEncoder.encode` does.
        """
        if os.getpid() != self._process:
            self._thread = None  # a fork has no thread, and the connection is its parent's
        asked = None if self._thread is None else self._thread.submit(self._exchange, list(texts))
        return partial(self._answer, texts, asked)

    def _exchange(self, texts: list[str]) -> list[list[int]]:
        assert self._place is not None
        self._child = self._child or _connected(self._place)
        self._child.send(texts)
        ids: list[list[int]] = self._child.recv()
        return ids

    def _answer(self, texts: Sequence[str], asked: Future[list[list[int]]] | None) -> Tokens:
        try:
            if asked is not None:
                return flat_tokens([np.array(ids, np.int32) for ids in asked.result()])
        except (OSError, EOFError, AuthenticationError):
            self._thread = None
        return self._here().encode(texts)


def _connected(place: ServerAddress) -> Connection:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return Client(place.address, authkey=place.key)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def _tell(child: subprocess.Popen[bytes], *parts: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # it is gone
        for part in parts:
            child.stdin.write(part)
        child.stdin.flush()


def _end(child: subprocess.Popen[bytes], folder: str) -> None:
    child.kill()
    child.wait()
    assert child.stdin is not None
    with contextlib.suppress(OSError):  # what was not written yet has nobody to read it
        child.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)

"""Access to a reference encoder in a child process (reference_server.py).

The child loads the tokenizer once for all processes of a build. Loading a large vocabulary takes
0.3 s and holds the interpreter lock, so a thread would not help, and every worker would load it.
"""

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

_CONNECT_SECONDS = 1.0  # how long to wait for a new child to listen


class ServerAddress(NamedTuple):
    """The address of a child; it can be sent to other processes."""

    endpoint: str  # path of a Unix socket, or name of a Windows pipe
    key: bytes  # shared secret that the child requires


class ReferenceServer:
    """A child process with the reference encoder, owned by this object.

    It runs as long as this object.

    Args:
        spec: The tokenizer.

    Attributes:
        address: How to connect; None if no child could be started.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        self.address: ServerAddress | None = None
        self._end: Callable[[], object] = lambda: None  # ends the child
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
        endpoint = (
            rf"\\.\pipe\{Path(folder).name}"
            if sys.platform == "win32"
            else str(Path(folder, "reference"))
        )
        self.address = ServerAddress(endpoint, secrets.token_bytes(32))
        header = pickle.dumps((*self.address, spec.split_special_tokens, len(spec.json)))
        # In a thread: a pipe holds less than a tokenizer, and the child reads only when its imports
        # are done.
        threading.Thread(target=_send_spec, args=(child, header, spec.json), daemon=True).start()
        self._end = weakref.finalize(self, _end_child, child, folder)

    def close(self) -> None:
        """End the child."""
        self._end()


class ReferenceClient:
    """An encoder for a few strings in a child process, with a local fallback.

    Args:
        address: The child; None to use only the local encoder.
        load_local: Returns the encoder of this process, which takes time at its first call.
    """

    def __init__(self, address: ServerAddress | None, load_local: Callable[[], Encoder]) -> None:
        self._address, self._load_local = address, load_local
        self._connection: Connection | None = None
        # The thread waits for a child that is still loading. There is only one, so that answers
        # arrive in the order of the requests. None: the local encoder is used.
        self._thread = None if address is None else ThreadPoolExecutor(1)
        self._process = os.getpid()  # the process that owns the thread and the connection

    def ask(self, texts: Sequence[str]) -> Callable[[], Tokens]:
        """Start encoding strings, and return a function to wait for the result.

        The function raises TokenizerError as `HfEncoder.encode` does.
        """
        if os.getpid() != self._process:
            # After a fork, the thread does not exist here and the connection belongs to the parent.
            self._thread = None
        future = None if self._thread is None else self._thread.submit(self._exchange, list(texts))
        return partial(self._result, texts, future)

    def _exchange(self, texts: list[str]) -> list[list[int]]:
        assert self._address is not None
        self._connection = self._connection or _connect(self._address)
        self._connection.send(texts)
        ids: list[list[int]] = self._connection.recv()
        return ids

    def _result(self, texts: Sequence[str], future: Future[list[list[int]]] | None) -> Tokens:
        try:
            if future is not None:
                return flat_tokens([np.array(ids, np.int32) for ids in future.result()])
        except (OSError, EOFError, AuthenticationError):
            # The child is gone, or cannot encode these strings: continue without it.
            self._thread = None
        return self._load_local().encode(texts)


def _connect(address: ServerAddress) -> Connection:
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            return Client(address.endpoint, authkey=address.key)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _send_spec(child: subprocess.Popen[bytes], *parts: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # the child has ended, or was ended
        for part in parts:
            child.stdin.write(part)
        child.stdin.flush()


def _end_child(child: subprocess.Popen[bytes], folder: str) -> None:
    child.kill()
    child.wait()
    assert child.stdin is not None
    with contextlib.suppress(OSError):  # flushing data that the child did not read
        child.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)

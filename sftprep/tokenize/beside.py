"""The reference encoder in a process beside this one: it loads there while this process does other work.

python -m sftprep.tokenize.beside      # reads a spec and then batches of texts from stdin, writes their ids to stdout
"""

from __future__ import annotations

import contextlib
import pickle
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from sftprep.tokenize.child import module_command, module_environment
from sftprep.tokenize.hf import HfEncoder
from sftprep.tokenize.spec import TokenizerSpec
from sftprep.tokenize.tokens import Encoder, Tokens

_LENGTH = struct.Struct("<Q")


class Beside:
    """`tokenizers` on a spec, for a few texts: starts a child process at once and asks it when it is called.

    Loading a large vocabulary takes 0.3 s and holds the interpreter's lock, so a thread would not help. Where the child cannot be
    started or does not answer, the encoder is loaded here.
    """

    def __init__(self, spec: TokenizerSpec, here: Callable[[], Encoder]) -> None:
        """here: makes the encoder in this process."""
        self._here = here
        self._child = _started()
        if self._child is not None:
            weakref.finalize(self, _end, self._child)
            # The pipe takes less than a spec at a time, and the child reads it when it has imported what it needs.
            self._sending = threading.Thread(target=_send, args=(self._child.stdin, spec.to_dict()), daemon=True)
            self._sending.start()

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Ids of each text. Raises TokenizerError as `HfEncoder.encode` does."""
        if self._child is not None:
            self._sending.join()
            answer = _receive(self._child.stdout) if _send(self._child.stdin, list(texts)) else None
            if isinstance(answer, Tokens):
                return answer
            _end(self._child)
            self._child = None
        return self._here().encode(texts)


def _started() -> subprocess.Popen[bytes] | None:
    try:
        return subprocess.Popen(
            module_command("sftprep.tokenize.beside"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=module_environment(),
        )
    except OSError:
        return None


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):  # what was not written yet has nobody to read it
            pipe.close()  # type: ignore[union-attr]


def _send(pipe: BinaryIO | Any, value: object) -> bool:
    data = pickle.dumps(value)
    try:
        pipe.write(_LENGTH.pack(len(data)) + data)
        pipe.flush()
    except (OSError, ValueError):
        return False
    return True


def _receive(pipe: BinaryIO | Any) -> Any:
    """What the other side sent; None where it is gone."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    data = pipe.read(size)
    return pickle.loads(data) if len(data) == size else None


def _serve() -> None:
    """The child: answers until its parent is gone. Texts that it cannot encode end it, and the parent finds out why itself."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    values = _receive(source)
    if values is None:
        return
    encoder = HfEncoder(TokenizerSpec.from_dict(values), threads=False)
    while (texts := _receive(source)) is not None:
        _send(sink, encoder.encode(texts))


if __name__ == "__main__":
    _serve()

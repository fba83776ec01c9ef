"""The reference encoder in a process beside this one (answers.py): it loads there while this process does other work."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from sftprep.tokenize.answers import receive, send
from sftprep.tokenize.child import module_command, module_environment
from sftprep.tokenize.spec import TokenizerSpec
from sftprep.tokenize.tokens import Encoder, Tokens, flat_tokens


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
            asked = (spec.json, spec.split_special_tokens)
            self._sending = threading.Thread(target=send, args=(self._child.stdin, asked), daemon=True)
            self._sending.start()

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Ids of each text. Raises TokenizerError as `HfEncoder.encode` does."""
        if self._child is not None:
            self._sending.join()
            answer = receive(self._child.stdout) if send(self._child.stdin, list(texts)) else None
            if isinstance(answer, list):
                return flat_tokens([np.array(ids, np.int32) for ids in answer])
            _end(self._child)
            self._child = None
        return self._here().encode(texts)


def _started() -> subprocess.Popen[bytes] | None:
    try:
        return subprocess.Popen(
            module_command("sftprep.tokenize.answers"),
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

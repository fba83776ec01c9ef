"""The child process of reference_client.py, an encoder for a whole build.

It encodes strings for all processes of the build. It reads a tokenizer from stdin, and sends the
ids of batches of strings to every process that connects. It imports little, and no NumPy, because
its purpose is to have the tokenizer loaded before another process could have.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import threading
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any


def _serve() -> None:
    """Answer requests until stdin is closed at the end of the parent."""
    endpoint, key, split_special_tokens, size = pickle.load(sys.stdin.buffer)
    tokenizer_json = sys.stdin.buffer.read(size)
    # Listening starts before the tokenizer is loaded, so that clients can connect and wait.
    listener = Listener(endpoint, authkey=key, backlog=64)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    tokenizer.encode_special_tokens = split_special_tokens
    threading.Thread(target=_accept, args=(listener, tokenizer), daemon=True).start()
    sys.stdin.buffer.read()
    listener.close()
    # Remove the folder of the socket, which a parent that was killed leaves behind.
    with contextlib.suppress(OSError):
        Path(endpoint).parent.rmdir()


def _accept(listener: Listener, tokenizer: Any) -> None:
    while True:
        # A client may have a wrong key, or may have disconnected; the next one is served anyway.
        with contextlib.suppress(Exception):
            threading.Thread(
                target=_answer, args=(listener.accept(), tokenizer), daemon=True
            ).start()


def _answer(client: Connection, tokenizer: Any) -> None:
    """Send the ids of each batch received from a client.

    Strings that cannot be encoded end the connection. The client then encodes them itself, and gets
    the error with its message.
    """
    with client, contextlib.suppress(Exception):
        while True:
            client.send(
                [tokenizer.encode(text, add_special_tokens=False).ids for text in client.recv()]
            )


if __name__ == "__main__":
    _serve()

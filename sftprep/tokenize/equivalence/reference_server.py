"""The child of reference_client.py: reads a tokenizer from stdin, and gives the ids of batches of
texts to whoever connects.

It imports little, and no NumPy: it is there to have loaded the tokenizer before anybody else has.
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
    """Answers until stdin ends, with the parent."""
    address, key, split_special_tokens, size = pickle.load(sys.stdin.buffer)
    written = sys.stdin.buffer.read(size)
    # Whoever connects meanwhile waits, and is answered as soon as the tokenizer is there.
    listener = Listener(address, authkey=key, backlog=64)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(written)
    tokenizer.encode_special_tokens = split_special_tokens
    threading.Thread(target=_accept, args=(listener, tokenizer), daemon=True).start()
    sys.stdin.buffer.read()
    listener.close()
    with contextlib.suppress(OSError):  # of a parent that was killed
        Path(address).parent.rmdir()


def _accept(listener: Listener, tokenizer: Any) -> None:
    while True:
        with contextlib.suppress(Exception):  # one that does not know the key, or is gone already
            threading.Thread(
                target=_answer, args=(listener.accept(), tokenizer), daemon=True
            ).start()


def _answer(asker: Connection, tokenizer: Any) -> None:
    """Texts that cannot be encoded end the connection, and the asker finds out why itself."""
    with asker, contextlib.suppress(Exception):
        while True:
            asker.send(
                [tokenizer.encode(text, add_special_tokens=False).ids for text in asker.recv()]
            )


if __name__ == "__main__":
    _serve()

"""The child of beside.py: reads a tokenizer and then batches of texts from stdin, writes their ids to stdout.

It imports little, and no NumPy: it is there to have loaded the tokenizer before anybody else has.
"""

from __future__ import annotations

import pickle
import struct
import sys
from typing import Any, BinaryIO

LENGTH = struct.Struct("<Q")
"""Stands before each message: its bytes."""


def send(pipe: BinaryIO | Any, value: object) -> bool:
    """Write a value; False where nobody reads any more."""
    data = pickle.dumps(value)
    try:
        pipe.write(LENGTH.pack(len(data)) + data)
        pipe.flush()
    except (OSError, ValueError):
        return False
    return True


def receive(pipe: BinaryIO | Any) -> Any:
    """What the other side sent; None where it is gone."""
    head = pipe.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    data = pipe.read(size)
    return pickle.loads(data) if len(data) == size else None


def _serve() -> None:
    """Answers until the parent is gone. Texts that cannot be encoded end it, and the parent finds out why itself."""
    from tokenizers import Tokenizer

    source, sink = sys.stdin.buffer, sys.stdout.buffer
    asked = receive(source)
    if asked is None:
        return
    written, split_special_tokens = asked
    tokenizer = Tokenizer.from_str(written)
    tokenizer.encode_special_tokens = split_special_tokens
    while (texts := receive(source)) is not None:
        send(sink, [tokenizer.encode(text, add_special_tokens=False).ids for text in texts])


if __name__ == "__main__":
    _serve()

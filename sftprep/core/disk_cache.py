"""Where what was worked out once about a tokenizer is kept between runs: checked files, each
replaced as a whole."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import xxhash

_log = logging.getLogger(__name__)


def read_entry(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """What `write_entry` put there; None where there is no such file, or a damaged one (which is as
    good as none)."""
    try:
        with open(path, "rb") as file:
            # Read in parts, for a copy of a large body costs as much as reading it.
            check, head, body = file.readline(), file.readline(), file.read()
    except OSError:
        return None
    if not head.endswith(b"\n") or check != _check_of(head, body):
        _log.warning("%s is damaged: it is made anew", path)
        return None
    entry = orjson.loads(head)
    return (entry, body) if isinstance(entry, dict) else None


def write_entry(path: Path, entry: dict[str, Any], body: bytes = b"") -> bool:
    """Keep `entry` (JSON values) and `body` (anything, apart because parsing megabytes of it as
    JSON takes twice as long).

    A reader sees the old file or the new one, never half of one. A cache that cannot be written
    (read-only home, full disk) costs time and nothing else: it is logged, and False is returned.
    """
    head = orjson.dumps(entry) + b"\n"
    return write_whole(path, _check_of(head, body) + head + body)


def write_whole(path: Path, content: bytes) -> bool:
    """Keep a file; False where it cannot be written, as for `write_entry`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        _log.warning("cannot keep %s for the next run: %s", path, error)
        return False
    return True


def _check_of(*parts: bytes) -> bytes:
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.hexdigest().encode() + b"\n"

"""Cache entries on disk: files with a checksum, each replaced as a whole.

A damaged entry counts as missing, and an entry that cannot be written is skipped with a log line: a
cache only saves time.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import orjson
import xxhash

from sftprep.core.atomic_write import temporary_path

_log = logging.getLogger(__name__)


def read_entry(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """Return `entry` and `body` of `write_entry`; None if missing or damaged."""
    try:
        with open(path, "rb") as file:
            # Read in parts, since slicing a large body would copy it.
            check, head, body = file.readline(), file.readline(), file.read()
    except OSError:
        return None
    if not head.endswith(b"\n") or check != _checksum_of(head, body):
        _log.warning("%s is damaged and will be created again", path)
        return None
    entry = orjson.loads(head)
    return (entry, body) if isinstance(entry, dict) else None


def write_entry(path: Path, entry: dict[str, Any], body: bytes = b"") -> bool:
    """Write a cache entry; readers see either the old file or the new one.

    Args:
        path: The file; missing folders are created.
        entry: JSON values.
        body: Additional bytes. They are not a part of the JSON, since parsing megabytes of it takes
            twice as long.

    Returns:
        False if the file cannot be written (read-only home, full disk), which is logged.
    """
    head = orjson.dumps(entry) + b"\n"
    return write_whole(path, _checksum_of(head, body) + head + body)


def write_whole(path: Path, content: bytes, *, sync: bool = False) -> bool:
    """Write a file as a whole; return False if it cannot be written.

    Args:
        path: The file; missing folders are created.
        content: Its content.
        sync: Whether the content must be on the disk before it gets its name, since the file has no
            checksum.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_path(path) as temporary:
            with open(temporary, "wb", opener=_open_private) as file:
                file.write(content)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        _log.warning("cannot keep %s for the next run: %s", path, error)
        return False
    return True


def _open_private(path: str, flags: int) -> int:
    # Entries may list the files of private repositories of the Hub.
    return os.open(path, flags, mode=0o600)


def _checksum_of(*parts: bytes) -> bytes:
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.hexdigest().encode() + b"\n"

"""Rows of a dataset as a file of JSON lines, named by its content, so that a build reads it as any other."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from sftprep.shards.files import storage_errors
from sftprep.sources.rows import iter_lines

_RUN_BYTES = 2**20


def write_rows(rows: Callable[[], Iterable[Mapping[str, Any]]], folder: Path, *, known_as: str | None) -> tuple[Path, str]:
    """Write the rows, unless they are there already; the file, and the digest of its content.

    rows: starts an iteration over them; known_as: what `datasets` calls this state of a dataset, None where nothing names it.
    Raises StorageError where the folder cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / f"known-{known_as}" if known_as else None
        if link is not None and link.is_symlink() and link.exists():
            path = folder / os.readlink(link)
            return path, path.stem
        handle, half = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    state = xxhash.xxh3_128()
    try:
        with os.fdopen(handle, "wb") as file:
            for lines in _gathered(iter_lines(rows())):
                state.update(lines)
                with storage_errors(folder):
                    file.write(lines)
        content = state.hexdigest()
        path = folder / f"{content}.jsonl"
        os.replace(half, path)
    finally:
        Path(half).unlink(missing_ok=True)
    if link is not None:
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
    return path, content


def _gathered(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines in runs of a mebibyte or so."""
    run: list[bytes] = []
    size = 0
    for line in lines:
        run.append(line)
        size += len(line)
        if size >= _RUN_BYTES:
            yield b"".join(run)
            run, size = [], 0
    yield b"".join(run)

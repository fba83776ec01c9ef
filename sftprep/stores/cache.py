"""Copies of objects in the cache of this machine, with a limit of their size.

A copy is in a folder of its own, which an identity of its content names: the SHA-256 of a shard, or
the URL, size and tag of an input. So a copy never becomes outdated.

Of all processes on a machine, one fetches an object and the others wait for it. Locks are files
that are never removed; each is for 1/256 of the objects. A reader holds its lock shared until it
has opened the copy, so that no other process removes it before; afterwards the removal of an open
or mapped file does no harm.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import xxhash

from sftprep.config.cache_location import cache_dir, cache_limit
from sftprep.core.atomic_write import storage_errors, temporary_path
from sftprep.core.file_locks import hold_lock
from sftprep.core.hashing import digest_of_file
from sftprep.errors import InputChanged, ShardError
from sftprep.stores.folder import BuildFolder, StoreFolder

COPIES_FOLDER = "objects"
"""The folder of the copies of objects in the cache."""
_ATTEMPTS = 20
"""How often a copy is fetched that other processes remove before it is opened."""
_TOUCHED_AFTER = 60.0
"""Seconds until the use of a copy is recorded again. Without this, each access would be a write."""
_XXH3_DIGITS = 32
_DIGEST = re.compile(rf"[0-9a-f]{{{_XXH3_DIGITS}}}|[0-9a-f]{{64}}")
_FETCH_AGAIN = ("check the object in the store, and build again",)


@contextmanager
def local_file(
    folder: BuildFolder, name: str, digest: str, size: int | None = None
) -> Iterator[Path]:
    """Yield the path of a file of a build; for a build in a store, of its copy in the cache.

    The file must be opened inside the `with` block, and may be used afterwards.

    Args:
        folder: The folder of the build.
        name: The path of the file in it.
        digest: Its SHA-256 or xxh3-128 in hex, which is checked when a copy is fetched.
        size: Its size in bytes; None if it is not known.

    Raises:
        ShardError: The object is missing or damaged.
        StorageError: The store cannot be reached, or the cache cannot be written.
    """
    if isinstance(folder, Path):
        yield folder / name
        return
    if not _DIGEST.fullmatch(digest):  # it becomes part of a path
        raise _damaged(folder, name)
    file_name = name.rpartition("/")[2]
    with copy_of_object(
        digest, file_name, size, lambda path: _fetch_checked(folder, name, digest, path)
    ) as path:
        yield path


@contextmanager
def fresh_file(folder: BuildFolder, name: str, digest: str) -> Iterator[Path]:
    """Yield the path of a file of a build, or of a copy that is fetched now and removed afterwards.

    Raises:
        ShardError: The object is missing or damaged.
        StorageError: The store cannot be reached, or the cache cannot be written.
    """
    if isinstance(folder, Path):
        yield folder / name
        return
    with storage_errors(cache_dir()):
        cache_dir().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache_dir(), prefix="verify-") as temporary:
        path = Path(temporary) / name.rpartition("/")[2]
        _fetch_checked(folder, name, digest, path)
        yield path


def _fetch_checked(folder: StoreFolder, name: str, digest: str, path: Path) -> None:
    try:
        folder.fetch(name, path)
    except FileNotFoundError as error:
        raise ShardError(f"{folder}/{name} is missing", remedy=_FETCH_AGAIN) from error
    with storage_errors(path):
        kind = xxhash.xxh3_128 if len(digest) == _XXH3_DIGITS else sha256
        if digest_of_file(path, kind) != digest:
            raise _damaged(folder, name)


def _damaged(folder: StoreFolder, name: str) -> ShardError:
    return ShardError(
        f"{folder}/{name} is damaged: its content is not what was written", remedy=_FETCH_AGAIN
    )


@contextmanager
def copy_of_object(
    identity: str, name: str, size: int | None, fetch: Callable[[Path], None]
) -> Iterator[Path]:
    """Yield the path of a copy in the cache, which is fetched if it is missing.

    Args:
        identity: Hex digits that identify its content.
        name: The file name of the copy.
        size: Its size in bytes; None if it is not known.
        fetch: Writes the object to a path, and checks it.

    Raises:
        StorageError: The cache cannot be written.
        SftprepError: An error of `fetch`.
    """
    root = cache_dir() / COPIES_FOLDER
    path = root / identity / name
    for _ in range(_ATTEMPTS):
        with _locked(root, identity, shared=True):
            if _is_complete(path, size):
                _record_use(path)
                yield path
                return
        _make_room(root, size or 0)
        with _locked(root, identity, shared=False):
            if not _is_complete(path, size):  # another process may have fetched it meanwhile
                _fetch_copy(path, fetch)
    with storage_errors(path):
        raise OSError("other processes keep removing it; the limit of the cache is too small")


@contextmanager
def copy_of_input(url: str) -> Iterator[Path]:
    """Yield the path of a copy of an input in the cache, with the same file name.

    Raises:
        InputChanged: The object was replaced while it was fetched.
        FileNotFoundError: The object does not exist.
        StorageError: The store cannot be reached, or the cache cannot be written.
    """
    parent, _, name = url.rpartition("/")
    folder = StoreFolder(parent)
    mark = folder.mark(name)

    def fetch(path: Path) -> None:
        folder.fetch(name, path)
        if folder.mark(name) != mark or path.stat().st_size != mark.size:
            raise InputChanged(
                f"{url} changed while it was read",
                remedy="run the command again when no program writes to it",
            )

    identity = sha256(f"{url}\n{mark.size}\n{mark.tag}".encode()).hexdigest()
    with copy_of_object(identity, name, mark.size, fetch) as path:
        yield path


def _fetch_copy(path: Path, fetch: Callable[[Path], None]) -> None:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_path(path) as temporary:
            fetch(temporary)
            # A file that a power failure left empty would have its final name.
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)


@contextmanager
def _locked(root: Path, identity: str, *, shared: bool) -> Iterator[None]:
    """Hold the lock for an object while the block runs."""
    with ExitStack() as stack:
        with storage_errors(root):
            path = _lock_path(root, identity)
            stack.enter_context(hold_lock(path.open("ab"), path, shared=shared, wait=True))
        yield


def _lock_path(root: Path, identity: str) -> Path:
    folder = root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / identity[:2]


def _is_complete(path: Path, size: int | None) -> bool:
    try:
        found = path.stat().st_size
        return size is None or found == size
    except OSError:
        return False


def _record_use(path: Path) -> None:
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _TOUCHED_AFTER:
            os.utime(path)


class _Copy(NamedTuple):
    used: float  # when it was used last
    size: int
    path: Path


def _make_room(root: Path, size: int) -> None:
    """Remove the copies that were used least recently, until `size` bytes more fit in the limit.

    Copies whose lock is held are kept, so the limit may be exceeded for a short time.
    """
    copies = sorted(_list_copies(root))
    excess = sum(copy.size for copy in copies) + size - cache_limit()
    for copy in copies:
        if excess <= 0:
            return
        lock_path = _lock_path(root, copy.path.parent.name)
        with suppress(OSError), hold_lock(lock_path.open("ab"), lock_path):
            copy.path.unlink()
            excess -= copy.size
            copy.path.parent.rmdir()


def _list_copies(root: Path) -> Iterator[_Copy]:
    with suppress(FileNotFoundError), os.scandir(root) as folders:
        for folder in folders:
            if folder.name == "locks" or not folder.is_dir(follow_symlinks=False):
                continue
            # Another process may remove the folder meanwhile.
            with suppress(FileNotFoundError), os.scandir(folder) as files:
                for file in files:
                    status = file.stat(follow_symlinks=False)
                    yield _Copy(status.st_mtime, status.st_size, Path(file.path))

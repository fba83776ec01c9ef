"""Folders in an object store, and the operations on their objects."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple, TypeAlias, TypeVar

from sftprep.config.validation import is_url
from sftprep.errors import ConfigError, StorageError
from sftprep.stores.hub import is_hub_url, pin_revision
from sftprep.stores.protocols import (
    PROTOCOLS,
    base_of,
    conditional_writes,
    open_file_system,
    protocol_of,
    store_errors,
)

_Item = TypeVar("_Item")
_REQUESTS_AT_ONCE = 8
PROBE_PREFIX = ".sftprep-probe-"
"""The start of the names of the objects that `check_conditions` writes and removes."""


class Mark(NamedTuple):
    """What changes when the content of an object does.

    Attributes:
        size: Its size in bytes.
        tag: Its ETag or generation; "" if the protocol has none.
    """

    size: int
    tag: str


class StoredFile(NamedTuple):
    """An object in a listing.

    Attributes:
        url: Its URL.
        mark: Its mark.
        modified: When it was written; None if the protocol does not say.
    """

    url: str
    mark: Mark
    modified: datetime.datetime | None


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """All objects whose URLs start with that of the folder and a slash.

    A missing object raises FileNotFoundError; other failures raise StorageError.

    Args:
        url: The URL, without a slash at its end.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> StoreFolder:
        return StoreFolder(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last component of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> StoreFolder:
        """The folder that this one is in."""
        return StoreFolder(self.url.rpartition("/")[0])

    # --- reading ----------------------------------------------------------------------------------

    def fetch(self, name: str, path: Path) -> None:
        """Copy an object to a local file, in one request."""
        url, (system, key) = f"{self.url}/{name}", self._locate(name)
        with store_errors("read", url):
            system.get_file(key, os.fspath(path))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of an object, fewer at its end: one request."""
        if end <= start:
            return b""
        url, (system, key) = f"{self.url}/{name}", self._locate(name)
        with store_errors("read", url):
            return bytes(system.cat_file(key, start=start, end=end))

    def mark(self, name: str) -> Mark:
        """Return the mark of an object."""
        url, (system, key) = f"{self.url}/{name}", self._locate(name)
        with store_errors("read", url):
            details = system.info(key)
        if details.get("type") == "directory":
            raise FileNotFoundError(url)
        return _mark_of(details, self.url)

    def list_files(self) -> list[StoredFile]:
        """Return the objects in the folder and below, sorted by URL.

        Raises:
            StorageError: The bucket does not exist, or the store cannot be reached.
        """
        system, key = open_file_system(self.url)
        try:
            with store_errors("list", self.url):
                found = system.find(key, detail=True)
        except FileNotFoundError as error:
            raise StorageError(
                f"cannot list {self.url}: {error}", remedy="check the name of the bucket"
            ) from error
        prefix = f"{self.url}/"
        files = _to_files(found, base_of(self.url, key))
        return [each for each in files if each.url.startswith(prefix)]

    def names(self) -> set[str]:
        """Return the names of the objects in the folder and below, relative to it."""
        return {each.url[len(self.url) + 1 :] for each in self.list_files()}

    # --- writing ----------------------------------------------------------------------------------

    def put(self, files: Iterable[tuple[Path, str]]) -> None:
        """Write local files to objects, several at once, whether or not the objects exist.

        Args:
            files: The path of each file, and the name of its object.
        """

        def put_one(file: tuple[Path, str]) -> None:
            path, name = file
            url, (system, key) = f"{self.url}/{name}", self._locate(name)
            with store_errors("write", url):
                system.put_file(os.fspath(path), key)

        _run_at_once(put_one, files)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object if there is none; return whether it was written.

        The store decides, so that of several writers exactly one succeeds. Where the response was
        lost and the library sent the request again, the answer is False for what was written.
        """
        url, (system, key) = f"{self.url}/{name}", self._locate(name)
        with store_errors("write", url):
            return conditional_writes(url).create(system, key, content)

    def replace(self, name: str, content: bytes, mark: Mark) -> bool:
        """Write an object if its mark is still this one; return whether it was written.

        See `create`.
        """
        url, (system, key) = f"{self.url}/{name}", self._locate(name)
        with store_errors("write", url):
            return conditional_writes(url).replace(system, key, content, mark.tag)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that do not exist are ignored."""

        def remove_one(name: str) -> None:
            url, (system, key) = f"{self.url}/{name}", self._locate(name)
            try:
                with store_errors("remove", url):
                    system.rm_file(key)
            except FileNotFoundError:
                pass

        _run_at_once(remove_one, names)

    def check_conditions(self) -> None:
        """Check that the store decides conditional writes, with two of them that must fail.

        Raises:
            ConfigError: It does not, or the protocol has none.
            StorageError: The store cannot be written to.
        """
        conditional_writes(self.url)
        name = f"{PROBE_PREFIX}{token_hex(8)}"
        try:
            holds = (
                self.create(name, b"1")
                and not self.create(name, b"2")
                and not self.replace(name, b"2", Mark(1, "0" * 32))
                and self.replace(name, b"3", self.mark(name))
            )
        except FileNotFoundError as error:
            raise StorageError(
                f"cannot write {self.url}: {error}", remedy="create the bucket, or check its name"
            ) from error
        finally:
            self.remove([name])
        if not holds:
            raise ConfigError(
                f"{self.url} is in a store that does not decide conditional writes, so two builds"
                " could destroy each other",
                remedy="write to a local folder and copy it, or use a store that supports If-Match"
                " and If-None-Match",
            )

    def _locate(self, name: str) -> tuple[Any, str]:
        return open_file_system(f"{self.url}/{name}")


BuildFolder: TypeAlias = Path | StoreFolder
"""The folder of a build: local, or in a store."""


def folder_of(path: str | os.PathLike[str]) -> BuildFolder:
    """Return the folder of a path or URL; that of a data set on the Hub at its current commit.

    Raises:
        ConfigError: The protocol of the URL is unknown, or the URL names no folder.
        MissingDependency: The package for it is not installed.
        StorageError: Its library cannot be set up.
        HubError: The Hub cannot be reached, or does not have the data set.
    """
    if not (isinstance(path, str) and is_url(path)):
        return Path(path)
    if is_hub_url(path):
        path = pin_revision(path)
    protocol, _, rest = path.partition("://")
    if not rest.strip("/"):
        raise ConfigError(f"{path} names no folder", remedy="write s3://bucket/folder")
    url = f"{protocol.lower()}://{rest.rstrip('/')}"
    open_file_system(url)
    return StoreFolder(url)


def list_files(url: str) -> list[StoredFile]:
    """Return the objects that a URL names: one, those that match a pattern, or all of a folder.

    They are sorted by URL.

    Raises:
        ConfigError: The protocol of the URL is unknown.
        MissingDependency: The package for it is not installed.
        StorageError: The store cannot be reached.
    """
    system, key = open_file_system(url)
    base = base_of(url, key)
    with store_errors("list", url):
        if _is_pattern(url):
            return _to_files(system.glob(key, detail=True), base)
        try:
            details = system.info(key)
        except FileNotFoundError:
            return []
        if details.get("type") != "directory":
            return _to_files({key: details}, base)
        return _to_files(system.find(key, detail=True), base)


def marks_of(urls: Iterable[str]) -> dict[str, Mark]:
    """Return the current marks of objects, without those that do not exist.

    Objects in one folder are listed together.
    """
    folders: dict[str, list[str]] = {}
    for url in urls:
        folders.setdefault(url.rpartition("/")[0], []).append(url)
    marks: dict[str, Mark] = {}
    for folder, members in folders.items():
        is_listed = len(members) > 1 and not _is_pattern(folder)
        if is_listed:
            wanted, found = set(members), list_files(f"{folder}/*")
            marks |= {file.url: file.mark for file in found if file.url in wanted}
        for url in () if is_listed else members:
            with suppress(FileNotFoundError):
                marks[url] = StoreFolder(folder).mark(url.rpartition("/")[2])
    return marks


def size_of_object(url: str) -> int:
    """Return the size of an object in bytes."""
    folder, _, name = url.rpartition("/")
    return StoreFolder(folder).mark(name).size


def _is_pattern(url: str) -> bool:
    return any(sign in url for sign in "*?[")


def _to_files(found: dict[str, dict[str, Any]], base: str) -> list[StoredFile]:
    files = (
        StoredFile(f"{base}{name.lstrip('/')}", _mark_of(details, base), _time_of(details))
        for name, details in found.items()
        # An object with a slash at its end is the mark of a folder, which some programs write.
        if details.get("type") != "directory" and not name.endswith("/")
    )
    return sorted(files, key=lambda file: file.url)


def _mark_of(details: dict[str, Any], url: str) -> Mark:
    protocol = PROTOCOLS.get(protocol_of(url))
    names = (protocol.tag,) if protocol else ("ETag", "etag", "mtime", "Last-Modified")
    tag = next((details[name] for name in names if details.get(name)), "")
    if isinstance(tag, datetime.datetime):
        tag = tag.timestamp()  # as some file systems list it
    return Mark(int(details.get("size") or 0), str(tag).strip('"'))


def _time_of(details: dict[str, Any]) -> datetime.datetime | None:
    names = ("LastModified", "last_modified", "mtime", "created")
    time = next((details[name] for name in names if details.get(name)), None)
    if isinstance(time, (int, float)):
        return datetime.datetime.fromtimestamp(time, datetime.UTC)
    return time if isinstance(time, datetime.datetime) else None


def _run_at_once(function: Callable[[_Item], None], items: Iterable[_Item]) -> None:
    """Call a function for each item in several threads, and raise the first error."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as threads:
        futures = [threads.submit(function, item) for item in items]
        try:
            for future in futures:
                future.result()
        finally:
            threads.shutdown(cancel_futures=True)

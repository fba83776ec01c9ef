"""The protocols of object stores: their libraries, and their conditional writes.

Each store decides conditional writes in its own way, which fsspec does not cover, so each protocol
that can be written to has two functions here. All other protocols that fsspec knows are read-only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from sftprep.errors import ConfigError, MissingDependency, SftprepError, StorageError, setting
from sftprep.stores.hub import is_hub_url, is_pinned
from sftprep.stores.hub_error_conversion import hub_errors

_CONFLICTS = (409, 412)
"""Status codes of a conditional write that lost to another one, now or before."""
_LOCAL = ("file", "local")


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a store is reached.

    Attributes:
        package: The package that fsspec imports for it.
        extra: The extra of this project that installs the package.
        tag: The key of the details of an object with what changes when its content does.
        create: Writes an object if there is none; returns whether it did.
        replace: Writes an object if it has a tag; returns whether it did.
    """

    package: str
    extra: str
    tag: str
    create: Callable[[Any, str, bytes], bool]
    replace: Callable[[Any, str, bytes, str], bool]


def open_file_system(url: str) -> tuple[Any, str]:
    """Return the file system of fsspec for a URL, and the path of the URL in it.

    fsspec keeps one object for each protocol and process, so this is cheap, also after a fork. The
    options of a store (credentials, address) come from the environment, as its library reads them.

    Raises:
        ConfigError: The protocol is unknown.
        MissingDependency: Its package is not installed.
        StorageError: The library cannot be set up, for example without an account.
    """
    from fsspec.core import url_to_fs

    name = protocol_of(url)
    _check_known(name, url)
    # A listing that was kept would hide what other programs write.
    options = {"use_listings_cache": False} if name in PROTOCOLS else {}
    with store_errors("open", url):
        system, path = url_to_fs(url, **options)
    # So that the URL of another path of this file system is known, see `base_of`.
    if not url.endswith(path.strip("/")):
        raise ConfigError(
            f"{url} has a form that is not supported", remedy="write it as az://container/folder"
        )
    return system, path


def base_of(url: str, path: str) -> str:
    """Return what precedes a path of a file system in its URL, such as "s3://"."""
    return url[: len(url) - len(path.strip("/"))]


def protocol_of(url: str) -> str:
    """Return the protocol of a URL in lower case."""
    return url.partition("://")[0].lower()


def _check_known(name: str, url: str) -> None:
    import fsspec
    from fsspec.registry import known_implementations

    # An object of the file system for the Hub keeps what it has listed, so it is used for commits.
    is_changing = is_hub_url(url) and not is_pinned(url)
    if name in _LOCAL or is_changing or "::" in url:
        raise ConfigError(
            f"{url} is a URL that is not supported here",
            remedy="write the path of a local folder, or a URL such as s3://bucket/folder",
        )
    try:
        fsspec.get_filesystem_class(name)
    except ValueError as error:
        known = ", ".join(f"{each}://" for each in ("s3", "gs", "az"))
        raise ConfigError(
            f"{url} has the protocol {name}, which is not supported",
            remedy=f"use a local path, or one of {known}",
        ) from error
    except ImportError as error:
        if name in PROTOCOLS:
            protocol = PROTOCOLS[name]
            raise MissingDependency(
                protocol.package, extra=protocol.extra, needed_for=f"{name}://"
            ) from error
        hint = known_implementations.get(name, {}).get("err", "")
        raise ConfigError(
            f"{url} needs a package that is not installed", remedy=hint or str(error)
        ) from error


def conditional_writes(url: str) -> Protocol:
    """Return the conditional writes of the store of a URL.

    Raises:
        ConfigError: There are none for this protocol.
    """
    protocol = PROTOCOLS.get(protocol_of(url))
    if protocol is None:
        raise ConfigError(
            f"{setting('output')} is {url}, and {protocol_of(url)}:// can only be read: it has no"
            " writes that depend on the state of an object",
            remedy="write to a local folder and copy it, or to s3://, gs:// or az://",
        )
    return protocol


@contextmanager
def store_errors(action: str, url: str) -> Iterator[None]:
    """Raise what the library of a store raises in the `with` block as a StorageError.

    FileNotFoundError and FileExistsError are answers of a store and are not converted.

    Args:
        action: What is done to the URL, such as "read".
        url: The URL.
    """
    if is_hub_url(url):
        with hub_errors(action, url):
            yield
        return
    try:
        yield
    except (SftprepError, FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        # The libraries of the stores share no base class; errors of this project pass above.
        if not isinstance(error, (OSError, ValueError)) and not _is_of_library(error):
            raise
        text = str(error) or type(error).__name__
        raise StorageError(
            f"cannot {action} {url}: {text.splitlines()[0][:300]}",
            remedy="check the address, the credentials and the network, then run the same command"
            " again",
        ) from error


def _is_of_library(error: Exception) -> bool:
    modules = ("botocore", "aiobotocore", "gcsfs", "google", "azure", "aiohttp", "fsspec")
    return type(error).__module__.partition(".")[0] in modules


# --- s3 -------------------------------------------------------------------------------------------


def _create_s3(system: Any, path: str, content: bytes) -> bool:
    return _put_s3(system, path, content, IfNoneMatch="*")


def _replace_s3(system: Any, path: str, content: bytes, tag: str) -> bool:
    return _put_s3(system, path, content, IfMatch=f'"{tag}"')


def _put_s3(system: Any, path: str, content: bytes, **condition: str) -> bool:
    bucket, key, _ = system.split_path(path)
    try:
        system.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)
    except FileNotFoundError:
        if "IfMatch" in condition:
            return False  # the object was removed
        raise
    except OSError as error:
        # s3fs translates the errors of its library, and keeps them as the cause.
        response = getattr(error.__cause__, "response", None) or {}
        if response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _CONFLICTS:
            return False
        raise
    return True


# --- gs -------------------------------------------------------------------------------------------


def _create_gs(system: Any, path: str, content: bytes) -> bool:
    return _put_gs(system, path, content, "0")


def _put_gs(system: Any, path: str, content: bytes, tag: str) -> bool:
    """Write an object if it has this generation; 0 means that there is none."""
    bucket, key, _ = system.split_path(path)
    try:
        system.call(
            "POST",
            f"{system._location}/upload/storage/v1/b/{quote(bucket)}/o",
            uploadType="media",
            name=key,
            ifGenerationMatch=tag,
            headers={"Content-Type": "application/octet-stream"},
            data=content,
        )
    except FileExistsError:
        return False
    return True


# --- az -------------------------------------------------------------------------------------------


def _create_az(system: Any, path: str, content: bytes) -> bool:
    try:
        system.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    return True


def _replace_az(system: Any, path: str, content: bytes, tag: str) -> bool:
    from azure.core import MatchConditions
    from azure.core.exceptions import HttpResponseError

    condition = {"etag": f'"{tag}"', "match_condition": MatchConditions.IfNotModified}
    try:
        system.pipe_file(path, content, **condition)
    except FileExistsError:
        return False
    except HttpResponseError as error:
        if error.status_code in (*_CONFLICTS, 404):
            return False
        raise
    return True


_S3 = Protocol("s3fs", "s3", "ETag", _create_s3, _replace_s3)
_GS = Protocol("gcsfs", "gs", "generation", _create_gs, _put_gs)
_AZ = Protocol("adlfs", "az", "etag", _create_az, _replace_az)
PROTOCOLS = {
    **dict.fromkeys(("s3", "s3a"), _S3),
    **dict.fromkeys(("gs", "gcs"), _GS),
    **dict.fromkeys(("az", "abfs", "abfss"), _AZ),
}
"""Name of a protocol that can be written to -> its store."""

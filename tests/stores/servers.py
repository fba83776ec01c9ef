"""Servers of object stores on loopback, each with an empty bucket; a missing one skips its test."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

BUCKET = "bucket"
_AZURITE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""The public key of the account `devstoreaccount1`, which every azurite has."""


@contextmanager
def s3_server(wrap: Callable[[Any], Any] = lambda app: app) -> Iterator[str]:
    """Run moto's server, and yield the URL of a bucket.

    Args:
        wrap: Returns the WSGI application that serves requests, from that of moto.
    """
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server_of = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    server._server.app = wrap(server._server.app)
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with _environment("s3", variables):
            _create_bucket("s3")
            yield f"s3://{BUCKET}"
    finally:
        server.stop()


@contextmanager
def gs_server(*, has_conditions: bool = True) -> Iterator[str]:
    """Run gcp-storage-emulator, and yield the URL of a bucket.

    Args:
        has_conditions: Whether uploads obey `ifGenerationMatch`, as those of Google do. The
            emulator ignores it, so this is added here.
    """
    # Read when gcsfs is imported; it would look for credentials to ask for the kind of bucket.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    emulator = pytest.importorskip(
        "gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed"
    )
    from gcp_storage_emulator.handlers import objects

    before = objects._media_upload  # of another server of this process, which may be a wrapper
    upload = getattr(before, "__wrapped__", before)
    objects._media_upload = _with_conditions(upload) if has_conditions else upload
    port = _free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        with _environment("gs", {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}):
            yield f"gs://{BUCKET}"
    finally:
        server.stop()
        objects._media_upload = before


def _with_conditions(upload: Callable[..., None]) -> Callable[..., None]:
    """Return a handler that refuses uploads to an object with another generation."""
    lock = threading.Lock()

    @functools.wraps(upload)
    def handle(request: Any, response: Any, storage: Any) -> None:
        (wanted,) = request.query.get("ifGenerationMatch", [None])
        with lock:
            try:
                name = request.query["name"][0]
                found = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
            except NotFound:
                found = "0"
            if wanted in (None, found):
                upload(request, response, storage)
            else:
                response.status = HTTPStatus.PRECONDITION_FAILED
                response.json({"error": {"code": 412, "message": "conditionNotMet"}})

    from gcp_storage_emulator.exceptions import NotFound

    return handle


@contextmanager
def az_server(folder: Path) -> Iterator[str]:
    """Run azurite, and yield the URL of a container.

    Args:
        folder: An empty folder for its files.
    """
    pytest.importorskip("adlfs", reason="adlfs is not installed")
    program = os.environ.get("AZURITE") or shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite is not installed (npm install azurite; AZURITE=.../azurite-blob)")
    port = _free_port()
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location"]
    command += [str(folder), "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    address = f"http://127.0.0.1:{port}/devstoreaccount1"
    connection = (
        "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;"
        f"AccountKey={_AZURITE_KEY};BlobEndpoint={address};"
    )
    with (
        _environment("az", {"AZURE_STORAGE_CONNECTION_STRING": connection}),
        subprocess.Popen(command, stdout=subprocess.DEVNULL) as server,
    ):
        try:
            _wait_for(address)
            _create_bucket("az")
            yield f"az://{BUCKET}"
        finally:
            server.terminate()


@contextmanager
def _environment(protocol: str, variables: dict[str, str]) -> Iterator[None]:
    """Set the variables from which a file system of fsspec reads its address."""
    import fsspec

    kind = fsspec.get_filesystem_class(protocol)
    with patch.dict(os.environ, variables):
        kind.clear_instance_cache()  # fsspec would return the one of another server
        yield
    kind.clear_instance_cache()


def _create_bucket(protocol: str) -> None:
    import fsspec

    with suppress(FileExistsError):  # all servers of moto in a process have the same buckets
        fsspec.filesystem(protocol, use_listings_cache=False).mkdir(BUCKET)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(address: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(address)
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(address)

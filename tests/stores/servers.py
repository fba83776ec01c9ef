"""Servers of object stores on loopback, each with an empty bucket; a missing one skips its test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BUCKET = "bucket"
_AZURITE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""The public key of the account `devstoreaccount1`, which every azurite has."""


@contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's server, and yield the URL of a bucket."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server_of = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        _create_bucket("s3")
        yield f"s3://{BUCKET}"
    finally:
        server.stop()


@contextmanager
def gs_server() -> Iterator[str]:
    """Run gcp-storage-emulator, and yield the URL of a bucket."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    emulator = pytest.importorskip(
        "gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed"
    )
    port = _free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{port}"
    try:
        yield f"gs://{BUCKET}"
    finally:
        server.stop()


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
    os.environ["AZURE_STORAGE_CONNECTION_STRING"] = (
        "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;"
        f"AccountKey={_AZURITE_KEY};BlobEndpoint={address};"
    )
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            _wait_for(address)
            _create_bucket("az")
            yield f"az://{BUCKET}"
        finally:
            server.terminate()


def _create_bucket(protocol: str) -> None:
    import fsspec

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

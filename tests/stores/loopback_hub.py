"""A Hub on loopback that this process uses: the address of the Hub is read once, at import."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

from huggingface_hub import constants
from huggingface_hub.utils import _http

from sftprep.errors import ManifestError
from sftprep.pipeline.verify import verify
from sftprep.shards.manifest import read_manifest
from tests.sources.hub_writer import WritableHandler, WritableHub


@contextmanager
def loopback_hub() -> Iterator[WritableHub]:
    """Serve a Hub, and use it in this process, without waits between attempts."""
    hub = WritableHub()
    server = hub.serve(WritableHandler)
    address = f"http://127.0.0.1:{server.server_port}"
    values = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    with ExitStack() as stack:
        cache = stack.enter_context(TemporaryDirectory())
        stack.enter_context(patch.object(constants, "HF_HUB_CACHE", cache))
        for name, value in values.items():
            stack.enter_context(patch.object(constants, name, value))
        impatient = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
        stack.enter_context(patch.object(_http, "time", impatient))
        yield hub
    server.shutdown()
    server.server_close()


def digest_seen(name: str) -> str | None:
    """Return the digest of the build that a reader sees, after a check of all of it; None if there
    is none."""
    url = f"hf://datasets/{name}"
    try:
        manifest = read_manifest(url)
    except ManifestError:
        return None
    assert verify(url).problems == []
    assert verify(url, quick=True).problems == []
    if manifest.eval:
        assert verify(f"{url}/eval").problems == []
    return manifest.digest

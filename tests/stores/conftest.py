"""Stores for tests: in memory, and servers on loopback where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any
from unittest.mock import patch

import pytest

from sftprep import BuildReport, build
from sftprep.stores.folder import StoreFolder, folder_of
from sftprep.stores.protocols import PROTOCOLS
from tests.sources.hub_writer import WritableHub
from tests.stores import servers
from tests.stores.builds import example_lines, small_settings
from tests.stores.loopback_hub import loopback_hub
from tests.stores.memory import MEMORY


@pytest.fixture(scope="session")
def memory_url() -> Iterator[str]:
    with patch.dict(PROTOCOLS, {"memory": MEMORY}):
        yield "memory://bucket"


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    with servers.s3_server() as url:
        yield url


@pytest.fixture(scope="session")
def gs_url() -> Iterator[str]:
    with servers.gs_server() as url:
        yield url


@pytest.fixture(scope="session")
def az_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.az_server(tmp_path_factory.mktemp("azurite")) as url:
        yield url


@pytest.fixture(params=["memory", "s3", "gs", "az"])
def store(request: pytest.FixtureRequest) -> StoreFolder:
    """An empty folder in each kind of store."""
    return _empty_folder(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def memory(memory_url: str) -> StoreFolder:
    """An empty folder in a store in memory."""
    return _empty_folder(memory_url)


@pytest.fixture
def s3(s3_url: str) -> StoreFolder:
    """An empty folder in an S3 store."""
    return _empty_folder(s3_url)


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    """An empty Hub."""
    with loopback_hub() as found:
        yield found


@pytest.fixture
def small(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., BuildReport]:
    """A function that builds a few records to a place."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(example_lines(0, 12))

    def run(output: object, source: object = path, **settings: Any) -> BuildReport:
        return build(str(source), output=str(output), **small_settings(tokenizer_dir, **settings))

    return run


def _empty_folder(url: str) -> StoreFolder:
    found = folder_of(f"{url}/{token_hex(4)}")
    assert isinstance(found, StoreFolder)
    return found

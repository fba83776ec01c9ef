"""Builds in stores for tests: small inputs with several groups and shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sftprep.shards.group import files_of_group
from sftprep.shards.manifest import Manifest
from sftprep.stores.folder import StoreFolder
from tests.conftest import EXAMPLES

SMALL = {"max_length": 256, "shard_tokens": 600, "group_bytes": 1 << 16, "workers": 1}
"""Settings of a build with several shards; with `encoder`, it needs no process of its own."""


def small_settings(tokenizer: Path, **settings: Any) -> dict[str, Any]:
    return {"tokenizer": str(tokenizer), "encoder": "tokenizers", **SMALL, **settings}


def example_lines(first: int, last: int) -> bytes:
    lines = (EXAMPLES / "data" / "qa.jsonl").read_bytes().splitlines(keepends=True)
    return b"".join(lines[first:last])


def put_object(folder: StoreFolder, name: str, content: bytes, scratch: Path) -> str:
    """Write an object, and return its URL."""
    path = scratch / "object"
    path.write_bytes(content)
    folder.put([(path, name)])
    return f"{folder}/{name}"


def read_object(folder: StoreFolder, name: str) -> bytes:
    return folder.read_range(name, 0, 1 << 20)


def listed_names(folder: StoreFolder) -> list[str]:
    """Return the names of the shards that the data card lists."""
    return re.findall("- ((?:eval/)?shards/.*)", read_object(folder, "README.md").decode())


def shard_names(manifest: Manifest) -> list[str]:
    return [shard.name for shard in manifest.shards]


def group_names(manifest: Manifest) -> set[str]:
    """Return the names of the objects of the groups of a build, apart from shards."""
    pairs = zip(manifest.groups, manifest.read_groups(), strict=True)
    names = {name for entry, group in pairs for name in files_of_group(entry, group)}
    return names - {f"shards/{name}" for name in shard_names(manifest)}

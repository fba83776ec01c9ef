"""Opening of a finished build of any layout, for reading."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from sftprep.errors import ConfigError, ManifestError, setting
from sftprep.shards.layout import MANIFEST_NAME, SHARD_FOLDER
from sftprep.shards.manifest import Manifest, read_manifest
from sftprep.shards.reading.pack_settings import PackSettings
from sftprep.shards.reading.planned_shards import PlannedShards, with_totals
from sftprep.shards.reading.shards import Shards
from sftprep.shards.sequences.index import read_sequence_index
from sftprep.shards.shard_file import BUILD_AGAIN, check_size

_CHECKED_AT_OPEN = 1000
"""Up to this number, the shards of a build are looked for when it is opened. In a larger build, a
missing shard is found when it is used."""
_CHECKED_GROUPS = 16
"""The same for the groups of a build of layout `sequences`, whose shards only their files count."""


def open_shards(
    folder: str | os.PathLike[str],
    *,
    verify: bool = True,
    max_length: int | None = None,
    packing: str | None = None,
    overlong: str | None = None,
    seed: int | None = None,
) -> Shards:
    """Open a finished build for reading.

    The packs of a build of layout `sequences` are planned while they are read, so they may have
    other settings than those of the build. The packs of layout `packs` cannot.

    Args:
        folder: The output folder of the build, or its URL in a store: each shard is then copied to
            the cache when it is first used.
        verify: Whether to check the digest of each block when it is first accessed (about 20 GB/s),
            so that damage is an error and never wrong tokens.
        max_length: Tokens in a pack; None for that of the build, and so on.
        packing: The strategy: bfd, bfd_split, exact, wrapped or none.
        overlong: What happens to a longer sequence: truncate, split or drop.
        seed: The seed of the order of the packs.

    Raises:
        ConfigError: A setting is invalid, or not that of a build of layout `packs`.
        ManifestError: The folder is not a finished build.
        ShardError: A shard is missing or has another size.
        StorageError: The store cannot be reached.

    Example:
        open_shards("build", max_length=8192, seed=1)[0].input_ids
    """
    manifest = read_manifest(folder)
    root = manifest.folder
    assert root is not None
    if (listed_rows := sum(sum(entry.packs) for entry in manifest.groups)) != manifest.rows:
        raise ManifestError(
            f"{root / MANIFEST_NAME} is damaged: rows is {manifest.rows}, and the shards that it"
            f" lists have {listed_rows}",
            remedy=BUILD_AGAIN,
        )
    is_planned = manifest.layout == "sequences"
    is_small = len(manifest.groups) <= _CHECKED_GROUPS if is_planned else True
    if isinstance(root, Path) and is_small and manifest.num_shards <= _CHECKED_AT_OPEN:
        for info in manifest.shards:
            check_size(root / SHARD_FOLDER / info.name, info)
    requested = {"max_length": max_length, "packing": packing, "overlong": overlong, "seed": seed}
    if not is_planned:
        _check_requested(manifest, requested)
        return Shards(root, manifest, verify=verify)
    of_build = PackSettings.of_build(manifest)
    settings = of_build.replaced_by(**requested)
    if settings != of_build:
        manifest = with_totals(manifest, settings, partial(read_sequence_index, root))
    return PlannedShards(root, manifest, verify=verify, settings=settings)


def _check_requested(manifest: Manifest, requested: dict[str, Any]) -> None:
    """Check that the settings requested for stored packs are those of their build.

    Raises:
        ConfigError: One of them is another one.
    """
    found = {**manifest.config, "max_length": manifest.max_length}
    for name, value in requested.items():
        if value is not None and value != found.get(name):
            raise ConfigError(
                f"the packs in {manifest.folder} were made with"
                f" {setting(name, found.get(name))}, not {value}",
                remedy=[
                    f"leave out {setting(name)}",
                    f"build again with {setting('layout', 'sequences')}, whose packs are planned"
                    " while they are read",
                ],
            )

"""Removal of what killed builds left in an object store."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from sftprep.errors import ConfigError, ManifestError
from sftprep.pipeline.output.contents import FINAL_NAME
from sftprep.pipeline.output.store import build_names
from sftprep.shards.layout import EVAL_FOLDER, MANIFEST_NAME
from sftprep.shards.manifest import read_manifest
from sftprep.stores.folder import PROBE_PREFIX, StoredFile, StoreFolder, folder_of
from sftprep.stores.hub import is_hub_url


def collect_garbage(
    url: str, older_than: datetime.timedelta, *, dry_run: bool = False
) -> list[StoredFile]:
    """Remove the files of builds in a store that the current manifest does not name.

    Files with other names than those of builds are kept.

    Args:
        url: The URL of the output.
        older_than: The least age of what is removed: a running build has written files that no
            manifest names yet.
        dry_run: Whether to remove nothing.

    Returns:
        What was removed, or would be.

    Raises:
        ConfigError: It is not the URL of an object store.
        ManifestError: The manifest, or a file that it names, cannot be read.
        StorageError: The store cannot be reached.
    """
    if is_hub_url(url):
        raise ConfigError(
            f"{url} is on the Hub, where a push removes what others left",
            remedy="push a build there: sftprep push DIR org/name",
        )
    root = folder_of(url)
    if not isinstance(root, StoreFolder):
        raise ConfigError(
            f"{url} is a local folder, in which builds leave nothing behind",
            remedy="specify a URL such as s3://bucket/folder",
        )
    # Listed before the manifest is read: a build that commits in between is seen in the manifest.
    files = root.list_files()
    before = datetime.datetime.now(datetime.UTC) - older_than
    named = {file.url.removeprefix(f"{root}/"): file for file in files}
    kept = set(_named_files(url))
    if f"{EVAL_FOLDER}/{MANIFEST_NAME}" in named:  # a build of its own, whose files look like ours
        kept |= {name for name in named if name.startswith(f"{EVAL_FOLDER}/")}
    garbage = {
        name: file
        for name, file in named.items()
        if name not in kept
        and (FINAL_NAME.fullmatch(name) or name.startswith(PROBE_PREFIX))
        and file.modified is not None
        and file.modified < before
    }
    if not dry_run:
        root.remove(garbage)
    return list(garbage.values())


def _named_files(url: str) -> Iterator[str]:
    """Yield the names of the files of the current build."""
    yield MANIFEST_NAME
    try:
        manifest = read_manifest(url)
    except ManifestError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return
        raise
    yield from build_names("", manifest)
    if manifest.eval:
        yield f"{EVAL_FOLDER}/{manifest.eval.get('manifest')}"
        yield from build_names(f"{EVAL_FOLDER}/", read_manifest(f"{url}/{EVAL_FOLDER}"))

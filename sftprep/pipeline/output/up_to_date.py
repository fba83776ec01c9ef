"""Whether a finished build in an output folder is the one that a command would make.

1. The identity of a build is the digest of its settings, its recipes, the versions of the packages,
   and the marks of its inputs. The same command on the same files has the same identity.
2. A commit writes a line into the data card: the digest of the identity and of the manifest. The
   card belongs to no digest, so the manifest of a build does not depend on the times of files.
3. The build is up to date if this line is that of the command, no commit to the folder was
   interrupted, and all files that the manifests name are there, the shards with their sizes. In a
   local folder, the files of the groups and the indexes are compared with their digests, and with
   `overwrite` all other files too, so that this command still repairs a damaged build.

Data in memory, and functions without a stable digest, have no identity.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sftprep.config.build import BuildConfig, OutputConfig
from sftprep.config.user_functions import function_key
from sftprep.core.atomic_write import is_temporary_name, storage_errors
from sftprep.core.hashing import digest
from sftprep.core.regular_files import read_regular_file
from sftprep.errors import ManifestError, OutputExists, setting
from sftprep.pipeline.groups.receipts import find_digest
from sftprep.pipeline.output.claim import Destination
from sftprep.pipeline.output.contents import list_paths, work_files
from sftprep.pipeline.output.folder import HELD_NAMES, REUSABLE_NAME
from sftprep.pipeline.output.part_identity import describe_identity
from sftprep.pipeline.prepare.setup import Setup
from sftprep.shards.layout import (
    CARD_NAME,
    COMMIT_NAME,
    EVAL_FOLDER,
    SHARD_FOLDER,
    WORK_FOLDER,
    index_path,
    rejected_path,
)
from sftprep.shards.manifest import Manifest, read_manifest
from sftprep.shards.pack_index import is_index
from sftprep.stores.folder import BuildFolder, StoreFolder
from sftprep.stores.hub import HubRepository

_IDENTITY_LINE = re.compile(rb"^# Inputs and settings: ([0-9a-f]{64})$", re.MULTILINE)
_HEAD_BYTES = 4096
"""The line is in this part of a card."""


@dataclass(frozen=True, slots=True)
class FinishedBuild:
    """A finished build that is up to date.

    Attributes:
        folder: Its folder.
        manifest: Its manifest.
        evaluation: That of its evaluation build, if there is one.
    """

    folder: BuildFolder
    manifest: Manifest
    evaluation: Manifest | None


def find_identity(config: BuildConfig, setup: Setup) -> str | None:
    """Return the identity of a build; None if no later command can be known to be the same.

    Args:
        config: The settings of the build.
        setup: Its setup.
    """
    if any(each.stamp is None for each in setup.inputs):
        return None
    for recipe in setup.recipes:
        for function in recipe.functions().values():
            if function_key(function, recipe.transform_id) is None:
                return None
    return digest(describe_identity(config, setup))


def identity_line(identity: str, manifest: Manifest) -> str:
    """Return the line of a data card that names the identity of a build."""
    return f"# Inputs and settings: {digest(identity, manifest.digest)}"


def find_finished(
    destination: Destination, identity: str | None, settings: OutputConfig
) -> FinishedBuild | None:
    """Return the build in an output folder if it is up to date.

    Args:
        destination: The destination of the command.
        identity: The identity of the build that the command would make.
        settings: The settings of the output. With `overwrite`, a local folder is examined more
            closely: what is damaged or left over, this command repairs or removes.

    Raises:
        OutputExists: Files of this build are missing or damaged, and may not be replaced.
        StorageError: The store cannot be reached.
        HubError: The Hub cannot be reached.
    """
    folder = _folder_at_head(destination)
    if identity is None or folder is None:
        return None
    name = str(folder)
    if isinstance(folder, Path):
        name = os.path.abspath(folder)  # "s3:/x" is a path here, and not a URL
        with storage_errors(folder):
            if _has_leftovers(folder, settings):
                return None
    try:
        manifest = read_manifest(name)
        if _read_identity_line(folder) != digest(identity, manifest.digest):
            return None
    except ManifestError:
        return None
    evaluation, problem = None, ""
    try:
        evaluation = read_manifest(f"{name}/{EVAL_FOLDER}") if manifest.eval else None
        if evaluation is not None and evaluation.digest != manifest.eval.get("digest"):
            problem = f"{folder / EVAL_FOLDER} holds another evaluation build"
        elif damaged := _find_damaged(folder, manifest, evaluation, by_content=settings.overwrite):
            problem = f"{folder / damaged} is missing or damaged"
    except ManifestError as error:
        problem = error.text
    if not problem:
        return FinishedBuild(folder, manifest, evaluation)
    if settings.overwrite:
        return None
    raise OutputExists(
        f"{folder} holds the finished build of this command, but {problem}",
        remedy=f"repair it with {setting('overwrite', True)}",
    )


def _folder_at_head(destination: Destination) -> BuildFolder | None:
    """Return the folder of a destination; None for a repository that does not exist."""
    if not isinstance(destination, HubRepository):
        return destination
    head = destination.head()
    return None if head is None else StoreFolder(destination.at(head))


def _has_leftovers(root: Path, settings: OutputConfig) -> bool:
    """Return whether a build that was killed has left something that this command removes.

    A commit that was interrupted may also have left files of another build in place.
    """
    work = root / WORK_FOLDER
    if (work / COMMIT_NAME).exists():
        return True
    if not settings.overwrite or not root.is_dir():
        return False
    left = {*work_files(work)}
    if settings.keep_spill:
        left = {name for name in left - HELD_NAMES if not REUSABLE_NAME.fullmatch(name)}
    return bool(left) or any(is_temporary_name(name) for name, _ in list_paths(root))


def _read_identity_line(folder: BuildFolder) -> str:
    """Return the digest in this line of the data card in a folder; "" without one."""
    try:
        if isinstance(folder, Path):
            head = read_regular_file(folder / CARD_NAME, _HEAD_BYTES)[:_HEAD_BYTES]
        else:
            head = folder.read_range(CARD_NAME, 0, _HEAD_BYTES)
    except OSError:
        return ""
    found = _IDENTITY_LINE.search(head)
    return found[1].decode() if found else ""


def _find_damaged(
    folder: BuildFolder, manifest: Manifest, evaluation: Manifest | None, *, by_content: bool
) -> str | None:
    """Return the name of the first file of the groups that is missing or damaged, if there is one.

    Args:
        folder: The folder of the build.
        manifest: Its manifest.
        evaluation: The manifest of its evaluation build, if there is one.
        by_content: Whether the files of a local folder are compared with their digests.
    """
    builds = {"": manifest} | ({} if evaluation is None else {f"{EVAL_FOLDER}/": evaluation})
    files = (
        dataclasses.replace(file, name=f"{prefix}{file.name}")
        for prefix, build in builds.items()
        for file in _list_files(build)
    )
    if isinstance(folder, StoreFolder):
        start = len(folder.url) + 1
        sizes = {each.url[start:]: each.mark.size for each in folder.list_files()}
        damaged = (f for f in files if f.name not in sizes or f.bytes not in (sizes[f.name], None))
    else:
        damaged = (f for f in files if not _is_complete(folder / f.name, f, by_content=by_content))
    return next((file.name for file in damaged), None)


@dataclass(frozen=True, slots=True)
class _ListedFile:
    """What a manifest says of a file of a group.

    Attributes:
        name: Its path in the folder of the build.
        bytes: Its size; None if it is not known.
        sha256: Its SHA-256, in hex; "" for an index.
        xxh3: The xxh3-128 of an index, in hex.
    """

    name: str
    bytes: int | None
    sha256: str
    xxh3: str = ""


def _list_files(manifest: Manifest) -> Iterator[_ListedFile]:
    """Yield the files of the groups of a build, apart from those of the groups themselves.

    These were compared with their digests when they were read.
    """
    for entry, group in zip(manifest.groups, manifest.read_groups(), strict=True):
        for shard in group.shards:
            yield _ListedFile(f"{SHARD_FOLDER}/{shard.name}", shard.bytes, shard.sha256)
        if entry.rejected:
            yield _ListedFile(rejected_path(entry.key, entry.rejected), None, entry.rejected)
        if entry.digest:
            name = index_path(group.key, group.index_digest)
            yield _ListedFile(name, None, "", group.index_digest)


def _is_complete(path: Path, file: _ListedFile, *, by_content: bool) -> bool:
    """Return whether a local file is what the manifest says, as far as it is examined."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode) or file.bytes not in (status.st_size, None):
        return False
    if file.xxh3:
        return is_index(path, file.xxh3)
    return not by_content or find_digest(path) == file.sha256

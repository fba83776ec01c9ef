"""Pushing of a finished local build to a data set repository on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sftprep.config.validation import is_url, local_folder
from sftprep.errors import ConfigError, ManifestError, ShardError, format_count, setting
from sftprep.pipeline.output.hub import PushReport, publish, replaceable_manifest
from sftprep.pipeline.output.store import build_names
from sftprep.shards.layout import (
    CARD_NAME,
    EVAL_FOLDER,
    MANIFEST_NAME,
    SHARD_FOLDER,
    manifest_file,
)
from sftprep.shards.manifest import Manifest, read_manifest
from sftprep.shards.shard_file import check_size
from sftprep.stores.hub import HubRepository, NewFile


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> PushReport:
    """Upload a finished build to a data set repository on the Hub, the manifest last.

    Files that the repository has with the same content are not uploaded. A push that was killed
    leaves the build that was there before, and the same push continues it.

    Args:
        folder: The output folder of the build.
        repository: The repository, as org/name or hf://datasets/org/name[@branch]. It is created if
            it is missing.
        revision: The branch, which is created from the main one if it is missing.
        private: Whether a new repository is private.
        message: The message of the commits.
        overwrite: Whether another build in the repository is replaced.
        progress: Called with the name of the stage, the bytes uploaded, and those in total.

    Returns:
        The commit, and what was uploaded.

    Raises:
        ManifestError: The folder is not a finished build.
        ShardError: A file of the build is missing or damaged.
        OutputExists: The repository holds another build.
        OutputBusy: Another program has committed to the repository meanwhile.
        HubError: The Hub cannot be reached, or refuses.

    Example:
        pushed = push("shards", "org/name", private=True)
        shards = open_shards(pushed.url)
    """
    if is_url(folder):
        raise ConfigError(
            f"{folder} is a URL, but only a local build can be pushed", remedy="copy it first"
        )
    root = Path(local_folder(os.fspath(folder), "the folder"))
    manifest = read_manifest(root)
    target = _repository_of(repository, revision)
    last = NewFile(root / MANIFEST_NAME, MANIFEST_NAME)
    files = [*_files_of_build(root, "", manifest), *_files_of_evaluation(root, manifest)]
    if (root / CARD_NAME).is_file():
        files.append(NewFile(root / CARD_NAME, CARD_NAME))
    head = target.create(private=private)
    replaced = replaceable_manifest(target, head, overwrite=overwrite, same=last)
    message = message or f"Build of {format_count(manifest.rows, 'pack')}"
    return publish(target, replaced, files, last, message=message, progress=progress)


def _repository_of(name: str, revision: str | None) -> HubRepository:
    if not is_url(name):
        return HubRepository(name, revision)
    found = HubRepository.of_url(name)
    if revision is not None and found.branch is not None:
        raise ConfigError(
            f"{name} has a revision, and {setting('revision')} is {revision}",
            remedy="specify one of them",
        )
    return HubRepository(found.name, found.branch or revision)


def _files_of_build(root: Path, prefix: str, manifest: Manifest) -> Iterator[NewFile]:
    """Yield the files of a build without its manifest, after a check of their sizes.

    Args:
        root: The output folder.
        prefix: The path of the build in it: "", or "eval/".
        manifest: Its manifest.

    Raises:
        ManifestError: The file of a group is missing or damaged, or the build is an old one.
        ShardError: Another file is missing, or a shard has another size.
    """
    if not manifest.has_slices:
        raise ManifestError(
            f"{root} was written in format version {manifest.format_version}, which cannot be"
            " pushed",
            remedy="build it again",
        )
    digests = {}
    for info in manifest.shards:
        name = f"{prefix}{SHARD_FOLDER}/{info.name}"
        check_size(root / name, info)
        digests[name] = info.sha256
    for name in sorted(build_names(prefix, manifest)):
        if not (root / name).is_file():
            raise ShardError(f"{root / name} is missing", remedy="build again")
        yield NewFile(root / name, name, digests.get(name))


def _files_of_evaluation(root: Path, manifest: Manifest) -> Iterator[NewFile]:
    """Yield the files of the evaluation build, if there is one, with its manifest.

    Raises:
        ManifestError: It is missing, damaged, or belongs to another build.
    """
    if not manifest.eval:
        return
    evaluation = read_manifest(root / EVAL_FOLDER)
    if evaluation.digest != manifest.eval.get("digest"):
        raise ManifestError(
            f"{root / EVAL_FOLDER} belongs to another build than {root}", remedy="build again"
        )
    yield from _files_of_build(root, f"{EVAL_FOLDER}/", evaluation)
    path = manifest_file(root / EVAL_FOLDER)
    yield NewFile(path, f"{EVAL_FOLDER}/{path.name}")

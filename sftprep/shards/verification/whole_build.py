"""The checks of a build as a whole: sums over its groups, files of no group, its evaluation build.

They read the manifest and the files of the groups, and list the folder, but open no shard.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from sftprep.core.regular_files import read_regular_file
from sftprep.errors import ManifestError
from sftprep.shards.group import files_of_group
from sftprep.shards.layout import (
    EVAL_FOLDER,
    GROUP_FOLDER,
    LARGEST_TOKENIZER,
    REJECTED_FOLDER,
    SHARD_FOLDER,
    TOKENIZER_FOLDER,
    tokenizer_paths,
)
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import Manifest, read_manifest
from sftprep.shards.verification.group_files import find_length_problems
from sftprep.stores.folder import BuildFolder

_MOST_NAMES = 20
"""The most files that one problem names."""


def find_manifest_problems(manifest: Manifest) -> list[str]:
    """Return the contradictions within a manifest."""
    problems = [
        f"the ledger of the manifest does not balance: {equation} does not hold"
        for equation in manifest.accounting.check()
    ]
    problems += find_length_problems(manifest.lengths, manifest.accounting)
    totals = {
        "packs": (sum(sum(entry.packs) for entry in manifest.groups), manifest.rows),
        "tokens": (sum(entry.tokens for entry in manifest.groups), manifest.tokens),
        "trained tokens": (
            sum(entry.trained_tokens for entry in manifest.groups),
            manifest.trained_tokens,
        ),
    }
    return problems + [
        f"the groups hold {found:,} {name}, the manifest says {expected:,}"
        for name, (found, expected) in totals.items()
        if found != expected
    ]


def find_build_problems(root: BuildFolder, manifest: Manifest) -> list[str]:
    """Return the problems that concern several groups, or no group of a build."""
    counts: Counter[str] = Counter()
    data_digest = sha256()
    is_complete = True
    for number in range(len(manifest.groups)):
        try:
            group = manifest.read_group(number)
        except ManifestError:
            is_complete = False  # reported with the group
            continue
        counts.update(group.accounting.to_counts())
        for info in group.shards:
            data_digest.update(bytes.fromhex(info.sha256))
    problems = []
    # Without the file of a group, no sum can be right, and two more problems would hide the one
    # that matters.
    if is_complete:
        if Ledger.from_counts(counts) != manifest.accounting:
            problems.append("the ledgers of the groups do not sum to that of the build")
        if data_digest.hexdigest() != manifest.data_digest:
            problems.append("data_digest is not that of the shards")
    if isinstance(root, Path):  # in a store, such files may be those of a build that is running
        problems += _find_unlisted_files(root, manifest)
    problems += _find_tokenizer_problems(root, manifest)
    return problems + _find_eval_problems(root, manifest)


def _find_tokenizer_problems(root: BuildFolder, manifest: Manifest) -> Iterator[str]:
    """Yield the files of the tokenizer that are missing or damaged."""
    for name, digest in tokenizer_paths(manifest.tokenizer).items():
        try:
            if isinstance(root, Path):
                content = read_regular_file(root / name, LARGEST_TOKENIZER)
            else:
                content = root.read_range(name, 0, LARGEST_TOKENIZER + 1)
        except OSError:
            content = b""
        if sha256(content).hexdigest() != digest:
            yield f"{root / name} is not what was written"


def _find_unlisted_files(root: Path, manifest: Manifest) -> list[str]:
    """Return the folders with files that no manifest lists.

    A build that was killed while it replaced another one leaves such files, and a program that
    opens shards/*/*.arrow without the manifest would read them.
    """
    problems = _find_unlisted_in(root, manifest)
    try:
        return problems + _find_unlisted_in(root / EVAL_FOLDER, read_manifest(root / EVAL_FOLDER))
    except ManifestError:
        # A damaged evaluation build is another problem; without one, its files belong to none.
        return problems if manifest.eval else problems + _find_unlisted_in(root / EVAL_FOLDER, None)


def _find_unlisted_in(root: Path, manifest: Manifest | None) -> list[str]:
    """Return the folders of one build with files that its manifest does not list."""
    listed = {*(tokenizer_paths(manifest.tokenizer) if manifest else ())}
    unknown: list[str] = []  # what the names of groups begin with whose other files are not known
    for number, entry in enumerate(manifest.groups if manifest else ()):
        try:
            assert manifest is not None
            listed.update(files_of_group(entry, manifest.read_group(number)))
        except ManifestError:
            folders = (f"{folder}/{entry.key}-" for folder in (GROUP_FOLDER, REJECTED_FOLDER))
            unknown += [f"{SHARD_FOLDER}/{entry.key}/", *folders]
    problems = []
    for folder in (SHARD_FOLDER, GROUP_FOLDER, REJECTED_FOLDER, TOKENIZER_FOLDER):
        unlisted = sorted(
            name.removeprefix(f"{folder}/")
            for name in _files_below(root, folder)
            if name not in listed and not name.startswith(tuple(unknown))
        )
        if unlisted:
            more = len(unlisted) - _MOST_NAMES
            problems.append(
                f"{root / folder} holds files that no manifest lists:"
                f" {', '.join(unlisted[:_MOST_NAMES])}{f' and {more:,} more' if more > 0 else ''};"
                " build again with overwrite, or move them to another folder"
            )
    return problems


def _files_below(root: Path, folder: str) -> Iterator[str]:
    """Yield the paths of the files in a folder and below, relative to `root`; no hidden ones."""
    for parent, folders, files in os.walk(root / folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(parent).relative_to(root).as_posix()
        yield from (f"{inner}/{name}" for name in files if not name.startswith("."))


def _find_eval_problems(root: BuildFolder, manifest: Manifest) -> list[str]:
    """Return the problems with the identity of the evaluation build.

    It must be the one that this build was made with. Its shards are not checked here: it is a build
    of its own, to be verified on its own.
    """
    if not manifest.eval:
        return []
    folder = root / str(manifest.eval.get("folder", ""))
    try:
        # Only a direct subfolder: a manipulated manifest may name any path.
        digest = read_manifest(str(folder)).digest if folder.parent == root else ""
    except ManifestError as error:
        return [f"the evaluation build: {error.message}"]
    if digest == manifest.eval.get("digest"):
        return []
    return [
        f"the evaluation build in {folder} belongs to another build than this one: run the build"
        " again"
    ]

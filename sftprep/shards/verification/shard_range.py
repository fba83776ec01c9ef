"""The unit of verification: consecutive shards of a group.

The first range of a group also checks the files of the group. A range is checked by a pure function
of its description and of files, so it may run on any machine, and may run twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from sftprep.errors import ManifestError, ShardError
from sftprep.shards.group import Group, ShardInfo
from sftprep.shards.layout import SHARD_FOLDER, index_path
from sftprep.shards.manifest import Manifest, read_manifest
from sftprep.shards.pack_index import PackIndex, read_index
from sftprep.shards.sequences.index import SequenceIndex, read_sequence_index
from sftprep.shards.verification.group_files import (
    check_stored_group,
    find_group_problems,
    sequences_in_packs,
)
from sftprep.shards.verification.sampled_shard import sample_shard
from sftprep.shards.verification.sequence_shard import check_sequences
from sftprep.shards.verification.whole_shard import check_shard, find_total_problems
from sftprep.stores.cache import fresh_file
from sftprep.stores.folder import BuildFolder

RowIndex = PackIndex | SequenceIndex
"""The index of the rows of shards: of packs, or of sequences."""


@dataclass(frozen=True, slots=True, order=True)
class ShardRange:
    """The shards [start, stop) of a group.

    Attributes:
        group: The number of the group in the manifest, from 0.
        start: The number of the first shard in the group.
        stop: The number of the shard after the last one.
        folder: The folder of the build, or its URL.
        manifest_digest: `Manifest.digest`.
        quick: Whether only some blocks of each shard are read.
    """

    group: int
    start: int
    stop: int
    folder: str
    manifest_digest: str
    quick: bool


@dataclass(slots=True, kw_only=True)
class Totals:
    """Totals of what was checked: those of the groups and shards that are intact.

    Attributes:
        groups: The number of groups whose file is intact.
        shards: The number of shards that are intact.
        rows: The number of their packs; or of their stored sequences, in layout `sequences`.
        tokens: The number of their tokens, counted in the packs, or, if the check is quick, in the
            index of the group.
        sequences: The number of their sequences, likewise.
        trained_tokens: The number of their targets of the loss, likewise.
        blocks: The number of blocks of all shards, the end of each included.
        blocks_read: The number of these blocks that were read.
    """

    groups: int = 0
    shards: int = 0
    rows: int = 0
    tokens: int = 0
    sequences: int = 0
    trained_tokens: int = 0
    blocks: int = 0
    blocks_read: int = 0

    def add(self, other: Totals) -> None:
        """Add other totals."""
        for total in dataclasses.fields(Totals):
            setattr(self, total.name, getattr(self, total.name) + getattr(other, total.name))


@dataclass(slots=True)
class Findings:
    """The result for a range."""

    range: ShardRange
    totals: Totals = field(default_factory=Totals)
    problems: list[str] = field(default_factory=list)


def cut_ranges(
    folder: BuildFolder, manifest: Manifest, groups: Iterable[int], num_ranges: int, *, quick: bool
) -> Iterator[ShardRange]:
    """Yield the ranges of groups, in order.

    Args:
        folder: The folder of the build.
        manifest: Its manifest.
        groups: The numbers of the groups.
        num_ranges: About how many ranges there shall be; each has one shard at least.
        quick: Whether only some blocks of each shard are read.
    """
    numbers = [*groups]
    total = sum(sum(_known_rows(manifest, number)) for number in numbers)
    # Before version 2.0, a group has no index by which a range could be checked alone.
    rows_per_range = total / num_ranges if manifest.has_slices else math.inf
    for number in numbers:
        shard_rows = _known_rows(manifest, number)
        start = size = 0
        for stop, rows in enumerate(shard_rows, start=1):
            size += rows
            if size >= rows_per_range or stop == len(shard_rows):
                yield ShardRange(number, start, stop, str(folder), manifest.digest, quick)
                start, size = stop, 0
        if not shard_rows:
            yield ShardRange(number, 0, 0, str(folder), manifest.digest, quick)


def _known_rows(manifest: Manifest, number: int) -> Sequence[int]:
    """Return the rows of each shard of a group; none if its file is damaged, which is reported."""
    with suppress(ManifestError):
        return manifest.shard_rows(number)
    return ()


def count_shards(manifest: Manifest, groups: Iterable[int]) -> int:
    """Return the number of shards of groups that are known, by the numbers of the groups."""
    return sum(len(_known_rows(manifest, number)) for number in groups)


def check_range(shards: ShardRange) -> Findings:
    """Check the shards of a range; damage is a problem and not an exception.

    Raises:
        ManifestError: The manifest cannot be read, or was replaced.
        StorageError: The store cannot be reached.
    """
    manifest = _read_same_manifest(shards.folder, shards.manifest_digest)
    root = manifest.folder
    assert root is not None
    findings = Findings(shards)
    entry = manifest.groups[shards.group]
    try:
        if not shards.start:
            check_stored_group(root, entry, manifest)
        group = manifest.read_group(shards.group)
    except (ManifestError, ShardError) as error:
        if not shards.start:  # reported once
            findings.problems.append(error.message)
        return findings
    totals, problems = findings.totals, findings.problems
    if not shards.start:
        totals.groups = 1
        problems += find_group_problems(root, entry, group, manifest, quick=shards.quick)
    index = _read_index(root, group, manifest)
    first = sum(info.rows for info in group.shards[: shards.start])
    for info in group.shards[shards.start : shards.stop]:
        sizes = None if index is None else _part(index, first, first + info.rows)
        first += info.rows
        totals.blocks += len(info.blocks) or 1
        try:
            if shards.quick:
                found = _check_quickly(root, info, sizes, totals)
            else:
                found = _check_wholly(root, info, sizes, group, manifest, totals)
        except ShardError as error:
            found = [error.message]
        problems += found
    if not manifest.has_slices:
        problems += _check_version_1(group, shards, totals)
    return findings


def _check_quickly(
    root: BuildFolder, info: ShardInfo, sizes: RowIndex | None, totals: Totals
) -> list[str]:
    """Check some blocks of a shard, and add the packs that it should have to the totals.

    Raises:
        ShardError: The shard is missing or damaged.
    """
    totals.blocks_read += sample_shard(root, info)
    if sizes is not None:
        totals.add(_totals_of(sizes))
        path = root / f"{SHARD_FOLDER}/{info.name}"
        return [f"{path}: {text}" for text in find_total_problems(sizes, info)]
    totals.add(
        Totals(shards=1, rows=info.rows, tokens=info.tokens, trained_tokens=info.trained_tokens)
    )
    return []


def _check_wholly(
    root: BuildFolder,
    info: ShardInfo,
    sizes: RowIndex | None,
    group: Group,
    manifest: Manifest,
    totals: Totals,
) -> list[str]:
    """Check all of a shard, and add its packs to the totals.

    Raises:
        ShardError: The shard is missing or damaged.
    """
    if manifest.layout == "sequences" and sizes is None:
        return []  # the damaged index is a problem already, and the rows are not known without it
    with fresh_file(root, f"{SHARD_FOLDER}/{info.name}", info.sha256) as path:
        if isinstance(sizes, SequenceIndex):
            found: RowIndex = sizes
            problems = check_sequences(path, info, sizes, group, manifest)
        else:
            found, problems = check_shard(path, info, group, manifest)
            if sizes is not None and not found.equals(sizes):
                index = root / index_path(group.key, group.index_digest)
                problems.append(f"{path}: its packs do not have the sizes that {index} says")
    totals.blocks_read += len(info.blocks) or 1
    totals.add(_totals_of(found))
    return problems


def _check_version_1(group: Group, shards: ShardRange, totals: Totals) -> list[str]:
    """Check the number of sequences, which an index has since version 2.0."""
    expected = sequences_in_packs(group.accounting, group.plan)
    if shards.quick:
        totals.sequences = expected
    elif totals.shards == len(group.shards) and totals.sequences != expected:
        return [f"the shards hold {totals.sequences:,} sequences, the ledger says {expected:,}"]
    return []


def _totals_of(index: RowIndex) -> Totals:
    return Totals(
        shards=1,
        rows=len(index),
        tokens=int(index.tokens.sum(dtype=np.int64)),
        sequences=int(index.sequences.sum(dtype=np.int64)),
        trained_tokens=int(index.trained_tokens.sum(dtype=np.int64)),
    )


def _read_index(root: BuildFolder, group: Group, manifest: Manifest) -> RowIndex | None:
    """Return the index of a group; None without one, or if it is damaged, which is reported."""
    with suppress(ShardError):
        if manifest.layout == "sequences":
            return read_sequence_index(root, group)
        return read_index(root, group) if manifest.has_slices else None
    return None


def _part(index: RowIndex, start: int, stop: int) -> RowIndex:
    """Return the part of the index of a group for the rows [start, stop) of its shards."""
    if isinstance(index, SequenceIndex):
        return index.part(start, stop)
    return index.take(np.arange(start, stop))


# A worker checks many ranges of one build.
@lru_cache(maxsize=2)
def _read_same_manifest(folder: str, digest: str) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.digest != digest:
        raise ManifestError(
            f"the build in {folder} was replaced while it was verified",
            remedy="verify it again when no build writes to it",
        )
    return manifest

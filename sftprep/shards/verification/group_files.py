"""The checks of the files of a group, apart from its shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sftprep.errors import ShardError
from sftprep.shards.group import Group, GroupEntry
from sftprep.shards.layout import group_path, index_path, rejected_path
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import Manifest
from sftprep.shards.manifest_size import MOST_EXACT_LENGTHS
from sftprep.shards.pack_index import PackIndex, is_index, read_index_file
from sftprep.shards.reading.group_plan import count_packs
from sftprep.shards.reading.pack_settings import PackSettings
from sftprep.shards.reading.planned_shards import entry_with
from sftprep.shards.sequences.index import (
    SequenceIndex,
    read_sequence_index,
    read_sequence_index_file,
)
from sftprep.shards.shard_file import BUILD_AGAIN
from sftprep.shards.verification.whole_shard import file_digest
from sftprep.stores.cache import fresh_file
from sftprep.stores.folder import BuildFolder, StoreFolder


def check_stored_group(root: BuildFolder, entry: GroupEntry, manifest: Manifest) -> None:
    """Check the file of a group in a store itself, and not its copy in the cache.

    Raises:
        ShardError: It is missing or damaged.
    """
    if isinstance(root, StoreFolder) and manifest.has_slices:
        with fresh_file(root, group_path(entry.key, entry.digest), entry.digest):
            pass


def find_group_problems(
    root: BuildFolder, entry: GroupEntry, group: Group, manifest: Manifest, *, quick: bool
) -> list[str]:
    """Return the problems of a group: its entry in the manifest, its ledgers and its other files.

    Args:
        root: The folder of the build.
        entry: The entry of the group in the manifest.
        group: The content of its file.
        manifest: The manifest of the build.
        quick: Whether the content of the rejected records is not read.
    """
    problems = []
    finders: list[Callable[[], str]] = [partial(_find_entry_problem, root, entry, group, manifest)]
    if manifest.has_slices:
        finders += [
            partial(_find_rejected_problem, root, entry, quick),
            partial(_find_index_problem, root, entry, group, manifest.layout),
        ]
    for find in finders:
        try:
            problem = find()
        except ShardError as error:
            problem = error.message
        problems += [problem] if problem else []
    return problems + _find_input_problems(group, manifest)


def _find_entry_problem(
    root: BuildFolder, entry: GroupEntry, group: Group, manifest: Manifest
) -> str:
    expected = GroupEntry.of(
        group, entry.digest, lines_before=entry.lines_before, rejected=entry.rejected
    )
    max_length = manifest.max_length
    if manifest.layout == "sequences":
        max_length = group.max_length  # a group has no limit
        try:
            index = read_sequence_index(root, group)
        except ShardError:
            return ""  # reported as a problem of the index
        totals = count_packs(index, PackSettings.of_build(manifest), group)
        expected = entry_with(expected, totals)
    if (entry, max_length) != (expected, group.max_length):
        return f"the entry of group {entry.key} in the manifest is not that of its file"
    return ""


def _find_rejected_problem(root: BuildFolder, entry: GroupEntry, quick: bool) -> str:
    if not entry.rejected:
        return ""
    name = rejected_path(entry.key, entry.rejected)
    path = root / name
    if isinstance(path, Path):
        is_intact = path.is_file() if quick else file_digest(path) == entry.rejected
        return "" if is_intact else f"{path} is not what was written"
    assert isinstance(root, StoreFolder)
    if quick:
        try:
            root.mark(name)
        except FileNotFoundError:
            return f"{path} is missing"
        return ""
    with fresh_file(root, name, entry.rejected):
        return ""


def _find_index_problem(root: BuildFolder, entry: GroupEntry, group: Group, layout: str) -> str:
    name = index_path(group.key, group.index_digest)
    with fresh_file(root, name, group.index_digest) as path:
        # The digest of the file itself: what was read of it before may be in memory.
        if not is_index(path, group.index_digest):
            problem = "is not what was written" if path.is_file() else "is missing"
            raise ShardError(f"{path} {problem}", remedy=BUILD_AGAIN)
        read = read_sequence_index_file if layout == "sequences" else read_index_file
        index: PackIndex | SequenceIndex = read(path, group)
    found, expected = int(index.sequences.sum()), sequences_in_packs(group.accounting, group.plan)
    if found != expected:
        return (
            f"the packs of group {entry.key} hold {found:,} sequences, its ledger says {expected:,}"
        )
    return ""


def sequences_in_packs(ledger: Ledger, plan: dict[str, Any]) -> int:
    """Return how many sequences the packs of a group or build have: a cut makes two of one."""
    cuts = plan.get("cuts", 0)
    return ledger.sequences + (cuts if isinstance(cuts, int) else 0)


def _find_input_problems(group: Group, manifest: Manifest) -> list[str]:
    """Return the problems with the lines and ledgers of the inputs of a group.

    The ledgers of all inputs sum to that of the group.
    """
    problems = [
        f"the slices of {info.path} have {sum(info.slices):,} lines, not {info.lines:,}"
        for info in group.inputs
        if manifest.has_slices and sum(info.slices) != info.lines
    ]
    problems += find_length_problems(group.lengths, group.accounting)
    if all(info.accounting == Ledger() for info in group.inputs):
        return problems  # builds of version 1.0 have no ledger per input
    problems += [
        f"the ledger of {info.path} does not balance: {equation} does not hold"
        for info in group.inputs
        for equation in info.accounting.check()
    ]
    if Ledger.sum(info.accounting for info in group.inputs) != group.accounting:
        problems.append("the ledgers of the inputs do not sum to that of the build")
    return problems


def find_length_problems(lengths: dict[str, Any], ledger: Ledger) -> list[str]:
    """Return the differences between the totals of a histogram of lengths and a ledger."""
    problems = []
    expected = {"tokens": ledger.tokens_in, "trained_tokens": ledger.trained_in}
    for name, number in expected.items() if lengths else ():
        counts = lengths.get(name)
        is_valid = isinstance(counts, list) and all(type(count) is int for count in counts)
        if counts is None or not is_valid or sum(counts) != number:
            what = name.replace("_", " ")
            problems.append(f"the histogram of lengths does not count the {number:,} {what}")
    if "exact" in lengths and not _are_positions_counted(lengths, ledger.trained_in):
        problems.append("the counts of trained tokens by position are not those of the ledger")
    return problems


def _are_positions_counted(lengths: dict[str, Any], trained: int) -> bool:
    """Return whether the trained tokens by position are all of them, apart from later positions."""
    try:
        total = sum(lengths["exact"]["trained_positions"])
        has_all = max(lengths["up_to"], default=0) <= MOST_EXACT_LENGTHS
    except (KeyError, TypeError):
        return False
    return bool(total == trained if has_all else total <= trained)

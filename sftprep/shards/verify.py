"""Verification of a build: its shards and its ledger.

The digests, the schema and the invariants of each shard are checked.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftprep.core.hashing import digest_of_file
from sftprep.errors import ManifestError, ShardError
from sftprep.shards.group import Group, GroupEntry, ShardInfo
from sftprep.shards.layout import (
    EVAL_FOLDER,
    SHARD_FOLDER,
    group_path,
    index_path,
    rejected_path,
)
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import Manifest, read_manifest
from sftprep.shards.pack_index import PackIndex, read_index_file
from sftprep.shards.schema import ORIGIN_BITS, numpy_view, position_dtype
from sftprep.shards.shard_file import ShardFile
from sftprep.shards.writer import make_position_ids
from sftprep.stores.cache import fresh_file
from sftprep.stores.folder import BuildFolder, StoreFolder


@dataclass(slots=True)
class Verification:
    """The result of `verify`: totals of the readable shards, and the problems."""

    folder: BuildFolder
    groups: int = 0
    shards: int = 0
    rows: int = 0  # packs
    tokens: int = 0
    sequences: int = 0
    trained_tokens: int = 0
    problems: list[str] = field(default_factory=list)  # empty if the build is intact

    @property
    def ok(self) -> bool:
        """Return whether the build has no problem."""
        return not self.problems


def verify(
    folder: str | os.PathLike[str], *, progress: Callable[[int, int], None] = lambda *_: None
) -> Verification:
    """Check all of a build.

    Args:
        folder: The output folder of the build, or its URL in a store, whose cache is not used.
        progress: Called after each shard, with the number of shards checked and of all shards.

    Returns:
        The totals and the problems; damage inside a build is a problem and not an exception.

    Raises:
        ManifestError: The folder is not a build.
    """
    manifest = read_manifest(folder)
    root = manifest.folder
    assert root is not None
    result = Verification(root)
    num_shards = manifest.num_shards
    totals: Counter[str] = Counter()
    data_digest = sha256()
    for number, entry in enumerate(manifest.groups):
        try:
            _check_stored_group(root, entry, manifest)
            group = manifest.read_group(number)
        except (ManifestError, ShardError) as error:
            result.problems.append(error.message)
            continue
        result.groups += 1
        totals.update(group.accounting.to_counts())
        for info in group.shards:
            data_digest.update(bytes.fromhex(info.sha256))
        _verify_group(root, entry, group, manifest, result, progress)
    result.problems += [
        f"the ledger of the manifest does not balance: {equation} does not hold"
        for equation in manifest.accounting.check()
    ]
    result.problems += _find_length_problems(manifest.lengths, manifest.accounting)
    result.problems += _find_unlisted_shards(root, manifest)
    result.problems += _find_eval_problems(root, manifest)
    # If a file could not be read, no total can be right, and four more problems would hide the one
    # that matters.
    if result.groups == len(manifest.groups):
        if Ledger.from_counts(totals) != manifest.accounting:
            result.problems.append("the ledgers of the groups do not sum to that of the build")
        if data_digest.hexdigest() != manifest.data_digest:
            result.problems.append("data_digest is not that of the shards")
        if result.shards == num_shards:
            result.problems += _find_total_problems(result, manifest)
    return result


def _verify_group(
    root: BuildFolder,
    entry: GroupEntry,
    group: Group,
    manifest: Manifest,
    result: Verification,
    progress: Callable[[int, int], None],
) -> None:
    """Check the files of a group, and add its totals and problems to the result."""
    sizes: list[PackIndex] = []
    for info in group.shards:
        try:
            with fresh_file(root, f"{SHARD_FOLDER}/{info.name}", info.sha256) as path:
                sizes += _verify_shard(path, info, manifest, group, result)
        except ShardError as error:
            result.problems.append(error.message)
        progress(result.shards, manifest.num_shards)
    try:
        result.problems += _find_entry_problems(root, entry, group, manifest)
        if manifest.has_slices:
            result.problems += _find_index_problems(root, group, PackIndex.concatenate(sizes))
    except ShardError as error:
        result.problems.append(error.message)
    result.problems += _find_input_problems(group, manifest)


def _find_total_problems(result: Verification, manifest: Manifest) -> list[str]:
    cuts = manifest.plan.get("cuts", 0)
    totals = {
        "rows": (result.rows, manifest.rows),
        "tokens": (result.tokens, manifest.tokens),
        "sequences": (result.sequences, manifest.accounting.sequences + cuts),
        "trained tokens": (result.trained_tokens, manifest.trained_tokens),
    }
    return [
        f"the shards hold {found:,} {name}, the manifest says {expected:,}"
        for name, (found, expected) in totals.items()
        if found != expected
    ]


def _check_stored_group(root: BuildFolder, entry: GroupEntry, manifest: Manifest) -> None:
    """Raise ShardError if the file of a group in a store is damaged, whatever the cache has."""
    if isinstance(root, StoreFolder) and manifest.has_slices:
        with fresh_file(root, group_path(entry.key), entry.digest):
            pass


def _find_entry_problems(
    root: BuildFolder, entry: GroupEntry, group: Group, manifest: Manifest
) -> list[str]:
    """Return the differences between a group, its entry in the manifest, and its files."""
    problems = []
    expected = GroupEntry.of(
        group, entry.digest, lines_before=entry.lines_before, rejected=entry.rejected
    )
    if (entry, manifest.max_length) != (expected, group.max_length):
        problems.append(f"the entry of group {entry.key} in the manifest is not that of its file")
    rejected = root / rejected_path(entry.key)
    if isinstance(rejected, StoreFolder):
        if entry.rejected:
            with fresh_file(root, rejected_path(entry.key), entry.rejected):
                pass
    elif manifest.has_slices and _file_digest(rejected) != entry.rejected:
        problems.append(f"{rejected} is not what was written")
    return problems


def _find_index_problems(root: BuildFolder, group: Group, found: PackIndex) -> list[str]:
    """Return the differences between the index of a group and the packs of its readable shards."""
    with fresh_file(root, index_path(group.key), group.index_digest) as path:
        index = read_index_file(path, group)
    if len(found) < len(index) or found.equals(index):
        return []  # a missing shard is a problem already
    return [f"{root / index_path(group.key)} does not have the sizes of the packs"]


def _file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex; "" if it does not exist."""
    try:
        return digest_of_file(path)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}", remedy="") from error


def _find_input_problems(group: Group, manifest: Manifest) -> list[str]:
    """Return the problems with the lines and ledgers of the inputs of a group.

    The ledgers of all inputs sum to that of the group.
    """
    problems = [
        f"the slices of {info.path} have {sum(info.slices):,} lines, not {info.lines:,}"
        for info in group.inputs
        if manifest.has_slices and sum(info.slices) != info.lines
    ]
    problems += _find_length_problems(group.lengths, group.accounting)
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


def _find_length_problems(lengths: dict[str, Any], ledger: Ledger) -> list[str]:
    """Return the histogram totals with a difference from the ledger."""
    problems = []
    expected = {"tokens": ledger.tokens_in, "trained_tokens": ledger.trained_in}
    for name, number in expected.items() if lengths else ():
        counts = lengths.get(name)
        is_valid = isinstance(counts, list) and all(type(count) is int for count in counts)
        if counts is None or not is_valid or sum(counts) != number:
            what = name.replace("_", " ")
            problems.append(f"the histogram of lengths does not count the {number:,} {what}")
    return problems


def _find_unlisted_shards(root: BuildFolder, manifest: Manifest) -> list[str]:
    """Return the folders with shards missing from every manifest.

    A build that was killed while it replaced another one leaves such files, and a program that
    opens shards/*/*.arrow without the manifest would read them. In a store, they may be those of a
    build that is running.
    """
    if isinstance(root, StoreFolder):
        return []
    problems = []
    for folder in (SHARD_FOLDER, f"{EVAL_FOLDER}/{SHARD_FOLDER}"):
        try:
            build = manifest if folder == SHARD_FOLDER else read_manifest(root / EVAL_FOLDER)
            listed = {info.name for info in build.shards}
        except ManifestError:
            listed = set()
        paths = (root / folder).rglob("*.arrow")
        names = {path.relative_to(root / folder).as_posix() for path in paths}
        if unlisted := sorted(names - listed):
            problems.append(
                f"{root / folder} holds files that no manifest lists: {', '.join(unlisted)}; build"
                " again with overwrite, or move them to another folder"
            )
    return problems


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


def _verify_shard(
    path: Path, info: ShardInfo, manifest: Manifest, group: Group, result: Verification
) -> list[PackIndex]:
    """Check a shard, add up its totals, and return the sizes of its packs, block by block."""
    shard = ShardFile(path, info, manifest.max_length, verify=True, checked=set())
    if _file_digest(path) != info.sha256:
        raise ShardError(f"{path}: its SHA-256 is not that of the manifest", remedy="")
    found = []
    for number in range(len(shard)):
        first = number * shard.packs_per_block
        batch = shard.read_block(number)
        problems = _find_row_problems(batch, first, manifest)
        result.problems += (f"{path}: {problem}" for problem in problems)
        found.append(_add_totals(batch, result))
        origin = numpy_view(batch.column("origin").values)
        if (wrong := np.flatnonzero(~_are_lines(origin, group, manifest))).size:
            offsets = numpy_view(batch.column("origin").offsets)
            row = first + int(np.searchsorted(offsets, wrong[0], side="right")) - 1
            result.problems.append(
                f"{path}: row {row}: origin {origin[wrong[0]]} is not a line of the inputs"
            )
    result.shards += 1
    return found


def _are_lines(origin: NDArray[np.int64], group: Group, manifest: Manifest) -> NDArray[np.bool_]:
    """Return whether each origin is that of a line of the inputs of a group: bool [n]."""
    if not manifest.has_slices:
        return (origin >= 0) & (origin < sum(info.lines for info in group.inputs))
    # All slices that do not exist are taken for one without lines, after the last one.
    lines = np.array([*(n for info in group.inputs for n in info.slices), 0], dtype=np.int64)
    number = np.minimum(origin >> ORIGIN_BITS, len(lines) - 1)
    line = origin & ((1 << ORIGIN_BITS) - 1)
    is_line: NDArray[np.bool_] = (origin >= 0) & (line < lines[np.maximum(number, 0)])
    return is_line


def _add_totals(batch: pa.RecordBatch, result: Verification) -> PackIndex:
    """Add the totals of a block to the result, and return the sizes of its packs."""
    seq_lengths = batch.column("seq_lengths")
    index = PackIndex.of(
        numpy_view(batch.column("completion_mask").values),
        numpy_view(seq_lengths.values),
        numpy_view(seq_lengths.offsets),
    )
    result.rows += len(index)
    result.tokens += len(batch.column("input_ids").values)
    result.sequences += len(seq_lengths.values)
    result.trained_tokens += int(index.trained_tokens.sum(dtype=np.int64))
    return index


def _find_row_problems(batch: pa.RecordBatch, first: int, manifest: Manifest) -> Iterator[str]:
    """Yield the problems with the values of a block whose layout is valid.

    Each check reports the first violation only.

    Args:
        batch: The block.
        first: The number of packs before it in the shard.
        manifest: The manifest of the build.
    """
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    ids = numpy_view(columns["input_ids"].values)
    mask = numpy_view(columns["completion_mask"].values)
    seq_lengths = numpy_view(columns["seq_lengths"].values)
    token_offsets = numpy_view(columns["input_ids"].offsets).astype(np.int64)
    pack_offsets = numpy_view(columns["seq_lengths"].offsets).astype(np.int64)

    # Lengths of sequences and of packs.
    if (wrong := np.flatnonzero(seq_lengths > manifest.max_length)).size:
        row = first + int(np.searchsorted(pack_offsets, wrong[0], side="right")) - 1
        yield (
            f"row {row}: a sequence of {seq_lengths[wrong[0]]} tokens (1 to"
            f" {manifest.max_length} are allowed)"
        )
    pack_lengths = np.diff(token_offsets)
    if (wrong := np.flatnonzero(pack_lengths > manifest.max_length)).size:
        yield (
            f"row {first + wrong[0]}: {pack_lengths[wrong[0]]} tokens, more than"
            f" {manifest.max_length}"
        )

    # Values of each token.
    if "loss_weights" in columns:
        weights = numpy_view(columns["loss_weights"].values)
        if not (np.isfinite(weights).all() and ((weights > 0) == mask).all()):
            yield "loss_weights are not above 0 exactly where tokens are trained"
    if not isinstance(vocab_size := manifest.tokenizer.get("vocab_size"), int):
        yield "the manifest does not state the size of the vocabulary"
    elif (wrong := np.flatnonzero(ids >= vocab_size)).size:
        row = first + int(np.searchsorted(token_offsets, wrong[0], side="right")) - 1
        yield f"row {row}: id {ids[wrong[0]]} is outside the vocabulary of {vocab_size}"
    if "position_ids" in columns:
        stored = numpy_view(columns["position_ids"].values)
        expected = make_position_ids(seq_lengths, position_dtype(manifest.max_length))
        if not np.array_equal(stored, expected):
            yield "position_ids do not restart at 0 with each sequence"

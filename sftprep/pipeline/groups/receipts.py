"""Receipts of groups: a group that is done is found again, without its input and its spills.

1. The key of a receipt is the digest of everything that determines the result of a group: its
   ranges of the inputs with the size and modification time of each file, the recipes, the settings,
   and the versions of the packages.
2. When the shards of a group are complete, its receipt is written last. It has the file of the
   group, the digests of its other files, and what the rest of the build needs to know.
3. A task with a valid receipt is not run. A receipt is valid if each file that it names is
   complete: in the work folder, or in the folder of the previous build, which has the same shards
   if a group has not changed.

Receipts are JSON with a checksum. In a process that other processes cannot share results with (data
in memory, functions without a stable digest), the key is a random one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from sftprep.core.atomic_write import create_folder, write_bytes
from sftprep.core.hashing import digest, digest_of_file
from sftprep.errors import ManifestError
from sftprep.pipeline.executors.base import find_versions
from sftprep.pipeline.groups.receipt_cache import restore_receipt
from sftprep.pipeline.groups.receipt_files import Receipt, read_receipt, write_receipt
from sftprep.pipeline.groups.task import GroupDone, GroupInput, GroupTask
from sftprep.pipeline.passes.spill import read_spill
from sftprep.pipeline.prepare.inputs import absolute_path, check_files_unchanged
from sftprep.shards.group import Group, ShardInfo, check_shards
from sftprep.shards.json_fields import FieldError, parse_fields
from sftprep.shards.layout import (
    SENT_SUFFIX,
    SHARD_FOLDER,
    group_path,
    index_path,
    raw_rejected_name,
    receipt_name,
)
from sftprep.shards.manifest import FORMAT_VERSION
from sftprep.shards.pack_index import is_index

_VERSION = 2
"""Incremented when the same task gives other files or another receipt than before."""


# --- the key --------------------------------------------------------------------------------------


def receipt_key(task: GroupTask, parents: Sequence[str] = ()) -> str:
    """Return the key of the receipt of a task: 40 hex digits.

    Args:
        task: The group.
        parents: The receipts of the groups from which its records are.

    Raises:
        OSError: The file with its duplicates cannot be read.
    """
    settings, config = task.settings, task.settings.config
    entries = [settings.entries[each.entry] for each in task.inputs]
    selection: Any = [(entry.name, entry.repeat, entry.weight) for entry in entries]
    if task.quotas is not None:
        selection = [
            (settings.entries[each.entry].name, dataclasses.astuple(task.quotas[each.entry]))
            for each in task.inputs
        ]
    only = None
    if task.is_only:
        # Such a group also decides what other builds decide for all of their groups.
        weights = [(entry.repeat, entry.weight) for entry in settings.entries]
        only = [config.output.max_rejected, config.read.mix_by, weights]
    return digest(
        (_VERSION, FORMAT_VERSION, find_versions()),
        [_describe_input(each) for each in task.inputs],
        (dataclasses.asdict(settings.limit), dataclasses.asdict(config.pack)),
        (config.output.layout, config.output.position_ids, config.output.shard_tokens),
        config.output.on_bad_record,
        (config.read.duplicates, config.evaluation.eval_fraction, config.evaluation.eval_seed),
        None if settings.stats is None else dataclasses.asdict(settings.stats),
        (settings.lane_block, settings.slice_bytes),
        (selection, only, task.evaluation, task.occurrence),
        None if task.duplicates is None else sha256(task.duplicates.read_bytes()).hexdigest(),
        list(parents),
    )[:40]


def _describe_input(each: GroupInput) -> list[Any]:
    source = each.source
    return [
        source.name,
        # The same relative name may lead to another file from another folder.
        absolute_path(source),
        each.mark,
        (source.kind, source.start, source.end, source.limit, source.group),
        (source.strip_nulls, None if source.columns is None else sorted(source.columns)),
        (each.format, each.recipe_key),
    ]


# --- writing and reading --------------------------------------------------------------------------


def finish_group(task: GroupTask, receipt: Receipt, *, reused: int) -> GroupDone:
    """Write the receipt of a group whose files are complete, and return its result.

    Args:
        task: The group.
        receipt: Its receipt.
        reused: The number of partitions whose spills existed already.

    Raises:
        InputChanged: An input is not the file that it was when the build began.
        StorageError: The receipt cannot be written.
    """
    check_marks(task)
    write_receipt(task.settings.work, receipt)
    return _done(receipt, reused=reused)


def check_marks(task: GroupTask) -> None:
    """Check that the inputs of a group are what they were when the build began.

    A file that was replaced while it was read must not get a receipt with its earlier mark.

    Raises:
        InputChanged: One of them changed.
    """
    check_files_unchanged((each.source, each.mark) for each in task.inputs)


def find_done(task: GroupTask, key: str) -> GroupDone | None:
    """Return the result of a group that is done; None if it must be run.

    Args:
        task: The group.
        key: The key of its receipt.
    """
    work = task.settings.work
    path = work / receipt_name(key)
    receipt = read_receipt(path)
    if receipt is None and restore_receipt(key, work):
        receipt = read_receipt(path)
    if receipt is None or not _is_complete(task, receipt):
        return None
    return _done(receipt, reused=len(receipt.spills))


def find_kept(task: GroupTask) -> Receipt | None:
    """Return the receipt of a group in the work folder, if its shards are there.

    It says what `find_done` is about to find, from the sizes of the shards alone. A receipt from
    the cache may be there without them.
    """
    receipt = read_receipt(task.settings.work / receipt_name(receipt_key(task)))
    if receipt is None or not receipt.group:
        return receipt
    shards = json.loads(receipt.group)["shards"]
    sizes = {f"{SHARD_FOLDER}/{shard['name']}": shard["bytes"] for shard in shards}
    return receipt if all(_has_size(task, *item) for item in sizes.items()) else None


def _has_size(task: GroupTask, name: str, size: int) -> bool:
    """Return whether a shard was sent, or is in the work folder or output folder with its size."""
    staged = task.staging / name
    if staged.with_name(f"{staged.name}{SENT_SUFFIX}").is_file():
        return True
    for path in (staged, _final_path(task, name)):
        with suppress(OSError):
            if path.lstat().st_size == size:
                return True
    return False


def _final_path(task: GroupTask, name: str) -> Path:
    # Files are staged under the same paths as later in the output folder.
    return task.settings.root / (task.staging / name).relative_to(task.settings.work)


def _done(receipt: Receipt, *, reused: int) -> GroupDone:
    group = json.loads(receipt.group) if receipt.group else {}
    return GroupDone(
        receipt=receipt.key,
        key=group.get("key", ""),
        digest=sha256(receipt.group.encode()).hexdigest() if group else "",
        evaluation=receipt.evaluation,
        bytes=receipt.bytes,
        reused=reused,
        unread_columns=receipt.unread_columns,
    )


def _is_complete(task: GroupTask, receipt: Receipt) -> bool:
    """Return whether all files of a group are complete."""
    work = task.settings.work
    if find_digest(work / raw_rejected_name(receipt.key)) != receipt.rejected:
        return False
    if receipt.group:
        try:
            group: Group = parse_fields(Group, json.loads(receipt.group), "")
            group.check()
            check_shards(group.shards, work / receipt_name(receipt.key))
        except (ValueError, RecursionError, FieldError, ManifestError):
            return False
        if not _has_index(task, group):
            return False
        if not all(
            _has_file(task, f"{SHARD_FOLDER}/{shard.name}", shard.bytes, shard.sha256)
            for shard in group.shards
        ):
            return False
    spills = [name for name in receipt.other_files if name.endswith(".arrow")]
    return all(read_spill(work / name) is not None for name in spills)


def _has_file(task: GroupTask, name: str, size: int, expected: str) -> bool:
    """Return whether a shard of a build is in the work folder or in the output folder.

    In the work folder, it was written a short time ago; a file of a finished build may have been
    damaged since, so all of it is read. A shard that was sent to a store left its digest.
    """
    staged = task.staging / name
    if staged.is_file() and not staged.is_symlink():
        return staged.stat().st_size == size
    sent = staged.with_name(f"{staged.name}{SENT_SUFFIX}")
    if sent.is_file() and sent.read_bytes() == expected.encode():
        return True
    final = _final_path(task, name)
    return not final.is_symlink() and find_digest(final) == expected


def _has_index(task: GroupTask, group: Group) -> bool:
    """Return whether the index of a group is in the work folder or in the output folder."""
    name = index_path(group.key, group.index_digest)
    paths = (task.staging / name, _final_path(task, name))
    return any(is_index(path, group.index_digest) for path in paths if not path.is_symlink())


def find_shards(work: Path, done: GroupDone) -> tuple[ShardInfo, ...]:
    """Return the shards of a group that was just done."""
    receipt = read_receipt(work / receipt_name(done.receipt))
    assert receipt is not None, "it was just written or checked"
    if not receipt.group:
        return ()
    group: Group = parse_fields(Group, json.loads(receipt.group), "")
    return group.shards


def find_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex; "" if it cannot be read or does not exist."""
    try:
        return digest_of_file(path)
    except OSError:
        return ""


def place_group_file(work: Path, staging: Path, done: GroupDone) -> None:
    """Write the file of a group under its final name to `staging`.

    Raises:
        StorageError: It cannot be written.
    """
    receipt = read_receipt(work / receipt_name(done.receipt))
    assert receipt is not None, "its files were just written or checked"
    path = staging / group_path(done.key, done.digest)
    create_folder(path.parent)
    write_bytes(path, receipt.group.encode())

"""The rounds before the last one: what a build must know of all groups before it plans one.

Their results are files of the work folder, by the key of the group, so that a round that was
interrupted continues, and other processes use its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from sftprep.core.hashing import digest
from sftprep.pipeline.executors.base import Executor
from sftprep.pipeline.groups.duplicates import is_hash_file, write_hashes
from sftprep.pipeline.groups.receipt_cache import restore_file
from sftprep.pipeline.groups.receipt_files import read_values, write_values
from sftprep.pipeline.groups.receipts import check_marks, receipt_key
from sftprep.pipeline.groups.run import OnBytes, tokenize_group
from sftprep.pipeline.groups.selection import SequenceTable, UsableSequences
from sftprep.pipeline.groups.task import GroupTask
from sftprep.pipeline.mixture.quotas import Quota, share_copies, share_sizes
from sftprep.pipeline.mixture.sized_records import SizedRecords, is_sizes_file
from sftprep.shards.layout import hash_name, receipt_name, sizes_name


def count_usable(task: GroupTask, executor: Executor, on_bytes: OnBytes) -> None:
    """Write what the shares of a mixture depend on: the usable records of a group, by source.

    By records, it is their number; by tokens, their sizes. Nothing is done if it is known. The
    spills of the group are written, so that its next round does not tokenize again.
    """
    if has_counts(task):
        return
    parts = tokenize_group(task, executor, on_bytes)
    usable = UsableSequences.find(parts, task)
    check_marks(task)
    path = task.settings.work / _counts_name(task)
    if _mixes_by_records(task):
        write_values(path, {"usable": usable.count_records(task).tolist()})
    else:
        usable.measure_records(task).write(path)


def has_counts(task: GroupTask) -> bool:
    """Return whether `count_usable` wrote its result, in this build or an earlier one."""
    name, work = _counts_name(task), task.settings.work
    return _is_complete(task) or (restore_file(name, work) and _is_complete(task))


def share_groups(tasks: Sequence[GroupTask]) -> list[tuple[Quota, ...]]:
    """Return the quotas of each group of a build, from the results of `count_usable`.

    Raises:
        EmptyInput: A source with a weight has no usable record.
    """
    entries = tasks[0].settings.entries
    paths = [task.settings.work / _counts_name(task) for task in tasks]
    if not _mixes_by_records(tasks[0]):
        return share_sizes(entries, [partial(SizedRecords.read, path) for path in paths])
    counts = [values["usable"] for path in paths if (values := read_values(path)) is not None]
    return share_copies(entries, np.array(counts, np.int64))


def _is_complete(task: GroupTask) -> bool:
    path = task.settings.work / _counts_name(task)
    if _mixes_by_records(task):
        return read_values(path) is not None
    return is_sizes_file(path, len(task.settings.entries))


def _mixes_by_records(task: GroupTask) -> bool:
    return task.settings.config.read.mix_by == "records"


def _counts_name(task: GroupTask) -> str:
    mix_by = task.settings.config.read.mix_by
    key = digest("usable records", mix_by, receipt_key(task))[:40]
    return receipt_name(key) if _mixes_by_records(task) else sizes_name(key)


def hash_records(task: GroupTask, executor: Executor, on_bytes: OnBytes) -> None:
    """Write the hashes of the records of a group, for the search for duplicates.

    Nothing is done if they are known.
    """
    if not has_hashes(task):
        parts = tokenize_group(task, executor, on_bytes)
        table = SequenceTable.from_parts(parts, task)
        check_marks(task)
        path = task.settings.work / hash_name(receipt_key(task))
        write_hashes(path, table.record, table.exact_hashes, table.near_hashes)


def has_hashes(task: GroupTask) -> bool:
    """Return whether `hash_records` wrote the hashes, in this build or an earlier one."""
    name, work = hash_name(receipt_key(task)), task.settings.work
    return is_hash_file(work / name) or (restore_file(name, work) and is_hash_file(work / name))

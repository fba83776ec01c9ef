"""The rounds before the last one: what a build must know of all groups before it plans one.

Their results are files of the work folder, by the key of the group, so that a round that was
interrupted continues, and other processes use its results.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sftprep.core.hashing import digest
from sftprep.pipeline.executors.base import Executor
from sftprep.pipeline.groups.duplicates import is_hash_file, write_hashes
from sftprep.pipeline.groups.receipt_cache import restore_file
from sftprep.pipeline.groups.receipt_files import read_values, write_values
from sftprep.pipeline.groups.receipts import check_marks, receipt_key
from sftprep.pipeline.groups.run import OnBytes, tokenize_group
from sftprep.pipeline.groups.selection import SequenceTable, UsableSequences
from sftprep.pipeline.groups.task import GroupTask
from sftprep.shards.layout import hash_name, receipt_name


def count_usable(task: GroupTask, executor: Executor, on_bytes: OnBytes) -> NDArray[np.int64]:
    """Return the number of usable records of each source in a group: int64 [sources].

    Nothing is done if the counts are known. The spills of the group are written, so that its next
    round does not tokenize again.
    """
    counts = find_counts(task)
    if counts is None:
        parts = tokenize_group(task, executor, on_bytes)
        counts = UsableSequences.find(parts, task).count_records(task)
        check_marks(task)
        write_values(task.settings.work / _count_name(task), {"usable": counts.tolist()})
    return counts


def find_counts(task: GroupTask) -> NDArray[np.int64] | None:
    """Return the counts that `count_usable` wrote, in this build or an earlier one."""
    name = _count_name(task)
    values = read_values(task.settings.work / name)
    if values is None and restore_file(name, task.settings.work):
        values = read_values(task.settings.work / name)
    return None if values is None else np.array(values["usable"], np.int64)


def _count_name(task: GroupTask) -> str:
    return receipt_name(digest("usable records", receipt_key(task))[:40])


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

"""The rounds over the groups of a build, on any executor.

Most builds have one round. What depends on several groups takes a round before it: the search for
records that equal one of another group, and the shares of the sources of a mixture. The spills of a
round are reused by the next one, so that nothing is tokenized twice.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from sftprep.errors import RecordError
from sftprep.pipeline.executors.base import Executor, map_checked
from sftprep.pipeline.executors.local import InProcess
from sftprep.pipeline.groups.duplicates import find_duplicates_across
from sftprep.pipeline.groups.first_rounds import (
    count_usable,
    has_counts,
    has_hashes,
    hash_records,
    share_groups,
)
from sftprep.pipeline.groups.kept_spills import remove_spills
from sftprep.pipeline.groups.receipts import receipt_key
from sftprep.pipeline.groups.run import run_group
from sftprep.pipeline.groups.task import GroupDone, GroupTask
from sftprep.pipeline.passes.shard_pass import Progress

_Result = TypeVar("_Result")
_Run = Callable[[GroupTask, Executor, "GroupProgress"], _Result]


class GroupProgress:
    """The progress of a build over all of its groups and rounds.

    Args:
        progress: The progress callback.
        total_bytes: The expected number of bytes of all rounds.
    """

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress, self._total = progress, total_bytes
        self._read = self._shards = 0

    def add_bytes(self, number: int) -> None:
        """Add bytes of records that were read."""
        self._read += number
        # Compressed files have more bytes of records than the size of the file.
        self._progress("tokenize", self._read, max(self._total, self._read))

    def show_shards(self, stage: str, done: int, total: int) -> None:
        """Show the progress of the shards of a group."""
        self._progress(stage, self._shards + done, self._shards + total)
        if done == total:
            self._shards += total


def count_rounds(tasks: list[GroupTask]) -> int:
    """Return the number of rounds that a build takes."""
    return 1 + _finds_duplicates(tasks) + _shares_copies(tasks)


@dataclasses.dataclass(frozen=True, slots=True)
class Rounds:
    """The groups of a build after its rounds.

    Attributes:
        tasks: The groups, completed with what was decided across groups.
        done: The results of the groups that were run, by number.
        waiting_for: The numbers of the groups of other parts that must be run before the last
            round; then no group has a result.
    """

    tasks: list[GroupTask]
    done: dict[int, GroupDone]
    waiting_for: tuple[int, ...] = ()


def run_rounds(
    tasks: list[GroupTask],
    executor: Executor,
    progress: GroupProgress,
    is_own: Callable[[GroupTask], bool] = lambda task: True,
    on_done: Callable[[GroupDone], None] = lambda done: None,
) -> Rounds:
    """Run groups of a build.

    Args:
        tasks: The groups of the build, or those of `find_last_round`, whose first rounds are done.
        executor: On this machine, it runs the partitions of one group after the other; on other
            machines, whole groups.
        progress: The progress of the build.
        is_own: Whether a group belongs to this part; other parts run the others.
        on_done: Called in this process with the result of each group, as soon as it is done.

    Raises:
        SftprepError: An error of a record, a setting or the storage.
    """
    training = [task for task in tasks if not task.evaluation]
    evaluation = [task for task in tasks if task.evaluation]
    if _finds_duplicates(tasks) and training[0].duplicates is None:
        _run(_hash_records, filter(is_own, training), executor, progress)
        missing = [task.number for task in training if not has_hashes(task)]
        if missing:
            return Rounds(tasks, {}, tuple(missing))
        training = _with_duplicates(training)
    if _shares_copies(tasks) and training[0].quotas is None:
        _run(_count_usable, filter(is_own, training), executor, progress)
        missing = [task.number for task in training if not has_counts(task)]
        if missing:
            return Rounds(tasks, {}, tuple(missing))
        training = _with_quotas(training)
    tasks = training + evaluation
    own = [*filter(is_own, tasks)]
    results = _run(_complete_group, own, executor, progress, on_done)
    return Rounds(tasks, {task.number: done for task, done in zip(own, results, strict=True)})


def find_last_round(tasks: list[GroupTask]) -> list[GroupTask]:
    """Return the groups as in the last round, if the rounds before it are done.

    Otherwise, the groups are returned as they are.

    Args:
        tasks: The groups of the build.

    Raises:
        SftprepError: As for `run_rounds`.
    """
    training = [task for task in tasks if not task.evaluation]
    evaluation = [task for task in tasks if task.evaluation]
    if _finds_duplicates(tasks):
        if not all(map(has_hashes, training)):
            return tasks
        training = _with_duplicates(training)
    if _shares_copies(tasks):
        if not all(map(has_counts, training)):
            return tasks
        training = _with_quotas(training)
    return training + evaluation


def _with_duplicates(training: list[GroupTask]) -> list[GroupTask]:
    """Return the groups with the records that equal an earlier one, once all are hashed."""
    work = training[0].settings.work
    files = find_duplicates_across(work, [receipt_key(task) for task in training])
    return [
        dataclasses.replace(task, duplicates=file)
        for task, file in zip(training, files, strict=True)
    ]


def _with_quotas(training: list[GroupTask]) -> list[GroupTask]:
    """Return the groups with their quotas of the sources, once all are counted."""
    return [
        dataclasses.replace(task, quotas=of_group)
        for task, of_group in zip(training, share_groups(training), strict=True)
    ]


def separate_equal(rounds: Rounds, executor: Executor, progress: GroupProgress) -> list[GroupDone]:
    """Return the results of all groups with different keys.

    Groups with the same records have shards of the same names, in the same order. All but the first
    of them are run again with a number.

    Args:
        rounds: The rounds, with the results of all groups.
        executor: As for `run_rounds`.
        progress: As for `run_rounds`.
    """
    earlier: Counter[str] = Counter()
    repeated: list[GroupTask] = []
    for task in rounds.tasks:
        key = rounds.done[task.number].key
        if key and earlier[key]:
            repeated.append(dataclasses.replace(task, occurrence=earlier[key]))
        earlier[key] += 1
    results = _run(_run_group, repeated, executor, progress)
    again = {task.number: done for task, done in zip(repeated, results, strict=True)}
    return [again.get(task.number, rounds.done[task.number]) for task in rounds.tasks]


def _finds_duplicates(tasks: list[GroupTask]) -> bool:
    return not tasks[0].is_only and tasks[0].settings.config.read.duplicates == "drop"


def _shares_copies(tasks: list[GroupTask]) -> bool:
    weights = [entry.weight for entry in tasks[0].settings.entries]
    return not tasks[0].is_only and any(weight is not None for weight in weights)


def _hash_records(task: GroupTask, executor: Executor, progress: GroupProgress) -> None:
    hash_records(task, executor, progress.add_bytes)


def _count_usable(task: GroupTask, executor: Executor, progress: GroupProgress) -> None:
    count_usable(task, executor, progress.add_bytes)


def _run_group(task: GroupTask, executor: Executor, progress: GroupProgress) -> GroupDone:
    return run_group(task, executor, progress.add_bytes, progress.show_shards)


def _complete_group(task: GroupTask, executor: Executor, progress: GroupProgress) -> GroupDone:
    """Run a group in the last round, after which its spills are not needed."""
    done = _run_group(task, executor, progress)
    if task.settings.removes_spills:
        remove_spills(task.settings.work, done.receipt)
    return done


def _run(
    run: _Run[_Result],
    tasks: Iterable[GroupTask],
    executor: Executor,
    progress: GroupProgress,
    on_result: Callable[[_Result], None] = lambda result: None,
) -> list[_Result]:
    """Run a round over groups, and return the results in the order of the tasks."""
    tasks = list(tasks)
    results: dict[int, _Result] = {}
    if not executor.far:
        for number, task in enumerate(tasks):
            results[number] = run(task, executor, progress)
            on_result(results[number])
        return [*results.values()]
    specs = [_FarGroup(run, number, task) for number, task in enumerate(tasks)]
    failed: dict[int, RecordError] = {}
    for number, num_bytes, result in map_checked(
        executor, _run_far, (spec for spec in specs if not failed)
    ):
        # All groups before a failed one are running or done, so the first error is one of theirs.
        if isinstance(result, RecordError):
            failed[number] = result
        else:
            results[number] = result
            on_result(result)
        progress.add_bytes(num_bytes)
    if failed:
        raise failed[min(failed)]
    return [results[number] for number in range(len(tasks))]


@dataclasses.dataclass(frozen=True, slots=True)
class _FarGroup:
    """One group of a round for a worker on another machine."""

    run: _Run[Any]
    number: int
    task: GroupTask


def _run_far(spec: _FarGroup) -> tuple[int, int, Any]:
    """Run a group; return its number, the bytes of its records, and its result or error."""
    read = {"tokenize": 0}
    progress = GroupProgress(lambda stage, done, _: read.update({stage: done}), 0)
    try:
        result = spec.run(spec.task, InProcess(), progress)
    except RecordError as error:
        return spec.number, 0, error
    return spec.number, read["tokenize"], result

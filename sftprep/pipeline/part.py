"""A part of a build: some of its groups, for one job of an array on machines that share the output.

Part I of K writes the groups I, I + K, I + 2 K ... with their receipts, and commits nothing. The
build without a part finds the receipts, runs what is missing, and commits. A part that was killed
is run again; a part that is run twice finds its receipts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sftprep.config.build import BuildConfig
from sftprep.config.user_functions import function_key
from sftprep.config.validation import is_url, parse_part
from sftprep.core.atomic_write import open_file_errors
from sftprep.errors import ConfigError, setting
from sftprep.pipeline.groups.receipts import find_kept
from sftprep.pipeline.groups.rounds import (
    GroupProgress,
    count_rounds,
    find_last_round,
    run_rounds,
)
from sftprep.pipeline.groups.task import GroupTask
from sftprep.pipeline.groups.task_list import check_groups
from sftprep.pipeline.kept_work import KeptWork, OnResume, report_kept_work
from sftprep.pipeline.output.part_identity import record_identity
from sftprep.pipeline.output.shared_folder import check_joined, join_output
from sftprep.pipeline.output.up_to_date import find_finished, find_identity
from sftprep.pipeline.passes.shard_pass import Progress
from sftprep.pipeline.prepare.inputs import check_unchanged
from sftprep.pipeline.prepare.setup import Setup, prepare_setup
from sftprep.pipeline.workers import input_bytes, start_workers
from sftprep.sources.partition import Source


@dataclass(frozen=True, slots=True)
class PartReport:
    """The result of a part of a build.

    Attributes:
        folder: The output folder.
        part: The part, as `I/K`.
        groups: The number of its groups.
        groups_done: The number of groups of all parts that are done.
        groups_total: The number of groups of the build.
        waiting_for: The parts that must be run before this one can go on: something depends on
            several groups, and the array must be run once more. Empty if this part is done.
        seconds: The duration.
        bytes_read: The size of its records, decompressed.
        reused: The number of partitions that were tokenized already.
        workers: The number of processes.
        is_up_to_date: Whether the folder had the finished build already, and nothing was done.
        resumed: The groups of the part that were done at the start, if there were any.
    """

    folder: Path
    part: str
    groups: int
    groups_done: int
    groups_total: int
    waiting_for: tuple[int, ...]
    seconds: float
    bytes_read: int
    reused: int
    workers: int
    is_up_to_date: bool = False
    resumed: KeptWork | None = None


@open_file_errors()
def build_part(
    config: BuildConfig,
    *,
    data: Sequence[Source] = (),
    eval_data: Sequence[Source] = (),
    progress: Progress = lambda *_: None,
    on_resume: OnResume = lambda _: None,
) -> PartReport:
    """Write a part of the groups of a build, and their receipts.

    Args:
        config: The settings of the build, with `part`.
        data: Training data in memory, which is refused.
        eval_data: Evaluation data in memory, likewise.
        progress: The progress callback.
        on_resume: Called once if some of its groups are done, with their number.

    Raises:
        ConfigError: The build cannot be done in parts, or other parts have other settings.
        SftprepError: The part failed; the groups that it finished are kept.
    """
    started = time.monotonic()
    number, count = _parse_own_part(config)
    setup = prepare_setup(config, data, eval_data)
    check_groups(setup, config, is_far=False)
    _check_functions(setup)

    folder = Path(config.output.output)
    finished = find_finished(folder, find_identity(config, setup), config.output)
    if finished is None:
        part = _Part(number, count)
        report = _build_into(folder, config, setup, part, progress, on_resume)
    else:
        report = PartReport(
            folder=folder,
            part=f"{number}/{count}",
            groups=0,
            groups_done=len(finished.manifest.groups),
            groups_total=len(finished.manifest.groups),
            waiting_for=(),
            seconds=0.0,
            bytes_read=0,
            reused=0,
            workers=0,
            is_up_to_date=True,
        )
    return dataclasses.replace(report, seconds=time.monotonic() - started)


class _Part(NamedTuple):
    """The number of a part, from 1, and the number of all parts."""

    number: int
    total: int

    def is_own(self, task: GroupTask) -> bool:
        """Return whether a group belongs to the part."""
        return task.number % self.total == self.number - 1


def _build_into(
    folder: Path,
    config: BuildConfig,
    setup: Setup,
    part: _Part,
    progress: Progress,
    on_resume: OnResume,
) -> PartReport:
    """Run a part after its setup, and return its report without its duration."""
    with join_output(folder, overwrite=config.output.overwrite) as work:
        record_identity(work, config, setup)
        with start_workers(config, setup, work, None) as workers:
            tasks = workers.tasks
            known = find_last_round(tasks)
            own = [*filter(part.is_own, known)]
            kept = report_kept_work(own, None, on_resume) if own else None
            total = input_bytes(setup) * count_rounds(tasks) // part.total
            shown = GroupProgress(progress, total)
            rounds = run_rounds(known, workers.executor, shown, part.is_own)
        check_unchanged(setup.inputs)
        check_joined(folder)
        done = rounds.done.values()
        return PartReport(
            folder=folder,
            part=f"{part.number}/{part.total}",
            groups=len(own),
            groups_done=sum(find_kept(task) is not None for task in rounds.tasks),
            groups_total=len(tasks),
            waiting_for=tuple(sorted({missing % part.total + 1 for missing in rounds.waiting_for})),
            seconds=0.0,
            bytes_read=sum(each.bytes for each in done),
            reused=sum(each.reused for each in done),
            workers=workers.count,
            resumed=kept,
        )


def _parse_own_part(config: BuildConfig) -> tuple[int, int]:
    part = parse_part(config.output.part, setting("part", config.output.part))
    assert part is not None, "the settings have no part"
    if is_url(config.output.output):
        raise ConfigError(
            f"{setting('output')} is {config.output.output}, and the parts of a build must share a"
            " local folder",
            remedy=[
                f"use a folder that all machines reach for {setting('output')}, and copy the build",
                f"leave out {setting('part', config.output.part)}",
            ],
        )
    if config.output.executor != "local":
        raise ConfigError(
            f"{setting('part', config.output.part)} runs on this machine, and"
            f" {setting('executor', config.output.executor)} on all of a cluster",
            remedy=[
                f"leave out {setting('part')}",
                f"use {setting('executor', 'local')}",
            ],
        )
    return part


def _check_functions(setup: Setup) -> None:
    """Check that other parts can use the results of the functions of the user.

    Raises:
        ConfigError: A function has no stable digest, so its results are not shared.
    """
    for recipe in setup.recipes:
        for name, function in recipe.functions().items():
            if function_key(function, recipe.transform_id) is None:
                raise ConfigError(
                    f"{setting(name, function)} has no stable digest, so other parts cannot use"
                    " its results",
                    remedy=[
                        "use a function of a file",
                        f"name its version with {setting('transform_id')}",
                    ],
                )

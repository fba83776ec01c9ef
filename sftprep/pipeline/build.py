"""A build, from raw records to a manifest.

1. The inputs are cut into groups.
2. Each group passes through its own passes: see `groups/run.py`.
3. The evaluation records of all groups become a group of their own.
4. The commit moves the finished files into place, the manifest last.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sftprep.config.build import BuildConfig
from sftprep.core.atomic_write import open_file_errors
from sftprep.errors import WorkerError
from sftprep.pipeline.executors.base import Executor, check_sendable
from sftprep.pipeline.groups.kept_spills import limit_spills
from sftprep.pipeline.groups.ledgers import check_not_empty, check_rejected
from sftprep.pipeline.groups.receipt_cache import keep_results
from sftprep.pipeline.groups.receipts import find_shards, place_group_file
from sftprep.pipeline.groups.rounds import (
    GroupProgress,
    Rounds,
    count_rounds,
    find_last_round,
    run_rounds,
    separate_equal,
)
from sftprep.pipeline.groups.run import write_evaluation
from sftprep.pipeline.groups.task import GroupDone, GroupTask
from sftprep.pipeline.kept_work import KeptWork, OnResume, report_kept_work
from sftprep.pipeline.output.claim import (
    Destination,
    Output,
    claim_destination,
    find_destination,
)
from sftprep.pipeline.output.data_card import data_card
from sftprep.pipeline.output.part_identity import check_identity
from sftprep.pipeline.output.root_manifest import NewGroup, link_evaluation, make_manifest
from sftprep.pipeline.output.scratch import ScratchOutput
from sftprep.pipeline.output.up_to_date import find_finished, find_identity, identity_line
from sftprep.pipeline.passes.shard_pass import Progress
from sftprep.pipeline.prepare.inputs import check_unchanged
from sftprep.pipeline.prepare.setup import Setup, prepare_setup
from sftprep.pipeline.workers import Workers, connect_executor, input_bytes, start_workers
from sftprep.records.inspection.source_reading import SourceReading
from sftprep.shards.layout import EVAL_FOLDER, raw_rejected_name, rejected_path
from sftprep.shards.manifest import Manifest
from sftprep.sources.partition import Source
from sftprep.stores.folder import BuildFolder


@dataclass(frozen=True, slots=True)
class BuildReport:
    """The result of a build, and its speed.

    Attributes:
        folder: The output folder.
        manifest: The manifest of the training build.
        seconds: The duration of the build.
        bytes_read: The size of the records, decompressed.
        reused: The number of partitions whose spills existed already.
        workers: The number of processes.
        evaluation: The manifest of the evaluation build in folder/eval, if there is one.
        readings: How the records of each input were read.
        is_up_to_date: Whether the output had this build already, and nothing was done.
        resumed: The work of an earlier run that was found at the start, if there was any.
    """

    folder: BuildFolder
    manifest: Manifest = field(repr=False)
    seconds: float
    bytes_read: int
    reused: int
    workers: int
    evaluation: Manifest | None = field(default=None, repr=False)
    readings: tuple[SourceReading, ...] = field(default=(), repr=False)
    is_up_to_date: bool = False
    resumed: KeptWork | None = None


@open_file_errors()
def build(
    config: BuildConfig,
    *,
    data: Sequence[Source] = (),
    eval_data: Sequence[Source] = (),
    progress: Progress = lambda *_: None,
    on_resume: OnResume = lambda _: None,
    executor: Executor | None = None,
) -> BuildReport:
    """Tokenize, mask and pack records into shards, and write the manifest last.

    The same records and settings give the same bytes, however often the build was killed before. If
    the output has the finished build of the same command, nothing is done.

    Args:
        config: The settings of the build.
        data: Training data in memory, used instead of the inputs in the settings.
        eval_data: Evaluation data in memory, likewise.
        progress: The progress callback.
        on_resume: Called once if an earlier run has left work, with what is kept.
        executor: What runs the passes, closed by the caller; None for that of the settings.

    Raises:
        SftprepError: The build failed. The output folder has no new build; an old one is unchanged.
    """
    assert config.output.part is None, "see `build_part`"
    started = time.monotonic()
    destination = find_destination(config.output.output)  # first: it refuses unknown stores
    setup = prepare_setup(config, data, eval_data)
    identity = find_identity(config, setup)
    finished = find_finished(destination, identity, config.output)
    if finished is None:
        callbacks = _Callbacks(progress, on_resume)
        report = _build_into(destination, config, setup, identity, callbacks, executor)
    else:
        report = BuildReport(
            finished.folder,
            finished.manifest,
            seconds=0.0,
            bytes_read=0,
            reused=0,
            workers=0,
            evaluation=finished.evaluation,
            readings=tuple(setup.readings),
            is_up_to_date=True,
        )
    return dataclasses.replace(report, seconds=time.monotonic() - started)


class _Callbacks(NamedTuple):
    """The callbacks of a build."""

    progress: Progress
    on_resume: OnResume


def _build_into(
    destination: Destination,
    config: BuildConfig,
    setup: Setup,
    identity: str | None,
    callbacks: _Callbacks,
    executor: Executor | None,
) -> BuildReport:
    """Run a build after its setup, and return its report without its duration."""
    with ExitStack() as stack:
        executor = executor or stack.enter_context(connect_executor(config))
        if executor is not None and executor.far:
            check_sendable(setup.recipes)
            if isinstance(destination, Path):
                destination = destination.absolute()
        output = stack.enter_context(claim_destination(destination, config.output))
        check_identity(output.work, config, setup)
        with start_workers(config, setup, output.work, executor) as workers:
            tasks, total = workers.tasks, input_bytes(setup)
            known = find_last_round(tasks)
            kept = report_kept_work(known, total, callbacks.on_resume)
            shown = GroupProgress(callbacks.progress, total * count_rounds(tasks))
            send = _sender(output, tasks)
            rounds = run_rounds(known, workers.executor, shown, on_done=send)
            _check_complete(rounds, output.work)
            done = separate_equal(rounds, workers.executor, shown)
            held_out = _write_evaluation(config, workers, done, output, shown)
        manifest, evaluation = _make_manifests(config, setup, done, held_out, output)
        _check_groups(manifest, config)
        check_unchanged(setup.inputs)
        _keep_for_later_builds(output.work, tasks, done, keep_spill=config.output.keep_spill)
        line = None if identity is None else identity_line(identity, manifest)
        card = data_card(manifest, evaluation, identity_line=line)
        folder = output.commit(manifest, evaluation, card, keep_spill=config.output.keep_spill)
    return BuildReport(
        folder,
        dataclasses.replace(manifest, folder=folder),
        seconds=0.0,
        bytes_read=sum(each.bytes for each in done),
        reused=sum(each.reused for each in done),
        workers=workers.count,
        evaluation=evaluation and dataclasses.replace(evaluation, folder=folder / EVAL_FOLDER),
        readings=_complete_readings(setup.readings, tasks, done),
        resumed=kept,
    )


def _sender(output: Output, tasks: list[GroupTask]) -> Callable[[GroupDone], None]:
    """Return a function that sends the shards of a group to an output that is not a local folder.

    Nothing is sent before a build of one group is done, since it needs all of its room anyway.
    """
    if not isinstance(output, ScratchOutput) or tasks[0].is_only:
        return lambda done: None
    return lambda done: output.send_shards(find_shards(output.work, done))


def _keep_for_later_builds(
    work: Path, tasks: list[GroupTask], done: list[GroupDone], *, keep_spill: bool
) -> None:
    unknown = {each.receipt for task, each in zip(tasks, done, strict=True) if task.is_unique}
    keep_results(work, without=unknown)
    if keep_spill:  # otherwise the commit removes all spills
        limit_spills(work, done)


def _check_complete(rounds: Rounds, work: Path) -> None:
    """Raise WorkerError if this machine cannot read what workers on other machines have written."""
    if rounds.waiting_for:
        raise WorkerError(
            f"the results of {len(rounds.waiting_for):,} groups are not in {work}",
            remedy="all machines must reach the output folder under the same path",
        )


def _complete_readings(
    readings: list[SourceReading], tasks: list[GroupTask], done: list[GroupDone]
) -> tuple[SourceReading, ...]:
    """Return the readings with the columns that pass 1 found in the records of each input."""
    found: list[dict[str, None]] = [{} for _ in readings]
    for task, result in zip(tasks, done, strict=True):
        for each, columns in zip(task.inputs, result.unread_columns, strict=True):
            found[each.number].update(dict.fromkeys(columns))
    return tuple(
        reading.add_columns(columns) for reading, columns in zip(readings, found, strict=True)
    )


def _write_evaluation(
    config: BuildConfig,
    workers: Workers,
    done: list[GroupDone],
    output: Output,
    progress: GroupProgress,
) -> GroupDone | None:
    """Write the shards of the evaluation records, if there are any.

    All of them are one group: those of a training group alone would fill its packs badly.
    """
    found = [each.evaluation for each in done if each.evaluation is not None]
    if not found:
        return None
    settings = workers.tasks[0].settings
    pack = _evaluation_config(config).pack
    task = GroupTask(
        number=0,
        inputs=(),
        settings=dataclasses.replace(
            settings, config=dataclasses.replace(settings.config, pack=pack)
        ),
        staging=output.staging(evaluation=True),
        evaluation=True,
    )
    parents = [each.receipt for each in done if each.evaluation is not None]
    return write_evaluation(task, parents, found, workers.executor, progress.show_shards)


def _evaluation_config(config: BuildConfig) -> BuildConfig:
    packing = config.evaluation.eval_packing or config.pack.packing
    return dataclasses.replace(config, pack=dataclasses.replace(config.pack, packing=packing))


def _make_manifests(
    config: BuildConfig,
    setup: Setup,
    done: list[GroupDone],
    held_out: GroupDone | None,
    output: Output,
) -> tuple[Manifest, Manifest | None]:
    """Return the manifests of the training build and of the evaluation build, if there is one."""
    manifest = _make_manifest(config, setup, done, output, evaluation=False)
    if held_out is None:
        return manifest, None
    evaluation = _make_manifest(config, setup, [held_out], output, evaluation=True)
    return link_evaluation(manifest, evaluation), evaluation


def _make_manifest(
    config: BuildConfig,
    setup: Setup,
    done: list[GroupDone],
    output: Output,
    *,
    evaluation: bool,
) -> Manifest:
    """Put the files of groups into the staging folder, and return the manifest that names them."""
    staging = output.staging(evaluation=evaluation)
    groups = [each for each in done if each.key]
    config = _evaluation_config(config) if evaluation else config
    for each in groups:
        place_group_file(output.work, staging, each)
    files = [
        NewGroup(each.key, each.digest, output.work / raw_rejected_name(each.receipt))
        for each in groups
    ]
    final = output.work.parent / staging.relative_to(output.work)
    return make_manifest(config, setup, files, staging, final, evaluation=evaluation)


def _check_groups(manifest: Manifest, config: BuildConfig) -> None:
    """Check the records of a build of several groups, which each group alone cannot check.

    Raises:
        TooManyRejected: Too many of its records were rejected.
        EmptyInput: It has no sequence.
    """
    folder = manifest.folder
    assert isinstance(folder, Path)
    if len(manifest.groups) == 1:
        return
    rejected = [
        folder / rejected_path(entry.key, entry.rejected)
        for entry in manifest.groups
        if entry.rejected
    ]
    check_rejected(manifest.accounting, rejected, config)
    if not manifest.accounting.sequences:  # otherwise the inputs are not needed
        inputs = manifest.inputs
        check_not_empty(manifest.accounting, inputs, rejected, config.format, evaluation=False)

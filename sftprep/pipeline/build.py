"""A build, from raw records to a manifest.

1. The inputs are cut into groups.
2. Each group passes through its own passes: see `groups/run.py`.
3. The evaluation records of all groups become a group of their own.
4. The commit moves the finished files into place, the manifest last.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sftprep.config.build import BuildConfig
from sftprep.core.atomic_write import open_file_errors, write_bytes
from sftprep.pipeline.executors.base import Executor, check_sendable
from sftprep.pipeline.executors.local import available_cores, make_executor
from sftprep.pipeline.executors.ray_tasks import RayExecutor
from sftprep.pipeline.groups.evaluation import join_evaluation
from sftprep.pipeline.groups.ledgers import check_not_empty, check_rejected
from sftprep.pipeline.groups.rounds import GroupProgress, count_rounds, run_rounds
from sftprep.pipeline.groups.run import write_group
from sftprep.pipeline.groups.selection import BuildSplit
from sftprep.pipeline.groups.task import GroupDone, GroupTask
from sftprep.pipeline.groups.task_list import make_tasks
from sftprep.pipeline.output.folder import OutputFolder
from sftprep.pipeline.output.root_manifest import make_manifest
from sftprep.pipeline.output.store import OutputStore, claim_place
from sftprep.pipeline.passes.shard_pass import Progress
from sftprep.pipeline.passes.tokenize_pass import load_preprocessors
from sftprep.pipeline.prepare.inputs import check_unchanged
from sftprep.pipeline.prepare.setup import Setup, prepare_setup
from sftprep.recipe import RecipeFile, recipe_file
from sftprep.records.inspection.source_reading import SourceReading
from sftprep.shards.layout import EVAL_FOLDER, rejected_path
from sftprep.shards.manifest import Manifest
from sftprep.sources.partition import Source
from sftprep.stores.folder import BuildFolder, folder_of
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.reference_client import ReferenceServer

_BYTES_PER_WORKER = 24 << 20
"""A spawned worker with less input than this spends longer on its imports than on its work."""


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
    """

    folder: BuildFolder
    manifest: Manifest = field(repr=False)
    seconds: float
    bytes_read: int
    reused: int
    workers: int
    evaluation: Manifest | None = field(default=None, repr=False)
    readings: tuple[SourceReading, ...] = field(default=(), repr=False)


@open_file_errors()
def build(
    config: BuildConfig,
    *,
    data: Sequence[Source] = (),
    eval_data: Sequence[Source] = (),
    progress: Progress = lambda *_: None,
    executor: Executor | None = None,
) -> BuildReport:
    """Tokenize, mask and pack records into shards, and write the manifest last.

    The same records and settings give the same bytes, however often the build was killed before.

    Args:
        config: The settings of the build.
        data: Training data in memory, used instead of the inputs in the settings.
        eval_data: Evaluation data in memory, likewise.
        progress: The progress callback.
        executor: What runs the passes, closed by the caller; None for that of the settings.

    Raises:
        SftprepError: The build failed. The output folder has no new build; an old one is unchanged.
    """
    started = time.monotonic()
    folder = folder_of(config.output.output)  # first: it refuses stores that are not supported
    setup = prepare_setup(config, data, eval_data)
    with ExitStack() as stack:
        executor = _connect(config, stack) if executor is None else executor
        is_far = executor is not None and executor.far
        if is_far:
            check_sendable(setup.recipes)
            folder = folder.absolute() if isinstance(folder, Path) else folder
        output = stack.enter_context(claim_place(folder, config.output))
        workers = _count_workers(config, setup) if executor is None else executor.capacity
        with ExitStack() as pool:
            # Other machines do not reach a server of this one.
            with _start_servers(setup, 1 if is_far else workers) as servers:
                recipes = _write_recipes(setup, output.work, servers, is_far or workers > 1)
                tasks = make_tasks(setup, config, recipes, output.work, is_far=is_far)
                if executor is None:
                    executor = make_executor(workers, partial(load_preprocessors, recipes))
                    pool.callback(executor.close)
                shown = GroupProgress(progress, sum(_file_sizes(setup)) * count_rounds(tasks))
                done = run_rounds(tasks, executor, shown)
            evaluation = _write_evaluation(config, setup, tasks, done, output, executor, shown)
        groups = [(each.key, each.digest) for each in done if each.key]
        manifest = make_manifest(config, setup, groups, output.work, evaluation=False)
        _check_groups(manifest, config)
        check_unchanged(setup.inputs)
        manifest = _link_evaluation(manifest, evaluation)
        output.commit(manifest, evaluation, keep_spill=config.output.keep_spill)
    return BuildReport(
        folder,
        dataclasses.replace(manifest, folder=folder),
        seconds=time.monotonic() - started,
        bytes_read=sum(each.bytes for each in done),
        reused=sum(each.reused for each in done),
        workers=workers,
        evaluation=evaluation and dataclasses.replace(evaluation, folder=folder / EVAL_FOLDER),
        readings=_complete_readings(setup.readings, tasks, done),
    )


def _connect(config: BuildConfig, stack: ExitStack) -> Executor | None:
    """Return the executor on other machines, closed with `stack`; None for this machine."""
    if config.output.executor == "local":
        return None
    executor = RayExecutor(config.output.ray_address)
    stack.callback(executor.close)
    return executor


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


@contextmanager
def _start_servers(setup: Setup, workers: int) -> Iterator[list[ReferenceServer | None]]:
    """Start a server of the reference encoder for each recipe, where needed.

    Several workers share a server; a single worker starts its own when it needs one.
    """
    with ExitStack() as stack:
        servers: list[ReferenceServer | None] = []
        for recipe in setup.recipes:
            is_needed = workers > 1 and recipe.encoder != HfEncoder.name
            servers.append(ReferenceServer(recipe.tokenizer) if is_needed else None)
            if (server := servers[-1]) is not None:
                stack.callback(server.close)
        yield servers


def _write_recipes(
    setup: Setup, folder: Path, servers: Sequence[ReferenceServer | None], has_workers: bool
) -> list[RecipeFile]:
    """Write the recipes for the worker processes, if any; return their files for tasks."""
    files = [
        recipe_file(folder, recipe, server.address if server else None)
        for recipe, server in zip(setup.recipes, servers, strict=True)
    ]
    if has_workers:
        for file, recipe in zip(files, setup.recipes, strict=True):
            write_bytes(file.path, recipe.to_bytes())
    return files


def _write_evaluation(
    config: BuildConfig,
    setup: Setup,
    tasks: list[GroupTask],
    done: list[GroupDone],
    output: OutputFolder | OutputStore,
    executor: Executor,
    progress: GroupProgress,
) -> Manifest | None:
    """Write the evaluation build, and return its manifest; None without evaluation records.

    All evaluation records are one group: those of a training group alone would fill its packs
    badly.
    """
    found = [each.evaluation for each in done if each.evaluation is not None]
    if not found:
        return None
    packing = config.evaluation.eval_packing or config.pack.packing
    config = dataclasses.replace(config, pack=dataclasses.replace(config.pack, packing=packing))
    parts, infos, recipe_keys = join_evaluation(found)
    staging = output.staging(evaluation=True)
    settings = tasks[0].settings
    task = GroupTask(
        number=0,
        inputs=(),
        settings=dataclasses.replace(
            settings, config=dataclasses.replace(settings.config, pack=config.pack)
        ),
        staging=staging,
        evaluation=True,
    )
    split = BuildSplit(True, parts, [info.accounting for info in infos])
    group = write_group(task, split, infos, recipe_keys, executor, progress.show_shards)
    return make_manifest(config, setup, [group], staging, evaluation=True)


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
    rejected = [folder / rejected_path(entry.key) for entry in manifest.groups]
    check_rejected(manifest.accounting, rejected, config)
    check_not_empty(manifest.accounting, manifest.inputs, rejected, config.format, evaluation=False)


def _link_evaluation(manifest: Manifest, evaluation: Manifest | None) -> Manifest:
    """Return the manifest of a build with a link to that of its evaluation records."""
    if evaluation is None:
        return manifest
    # `sftprep verify` finds by this digest whether the two builds belong together.
    digest = evaluation.digest
    link = {"folder": EVAL_FOLDER, "manifest": f"manifest-{digest[:16]}.json", "digest": digest}
    return dataclasses.replace(manifest, eval=link)


def _count_workers(config: BuildConfig, setup: Setup) -> int:
    if config.output.workers is not None:
        return config.output.workers
    return min(available_cores(), max(1, sum(_file_sizes(setup)) // _BYTES_PER_WORKER))


def _file_sizes(setup: Setup) -> Iterator[int]:
    return (each.stamp[0] for each in setup.inputs if each.stamp is not None)

"""A build, from raw records to a manifest: three passes with checks between them.

1. Pass 1 makes one spill from each partition of the input.
2. The selection assigns the sequences to the training and the evaluation part.
3. For each part, pass 2 plans the packs and pass 3 writes the shards.
4. The commit moves the finished files into place, the manifest last.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sftprep.config.build import BuildConfig
from sftprep.core.atomic_write import open_file_errors, write_bytes
from sftprep.core.hashing import digest
from sftprep.packing.strategies import SMALL, pack_lengths
from sftprep.pipeline.executors.base import Executor, check_sendable, map_checked
from sftprep.pipeline.executors.local import InProcess, available_cores, make_executor
from sftprep.pipeline.executors.ray_tasks import RayExecutor
from sftprep.pipeline.inputs import check_unchanged
from sftprep.pipeline.ledgers import (
    check_not_empty,
    check_rejected,
    first_record_error,
    make_input_infos,
    sum_ledgers,
)
from sftprep.pipeline.output.folder import OutputFolder, claim_output
from sftprep.pipeline.output.manifest import describe_rendering, manifest_facts, manifest_settings
from sftprep.pipeline.plan_pass import lane_block
from sftprep.pipeline.selection import BuildSplit, request_stats, select_sequences
from sftprep.pipeline.sequence_stats import describe_lengths
from sftprep.pipeline.setup import Setup, prepare_setup
from sftprep.pipeline.shard_pass import Progress, WrittenPacks, write_packs
from sftprep.pipeline.tokenize_pass import (
    PartitionResult,
    TokenizeTask,
    load_preprocessors,
    tokenize_partition,
    tokenize_pipelined,
)
from sftprep.recipe import RecipeFile, describe_functions, recipe_file
from sftprep.records.inspection.source_reading import SourceReading
from sftprep.shards.layout import EVAL_FOLDER, REJECTED_NAME
from sftprep.shards.manifest import InputInfo, Manifest
from sftprep.shards.manifest_size import check_manifest_size
from sftprep.sources.partition import Source, cut
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.reference_client import ReferenceServer
from sftprep.version import __version__

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

    folder: Path
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
    setup = prepare_setup(config, data, eval_data)
    folder = Path(config.output.output)
    with ExitStack() as stack:
        executor = _connect(config, stack) if executor is None else executor
        is_far = executor is not None and executor.far
        if is_far:
            check_sendable(setup.recipes)
            folder = folder.absolute()
        output = stack.enter_context(claim_output(folder, overwrite=config.output.overwrite))
        workers = _count_workers(config, setup) if executor is None else executor.capacity
        with ExitStack() as pool:
            # Other machines do not reach a server of this one.
            with _start_servers(setup, 1 if is_far else workers) as servers:
                recipes = _write_recipes(setup, output.work, servers, is_far or workers > 1)
                if executor is None:
                    executor = make_executor(workers, partial(load_preprocessors, recipes))
                    pool.callback(executor.close)
                parts = _tokenize(setup, config, output.work, recipes, executor, progress)
            splits = select_sequences(parts, setup, config)
            rejected_file = output.work / REJECTED_NAME
            check_rejected(parts, splits[-1].duplicates, setup, config, rejected_file)
            manifests = [
                _write_split(split, setup, config, output, executor, progress) for split in splits
            ]
        check_unchanged(setup.inputs)
        manifest, evaluation = _link_builds(manifests)
        output.commit(manifest, evaluation, keep_spill=config.output.keep_spill)
    return BuildReport(
        folder,
        manifest,
        seconds=time.monotonic() - started,
        bytes_read=sum(part.bytes for part in parts),
        reused=sum(part.reused for part in parts),
        workers=workers,
        evaluation=evaluation,
        readings=_complete_readings(setup.readings, parts),
    )


def _connect(config: BuildConfig, stack: ExitStack) -> Executor | None:
    """Return the executor on other machines, closed with `stack`; None for this machine."""
    if config.output.executor == "local":
        return None
    executor = RayExecutor(config.output.ray_address)
    stack.callback(executor.close)
    return executor


def _complete_readings(
    readings: list[SourceReading], parts: list[PartitionResult]
) -> tuple[SourceReading, ...]:
    """Return the readings with the columns that pass 1 found in the records of each input."""
    found: dict[int, dict[str, None]] = {}
    for part in parts:
        found.setdefault(part.partition.input, {}).update(dict.fromkeys(part.unread_columns))
    return tuple(
        reading.add_columns(found.get(number, ())) for number, reading in enumerate(readings)
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


def _link_builds(manifests: list[Manifest]) -> tuple[Manifest, Manifest | None]:
    """Link the manifest of the build to that of its evaluation records.

    Returns:
        The manifest of the build, and that of the evaluation records, if any.
    """
    *evaluation, manifest = manifests
    if not evaluation:
        return manifest, None
    # `sftprep verify` finds by this digest whether the two builds belong together.
    digest = evaluation[0].digest
    link = {"folder": EVAL_FOLDER, "manifest": f"manifest-{digest[:16]}.json", "digest": digest}
    return dataclasses.replace(manifest, eval=link), evaluation[0]


# --- pass 1 ---------------------------------------------------------------------------------------


def _tokenize(
    setup: Setup,
    config: BuildConfig,
    spills: Path,
    recipes: Sequence[RecipeFile],
    executor: Executor,
    progress: Progress,
) -> list[PartitionResult]:
    """Make the spills of all partitions; return results in the order of the input."""
    stop_at_rejected = config.output.on_bad_record == "error"
    failed_at: list[int] = []  # the indices of partitions with a rejected record
    keys = [recipe.cache_key for recipe in setup.recipes]
    is_single = isinstance(executor, InProcess)
    sources = [each.source for each in setup.inputs]
    block = lane_block(config, sources)
    stats = request_stats(config, setup)

    def tasks() -> Iterator[TokenizeTask]:
        for partition in cut(sources):
            if failed_at:
                return
            number = setup.recipe_of[partition.input]
            if executor.far:
                path = os.path.abspath(partition.file)
                partition = dataclasses.replace(partition, file=path)  # noqa: PLW2901
            yield TokenizeTask(
                partition=partition,
                format=setup.formats[partition.input],
                recipe=recipes[number],
                recipe_key=keys[number],
                limit=setup.limit,
                spill_folder=spills,
                threads=is_single,
                lane_block=block,
                stats=stats,
            )

    if is_single:
        results = tokenize_pipelined(tasks())
    else:
        results = map_checked(executor, tokenize_partition, tasks())
    parts: list[PartitionResult] = []
    sequences = 0
    total_bytes, done_bytes = sum(_file_sizes(setup)), 0
    for part in results:
        parts.append(part)
        if stop_at_rejected and part.rejected:
            # All partitions before this one are running or done. The first rejected record of the
            # input is in one of them or in this one, so the loop goes on until they have ended.
            failed_at.append(part.partition.index)
        if sequences <= SMALL < sequences + len(part.lengths):
            threading.Thread(target=_load_compiled_planner, daemon=True).start()
        sequences += len(part.lengths)
        done_bytes += part.bytes
        # Compressed files have more bytes of records than the size of the file.
        progress("tokenize", done_bytes, max(total_bytes, done_bytes))
    parts.sort(key=lambda part: part.partition.index)
    if failed_at:
        raise first_record_error(parts, setup.names, config)
    return parts


# --- passes 2 and 3, and the manifest -------------------------------------------------------------


def _write_split(
    split: BuildSplit,
    setup: Setup,
    config: BuildConfig,
    output: OutputFolder,
    executor: Executor,
    progress: Progress,
) -> Manifest:
    """Write the shards of a split, and return its manifest for the commit."""
    check_not_empty(split, sum_ledgers(split.ledgers), setup.names, config.format)
    if split.evaluation:
        packing = config.evaluation.eval_packing or config.pack.packing
        config = dataclasses.replace(config, pack=dataclasses.replace(config.pack, packing=packing))
    shards = output.staging(evaluation=split.evaluation)
    settings = manifest_settings(config, [setup.names[number] for number in split.inputs])
    infos = make_input_infos(split, setup)
    check_shards = partial(
        check_manifest_size,
        {"config": settings, **manifest_facts(setup.recipe, setup.encoder)},
        [(info, [info.path]) for info in infos],
    )
    packs = write_packs(
        split,
        config,
        setup.limit.max_length,
        shards,
        output.work,
        executor,
        progress,
        check_shards,
    )
    return _make_manifest(config, setup, split, packs, settings, infos)


def _make_manifest(
    config: BuildConfig,
    setup: Setup,
    split: BuildSplit,
    packs: WrittenPacks,
    settings: dict[str, Any],
    infos: tuple[InputInfo, ...],
) -> Manifest:
    recipe, plan = setup.recipe, packs.plan
    facts = manifest_facts(recipe, setup.encoder)
    settings = {**settings, "max_length": setup.limit.max_length, "date": recipe.date}
    ledger = sum_ledgers(split.ledgers)
    plan_digest = xxhash.xxh3_128_hexdigest(
        np.concatenate((plan.members, plan.offsets, packs.order)).astype("<i8").tobytes()
    )
    return Manifest(
        config=settings,
        config_digest=digest(
            [each.digest for each in setup.recipes],
            setup.limit.max_length,
            dataclasses.asdict(config.pack),
            config.output.position_ids,
            config.output.shard_tokens,
        ),
        tokenizer={**facts["tokenizer"], "max_id": packs.max_id},
        chat_template=facts["chat_template"],
        encoder=facts["encoder"],
        template=describe_rendering(recipe, [part.counts for part in split.parts]),
        inputs=infos,
        accounting=ledger,
        lengths=describe_lengths((part.whole_lengths for part in split.parts), setup.limit),
        plan={
            "strategy": config.pack.packing,
            "packs": plan.num_bins,
            "fill": round(plan.fill, 6),
            "seed": config.pack.seed,
            "digest": plan_digest,
            "cuts": 0 if plan.starts is None else len(plan.starts) - ledger.sequences,
        },
        max_length=setup.limit.max_length,
        rows=plan.num_bins,
        tokens=ledger.tokens,
        # Not the number in the ledger: if the plan cuts sequences, the first token after each
        # cut is not a target any more.
        trained_tokens=sum(shard.trained_tokens for shard in packs.shards),
        shards=packs.shards,
        sftprep_version=__version__,
        functions=describe_functions(setup.recipes),
    )


def _count_workers(config: BuildConfig, setup: Setup) -> int:
    if config.output.workers is not None:
        return config.output.workers
    return min(available_cores(), max(1, sum(_file_sizes(setup)) // _BYTES_PER_WORKER))


def _file_sizes(setup: Setup) -> Iterator[int]:
    return (each.stamp[0] for each in setup.inputs if each.stamp is not None)


def _load_compiled_planner() -> None:
    # The compiled planner for large plans takes half a second to load. It is loaded while
    # partitions are tokenized.
    pack_lengths(np.ones(SMALL + 1, dtype=np.int32), 2)

"""A build, from raw records to a manifest: the three passes in order, and what is checked between
them."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sftprep.config.build import BuildConfig
from sftprep.core.atomic_write import write_bytes
from sftprep.core.hashing import digest
from sftprep.errors import InputChanged, InputUnreadable
from sftprep.packing.strategies import SMALL, pack_lengths
from sftprep.pipeline.accounting import (
    check_not_empty,
    check_rejected,
    first_bad_record,
    input_infos,
    total,
)
from sftprep.pipeline.executors import Executor, available_cores, make_executor
from sftprep.pipeline.inputs import stamp
from sftprep.pipeline.output_dir import OutputFolder, claim_output
from sftprep.pipeline.plan_pass import lane_block
from sftprep.pipeline.selection import BuildSplit, choose, wanted_facts
from sftprep.pipeline.setup import Setup, manifest_facts, manifest_settings, prepare_setup
from sftprep.pipeline.shard_pass import Assembled, Progress, assemble
from sftprep.pipeline.tokenize_pass import (
    PartitionResult,
    TokenizeTask,
    load_preprocessors,
    tokenize_in_turn,
    tokenize_partition,
)
from sftprep.recipe import RecipeFile, recipe_file
from sftprep.shards.layout import EVAL_FOLDER, REJECTED_NAME
from sftprep.shards.manifest import InputInfo, Manifest
from sftprep.shards.manifest_size import check_manifest_size
from sftprep.sources.partition import Source, cut
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.equivalence.reference_client import ReferenceServer
from sftprep.version import __version__

_BECAUSE = "masks.because."
_WORTH_A_WORKER = 24 << 20
"""Bytes of input: with less, a spawned worker spends longer on its imports than on its work."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build made, and how fast. bytes_read: of records, unpacked; reused: partitions found
    done already.

    evaluation: the manifest of the evaluation build in folder/eval, where there is one.
    """

    folder: Path
    manifest: Manifest = field(repr=False)
    seconds: float
    bytes_read: int
    reused: int
    workers: int
    evaluation: Manifest | None = field(default=None, repr=False)


def build(
    config: BuildConfig,
    *,
    data: Sequence[Source] = (),
    eval_data: Sequence[Source] = (),
    progress: Progress = lambda *_: None,
) -> BuildReport:
    """Prepare records for training: tokenize, pack, write shards, and the manifest last.

    data, eval_data: sources in memory, used instead of those that the config names (`sftprep.build`
    makes them). The same records and settings give the same bytes, whatever the number of workers
    and however often it was killed before. Raises the errors of `sftprep.errors`; the output folder
    then holds no new build, and an old one as it was.
    """
    started = time.monotonic()
    setup = prepare_setup(config, data, eval_data)
    folder = Path(config.output.output)
    with claim_output(folder, overwrite=config.output.overwrite) as output:
        workers = _workers(config, setup)
        # Many workers ask one child what the reference gives; one by itself has its own.
        beside = [
            ReferenceServer(r.tokenizer) if workers > 1 and r.encoder != HfEncoder.name else None
            for r in setup.recipes
        ]
        recipes = [
            recipe_file(output.work, recipe, own.address if own else None)
            for recipe, own in zip(setup.recipes, beside, strict=True)
        ]
        if workers > 1:
            for file, recipe in zip(recipes, setup.recipes, strict=True):
                write_bytes(file.path, recipe.to_bytes())
        executor = make_executor(workers, partial(load_preprocessors, recipes))
        try:
            try:
                parts = _tokenize(setup, config, output.work, recipes, executor, progress)
            finally:
                for own in beside:
                    if own is not None:
                        own.close()
            sides = choose(parts, setup, config)
            check_rejected(parts, sides, setup, config, output.work / REJECTED_NAME)
            manifests = [_side(side, setup, config, output, executor, progress) for side in sides]
        finally:
            executor.close()
        _check_unchanged(setup)
        evaluation = manifests[0] if len(manifests) > 1 else None
        if evaluation is not None:
            manifests[-1] = dataclasses.replace(
                manifests[-1], eval={"folder": EVAL_FOLDER, "digest": evaluation.digest}
            )
        manifest = manifests[-1]
        output.commit(manifest, evaluation, keep_spill=config.output.keep_spill)
    reused = sum(part.reused for part in parts)
    seconds = time.monotonic() - started
    return BuildReport(
        folder, manifest, seconds, sum(p.bytes for p in parts), reused, workers, evaluation
    )


# --- pass 1 ---------------------------------------------------------------------------------------


def _tokenize(
    setup: Setup,
    config: BuildConfig,
    spills: Path,
    recipes: Sequence[RecipeFile],
    executor: Executor,
    progress: Progress,
) -> list[PartitionResult]:
    """The spills of all partitions, in the order of the input."""
    stop = config.output.on_bad_record == "error"
    failed_at: list[int] = []
    digests = [recipe.digest for recipe in setup.recipes]
    alone = executor.capacity == 1
    block = lane_block(config, [each.source for each in setup.inputs])
    facts = wanted_facts(config, setup)

    def tasks() -> Iterator[TokenizeTask]:
        for partition in cut([each.source for each in setup.inputs]):
            if failed_at:
                return
            number = setup.recipe_of[partition.input]
            yield TokenizeTask(
                partition=partition,
                format=setup.formats[partition.input],
                recipe=recipes[number],
                recipe_digest=digests[number],
                spill_folder=spills,
                threads=alone,
                lane_block=block,
                facts=facts,
            )

    parts: list[PartitionResult] = []
    sequences = 0
    size, done = sum(_sizes(setup)), 0
    for part in (
        tokenize_in_turn(tasks()) if alone else executor.map_unordered(tokenize_partition, tasks())
    ):
        parts.append(part)
        if stop and part.rejected:
            # Partitions before this one are running or done; the first bad record of the input is
            # in one of them or here.
            failed_at.append(part.partition.index)
        if sequences <= SMALL < sequences + len(part.lengths):
            threading.Thread(target=_warm_packing, daemon=True).start()
        sequences += len(part.lengths)
        done += part.bytes
        progress("tokenize", done, max(size, done))
    parts.sort(key=lambda part: part.partition.index)
    if failed_at:
        raise first_bad_record(parts, setup.names)
    return parts


# --- pass 2 and 3, and the commit -----------------------------------------------------------------


def _side(
    side: BuildSplit,
    setup: Setup,
    config: BuildConfig,
    output: OutputFolder,
    executor: Executor,
    progress: Progress,
) -> Manifest:
    """The shards of one side, written, and its manifest, which is not."""
    check_not_empty(side, total(side.accounts))
    if side.evaluation:
        packing = config.evaluation.eval_packing or config.pack.packing
        config = dataclasses.replace(config, pack=dataclasses.replace(config.pack, packing=packing))
    shards = output.staging(evaluation=side.evaluation)
    max_length = setup.recipe.max_length
    settings = manifest_settings(config, [setup.names[number] for number in side.inputs])
    infos = input_infos(side, setup)
    check_shards = partial(
        check_manifest_size,
        {"config": settings, **manifest_facts(setup.recipe, setup.encoder)},
        [(info, [info.path]) for info in infos],
    )
    made = assemble(side, config, max_length, shards, output.work, executor, progress, check_shards)
    return _manifest(config, setup, side, made, settings, infos)


def _manifest(
    config: BuildConfig,
    setup: Setup,
    side: BuildSplit,
    made: Assembled,
    settings: dict[str, Any],
    infos: tuple[InputInfo, ...],
) -> Manifest:
    recipe, plan = setup.recipe, made.plan
    facts = manifest_facts(recipe, setup.encoder)
    settings = {**settings, "max_length": recipe.max_length, "date": recipe.date}
    accounting = total(side.accounts)
    plan_digest = xxhash.xxh3_128_hexdigest(
        np.concatenate((plan.members, plan.offsets, made.order)).astype("<i8").tobytes()
    )
    return Manifest(
        config=settings,
        config_digest=digest(
            [each.digest for each in setup.recipes],
            dataclasses.asdict(config.pack),
            config.output.position_ids,
            config.output.shard_tokens,
        ),
        tokenizer={**facts["tokenizer"], "max_id": made.max_id},
        chat_template=facts["chat_template"],
        encoder=facts["encoder"],
        template=_template(recipe.chat_template, side),
        inputs=infos,
        accounting=accounting,
        plan={
            "strategy": config.pack.packing,
            "packs": plan.num_bins,
            "fill": round(plan.fill, 6),
            "seed": config.pack.seed,
            "digest": plan_digest,
            "cuts": 0 if plan.starts is None else len(plan.starts) - accounting.sequences,
        },
        max_length=recipe.max_length,
        rows=plan.num_bins,
        tokens=accounting.tokens,
        # Not that of the accounts where the plan cuts sequences: what follows a cut trains one
        # token less.
        trained_tokens=sum(shard.trained_tokens for shard in made.shards),
        shards=made.shards,
        sftprep_version=__version__,
    )


def _template(source: str | None, side: BuildSplit) -> dict[str, Any]:
    """Which template rendered the conversations, and how many took which path: compiled pieces or
    Jinja, and masks by token ids or by the characters of the tokens, with the reasons."""
    if source is None:
        return {}
    renders = {
        way: sum(part.counts.get(f"template.{way}", 0) for part in side.parts)
        for way in ("pieces", "jinja")
    }
    ways = [way for way, number in renders.items() if number]
    masks: Counter[str] = Counter()
    for part in side.parts:
        masks.update({k: n for k, n in part.counts.items() if k.startswith("masks.")})
    because = {k.removeprefix(_BECAUSE): n for k, n in masks.items() if k.startswith(_BECAUSE)}
    return {
        "digest": digest(source),
        "way": "mixed" if len(ways) > 1 else "".join(ways) or "none",
        "renders": renders,
        "masks": {
            "by_ids": masks["masks.by_ids"],
            "by_characters": masks["masks.by_characters"],
            "because": dict(sorted(because.items())),
        },
    }


def _check_unchanged(setup: Setup) -> None:
    for each in setup.inputs:
        if each.stamp is None:
            continue
        try:
            is_unchanged = stamp(each.source.file) == each.stamp
        except InputUnreadable as error:
            raise InputChanged(
                f"{each.source.name} was removed or replaced while the build ran",
                remedy="put the file back, or leave it out, and run the build again",
            ) from error
        if not is_unchanged:
            raise InputChanged(
                f"{each.source.name} changed while it was read",
                remedy="run the build again when nothing writes to the file",
            )


def _workers(config: BuildConfig, setup: Setup) -> int:
    if config.output.workers is not None:
        return config.output.workers
    return min(available_cores(), max(1, sum(_sizes(setup)) // _WORTH_A_WORKER))


def _sizes(setup: Setup) -> Iterator[int]:
    return (each.stamp[0] for each in setup.inputs if each.stamp is not None)


def _warm_packing() -> None:
    # The compiled planner, which large plans use, takes half a second to load; that passes while
    # partitions are tokenized.
    pack_lengths(np.ones(SMALL + 1, dtype=np.int32), 2)

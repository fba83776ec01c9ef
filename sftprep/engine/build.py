"""A build, from raw records to a manifest: the three passes in order, and what is checked between them."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

import sftprep
from sftprep.config import BuildConfig, digest
from sftprep.engine.executors import Executor, available_cores, make_executor
from sftprep.engine.output import REJECTED_NAME, SPILL_FOLDER, claimed, clean
from sftprep.engine.passes import AssembleTask, Tokenized, TokenizeTask, assemble_shard, tokenize_partition
from sftprep.engine.recipe import Recipe
from sftprep.engine.setup import Setup, prepare_setup, stamp
from sftprep.engine.spill import spill_path
from sftprep.errors import EmptyInput, InputChanged, RecordError, TooManyRejected
from sftprep.packing.strategies import SMALL, PackPlan, pack_lengths
from sftprep.shards.files import write_file
from sftprep.shards.manifest import MANIFEST_NAME, SHARD_FOLDER, Accounting, InputInfo, Manifest, ShardInfo
from sftprep.sources.partition import cut

Progress = Callable[[str, int, int], None]
"""Called with the name of a pass, what is done and what there is to do, in bytes or shards."""

# Below this a spawned worker spends longer on its imports than on its work.
_SMALL_INPUT = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build made, and how fast. bytes_read: of records, unpacked; reused: partitions found done already."""

    folder: Path
    manifest: Manifest
    seconds: float
    bytes_read: int
    reused: int
    workers: int


def build(config: BuildConfig, *, progress: Progress = lambda *_: None) -> BuildReport:
    """Prepare records for training: tokenize, pack, write shards, and the manifest last.

    The same records and settings give the same bytes, whatever the number of workers and however often it was killed
    before. Raises the errors of `sftprep.errors`; the output folder then holds no new build, and an old one as it was.
    """
    started = time.monotonic()
    setup = prepare_setup(config)
    folder = Path(config.output.output)
    with claimed(folder, overwrite=config.output.overwrite):
        recipe_file = folder / SPILL_FOLDER / "recipe.json"
        write_file(recipe_file, lambda file: _write(file, setup.recipe.to_json()))
        workers = _workers(config, setup)
        executor = make_executor(workers)
        try:
            parts = _tokenize(setup, config, folder, recipe_file, executor, progress)
            accounting, inputs = _account(parts, setup)
            _check_rejected(parts, accounting, config, folder, inputs)
            plan = pack_lengths(np.concatenate([p.lengths for p in parts]), setup.recipe.max_length, config.pack.packing)
            order = _shuffled(plan.num_bins, config.pack.seed)
            shards = _assemble(parts, inputs, plan, order, config, setup.recipe, folder, executor, progress)
        finally:
            executor.close()
        _check_unchanged(setup)
        manifest = _manifest(config, setup, inputs, accounting, plan, order, shards)
        write_file(folder / MANIFEST_NAME, lambda file: _write(file, manifest.to_json()))
        clean(folder, manifest, keep_spill=config.output.keep_spill)
    reused = sum(part.reused for part in parts)
    return BuildReport(folder, manifest, time.monotonic() - started, sum(p.bytes for p in parts), reused, workers)


# --- pass 1 ------------------------------------------------------------------------------------------------------------


def _tokenize(
    setup: Setup, config: BuildConfig, folder: Path, recipe_file: Path, executor: Executor, progress: Progress
) -> list[Tokenized]:
    """The spills of all partitions, in the order of the input."""
    stop = config.output.on_bad_record == "error"
    failed_at: list[int] = []
    recipe_digest = setup.recipe.digest
    threads = executor.capacity == 1

    def tasks() -> Iterator[TokenizeTask]:
        for partition in cut(setup.files):
            if failed_at:
                return
            yield TokenizeTask(
                partition, setup.formats[partition.input], recipe_file, recipe_digest, folder / SPILL_FOLDER, threads
            )

    parts: list[Tokenized] = []
    sequences = 0
    total, done = sum(os.path.getsize(file) for file in setup.files), 0
    for part in executor.map_unordered(tokenize_partition, tasks()):
        parts.append(part)
        if stop and part.rejected:
            # Partitions before this one are running or done; the first bad record of the input is in one of them or here.
            failed_at.append(part.partition.index)
        if sequences <= SMALL < sequences + len(part.lengths):
            threading.Thread(target=_warm_packing, daemon=True).start()
        sequences += len(part.lengths)
        done += part.bytes
        progress("tokenize", done, max(total, done))
    parts.sort(key=lambda part: part.partition.index)
    if failed_at:
        raise _first_bad_record(parts)
    return parts


def _first_bad_record(parts: list[Tokenized]) -> RecordError:
    bad = next(part for part in parts if part.rejected)
    first = bad.rejected[0]
    before = sum(
        p.counts["lines"] for p in parts if p.partition.input == bad.partition.input and p.partition.index < bad.partition.index
    )
    return RecordError(
        file=bad.partition.file,
        line=before + first.line + 1,
        column=first.column,
        reason=first.reason,
        message=first.message,
        excerpt=first.excerpt,
    )


def _account(parts: list[Tokenized], setup: Setup) -> tuple[Accounting, tuple[InputInfo, ...]]:
    """Where every row and token went, and what each input held."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
        counts.update(f"rejected.{r.reason}" for r in part.rejected)

    def group(name: str) -> dict[str, int]:
        return {key.partition(".")[2]: n for key, n in sorted(counts.items()) if key.startswith(f"{name}.")}

    plain = ("lines", "blank", "records", "sequences", "truncated", "tokens_in", "tokens", "tokens_truncated", "trained_tokens")
    accounting = Accounting(
        **{name: counts[name] for name in plain},
        rejected=group("rejected"),
        dropped=group("dropped"),
        tokens_dropped=group("tokens_dropped"),
        warnings=group("warnings"),
    )
    wrong = accounting.check()
    assert not wrong, f"the accounts of this build do not balance, which is a defect of sftprep: {'; '.join(wrong)}"
    inputs, ordinal = [], 0
    for number, file in enumerate(setup.files):
        own = [part for part in parts if part.partition.input == number]
        lines = sum(part.counts["lines"] for part in own)
        content = xxhash.xxh3_128_hexdigest("".join(part.content for part in own).encode())
        size, records = sum(part.bytes for part in own), sum(part.counts["records"] for part in own)
        inputs.append(InputInfo(file, size, content, setup.formats[number], ordinal, lines, records))
        ordinal += lines
    return accounting, tuple(inputs)


def _check_rejected(
    parts: list[Tokenized], accounting: Accounting, config: BuildConfig, folder: Path, inputs: tuple[InputInfo, ...]
) -> None:
    """Write what was set aside; raise TooManyRejected above the limit, EmptyInput where nothing is left."""
    path = folder / REJECTED_NAME
    total = sum(accounting.rejected.values())
    if total:
        write_file(path, lambda file: file.writelines(_rejected_lines(parts)))
    else:
        path.unlink(missing_ok=True)
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(accounting.rejected.items(), key=lambda item: -item[1]))
    if total > config.output.rejected_limit(accounting.records):
        raise TooManyRejected(
            f"{total:,} of {accounting.records:,} records were rejected ({reasons}), "
            f"more than --max-rejected {config.output.max_rejected}",
            remedy=f"look at {path}; mend the records, or raise --max-rejected",
        )
    if not accounting.sequences:
        dropped = ", ".join(f"{reason} {n:,}" for reason, n in accounting.dropped.items())
        what = f"rejected: {reasons}" if reasons else f"dropped: {dropped}" if dropped else "there is no record at all"
        raise EmptyInput(
            f"no usable record in {len(inputs)} input file{'s' * (len(inputs) != 1)} ({what})",
            remedy="check --format, --train-on and --max-length, and that the files are those you meant",
        )


def _rejected_lines(parts: list[Tokenized]) -> Iterator[bytes]:
    line, current = 0, -1
    for part in parts:
        if part.partition.input != current:
            line, current = 0, part.partition.input
        for r in part.rejected:
            where = {"file": part.partition.file, "line": line + r.line + 1, "column": r.column}
            yield orjson.dumps({**where, "reason": r.reason, "message": r.message, "excerpt": r.excerpt}) + b"\n"
        line += part.counts["lines"]


# --- pass 2 and 3 ------------------------------------------------------------------------------------------------------


def _shuffled(packs: int, seed: int) -> NDArray[np.int64]:
    """A permutation of the packs that depends on the seed only, in every version of NumPy: int64 [packs].

    Packs are sorted by a hash of their number (SplitMix64, Steele et al. 2014), since best-fit order follows length.
    """
    with np.errstate(over="ignore"):
        z = np.arange(1, packs + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def _assemble(
    parts: list[Tokenized],
    inputs: tuple[InputInfo, ...],
    plan: PackPlan,
    order: NDArray[np.int64],
    config: BuildConfig,
    recipe: Recipe,
    folder: Path,
    executor: Executor,
    progress: Progress,
) -> list[tuple[ShardInfo, int]]:
    """The shards of a plan, in order, each with the highest token id in it."""
    lengths = np.concatenate([part.lengths for part in parts])
    part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.lengths) for part in parts])
    row = np.concatenate([np.arange(len(part.lengths), dtype=np.int32) for part in parts])
    first_ordinal = _first_ordinals(parts, inputs)
    sizes = np.diff(plan.offsets)[order]
    members = plan.members[np.arange(int(sizes.sum())) + np.repeat(plan.offsets[:-1][order] - (np.cumsum(sizes) - sizes), sizes)]
    pack_ends = np.cumsum(sizes)
    token_ends = np.cumsum(lengths[members], dtype=np.int64)[pack_ends - 1]
    edges = _shard_edges(token_ends, config.output.shard_tokens)

    def tasks() -> Iterator[AssembleTask]:
        for index, (first, last) in enumerate(pairwise(edges)):
            begin, end = int(pack_ends[first - 1]) if first else 0, int(pack_ends[last - 1])
            own = members[begin:end]
            used, spill = np.unique(part_of[own], return_inverse=True)
            yield AssembleTask(
                index=index,
                shard_folder=folder / SHARD_FOLDER,
                spills=tuple(spill_path(folder / SPILL_FOLDER, parts[p].key) for p in used.tolist()),
                spill=spill.astype(np.int32),
                row=row[own],
                seq_lengths=lengths[own],
                first_ordinal=first_ordinal[used],
                pack_offsets=np.concatenate(([0], pack_ends[first:last] - begin)),
                max_length=recipe.max_length,
                position_ids=config.output.position_ids,
            )

    shards: dict[int, tuple[ShardInfo, int]] = {}
    for shard in executor.map_unordered(assemble_shard, tasks()):
        shards[shard.index] = (shard.info, shard.max_id)
        progress("write", len(shards), len(edges) - 1)
    return [shards[index] for index in range(len(shards))]


def _first_ordinals(parts: list[Tokenized], inputs: tuple[InputInfo, ...]) -> NDArray[np.int64]:
    """Ordinal of the first line of each partition: int64 [partitions]."""
    lines = np.array([part.counts["lines"] for part in parts], dtype=np.int64)
    assert int(lines.sum()) == sum(info.lines for info in inputs)
    return np.cumsum(lines) - lines


def _shard_edges(token_ends: NDArray[np.int64], shard_tokens: int) -> list[int]:
    """First pack of each shard, and the number of packs at the end: a shard ends with the pack that fills it."""
    edges, done = [0], 0
    while edges[-1] < len(token_ends):
        last = int(np.searchsorted(token_ends, done + shard_tokens)) + 1
        edges.append(min(last, len(token_ends)))
        done = int(token_ends[edges[-1] - 1])
    return edges


# --- the commit --------------------------------------------------------------------------------------------------------


def _manifest(
    config: BuildConfig,
    setup: Setup,
    inputs: tuple[InputInfo, ...],
    accounting: Accounting,
    plan: PackPlan,
    order: NDArray[np.int64],
    shards: list[tuple[ShardInfo, int]],
) -> Manifest:
    recipe, spec = setup.recipe, setup.recipe.tokenizer
    # What does not change a byte of the shards stays out: the same build elsewhere has the same manifest.
    elsewhere = ("output", "workers", "overwrite", "keep_spill", "on_bad_record", "max_rejected")
    settings: dict[str, Any] = {name: value for name, value in config.flat().items() if name not in elsewhere}
    settings.update(max_length=recipe.max_length, date=recipe.date, map=list(config.format.map))
    settings["inputs"] = list(config.source.inputs)
    plan_digest = xxhash.xxh3_128_hexdigest(np.concatenate((plan.members, plan.offsets, order)).astype("<i8").tobytes())
    return Manifest(
        config=settings,
        config_digest=digest(
            recipe.digest, config.pack.packing, config.pack.seed, config.output.position_ids, config.output.shard_tokens
        ),
        tokenizer={
            "name": spec.name,
            "fingerprint": spec.fingerprint,
            "vocab_size": spec.vocab_size,
            "max_id": max(max_id for _, max_id in shards),
            "eos_token_id": spec.eos_token_id,
            "pad_token_id": spec.pad_token_id,
        },
        chat_template=recipe.chat_template,
        encoder=setup.encoder,
        template={"digest": digest(recipe.chat_template)} if recipe.chat_template else {},
        inputs=inputs,
        accounting=accounting,
        plan={
            "strategy": config.pack.packing,
            "packs": plan.num_bins,
            "fill": round(plan.fill, 6),
            "seed": config.pack.seed,
            "digest": plan_digest,
        },
        max_length=recipe.max_length,
        rows=plan.num_bins,
        tokens=accounting.tokens,
        trained_tokens=accounting.trained_tokens,
        shards=tuple(info for info, _ in shards),
        sftprep_version=sftprep.__version__,
    )


def _check_unchanged(setup: Setup) -> None:
    for file, before in zip(setup.files, setup.stamps, strict=True):
        if stamp(file) != before:
            raise InputChanged(f"{file} changed while it was read", remedy="run the build again when nothing writes to the file")


def _workers(config: BuildConfig, setup: Setup) -> int:
    if config.output.workers is not None:
        return config.output.workers
    size = sum(os.path.getsize(file) for file in setup.files)
    return 1 if size < _SMALL_INPUT else available_cores()


def _warm_packing() -> None:
    # The compiled planner, which large plans use, takes half a second to load; that passes while partitions are tokenized.
    pack_lengths(np.ones(SMALL + 1, dtype=np.int32), 2)


def _write(file: Any, data: bytes) -> None:
    file.write(data)

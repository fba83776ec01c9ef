"""The passes over one group: its records become shards and the file of the group."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xxhash

from sftprep.core.atomic_write import create_folder
from sftprep.core.hashing import digest
from sftprep.packing.strategies import SMALL, pack_lengths
from sftprep.pipeline.executors.base import Executor, map_checked
from sftprep.pipeline.executors.local import InProcess
from sftprep.pipeline.groups.evaluation import join_evaluation
from sftprep.pipeline.groups.evaluation_files import copy_held_out
from sftprep.pipeline.groups.ledgers import (
    check_not_empty,
    check_rejected,
    first_record_error,
    make_input_infos,
    sum_ledgers,
    write_rejected,
)
from sftprep.pipeline.groups.receipt_files import Receipt
from sftprep.pipeline.groups.receipts import (
    find_digest,
    find_done,
    finish_group,
    receipt_key,
)
from sftprep.pipeline.groups.selection import (
    BuildSplit,
    select_sequences,
)
from sftprep.pipeline.groups.task import EvaluationPart, GroupDone, GroupTask
from sftprep.pipeline.passes.sequence_stats import describe_lengths, sum_exact_counts
from sftprep.pipeline.passes.shard_pass import (
    Progress,
    ShardPlace,
    WrittenShards,
    stored_columns,
    write_packs,
    write_whole_sequences,
)
from sftprep.pipeline.passes.tokenize_pass import (
    PartitionResult,
    TokenizeTask,
    tokenize_partition,
    tokenize_pipelined,
)
from sftprep.pipeline.prepare.manifest_fields import count_rendering
from sftprep.shards.group import Group, InputInfo
from sftprep.shards.layout import GROUP_FOLDER, SHARD_FOLDER, raw_rejected_name
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import FORMAT_VERSION
from sftprep.shards.manifest_size import check_group_size
from sftprep.shards.pack_index import write_index_content
from sftprep.shards.reading.group_plan import order_seed
from sftprep.sources.partition import cut
from sftprep.version import __version__

OnBytes = Callable[[int], None]
"""A callback with the number of bytes of records that were read since the last call."""


def run_group(
    task: GroupTask, executor: Executor, on_bytes: OnBytes, progress: Progress
) -> GroupDone:
    """Tokenize the records of a group, plan its packs, and write its shards and its receipt.

    Nothing is done if it has a valid receipt.

    Args:
        task: The group.
        executor: The executor for its partitions and shards.
        on_bytes: Called after each partition.
        progress: The progress callback, for the shards.

    Raises:
        SftprepError: An error of a record, a setting or the storage.
    """
    receipt = receipt_key(task)
    if (done := find_done(task, receipt)) is not None:
        on_bytes(done.bytes)
        return done
    parts = tokenize_group(task, executor, on_bytes)
    splits = select_sequences(parts, task)
    evaluation = None
    if splits[0].evaluation:
        evaluation = _evaluation_part(splits.pop(0), task)
    written = WrittenGroup("", "")
    if splits:
        recipe_keys = tuple(each.recipe_key for each in task.inputs)
        infos = make_input_infos(splits[0], task)
        written = write_group(task, splits[0], infos, recipe_keys, receipt, executor, progress)
    return finish_group(
        task,
        Receipt(
            key=receipt,
            group=written.content,
            rejected=written.rejected,
            bytes=sum(part.bytes for part in parts),
            spills=tuple(part.key for part in parts),
            unread_columns=_unread_columns(parts, task),
            evaluation=evaluation,
        ),
        reused=sum(part.reused for part in parts),
    )


def write_evaluation(
    task: GroupTask,
    parents: Sequence[str],
    found: Sequence[EvaluationPart],
    executor: Executor,
    progress: Progress,
) -> GroupDone:
    """Write the evaluation records of all groups as one group, unless it has a valid receipt.

    Args:
        task: The group, without inputs.
        parents: The receipts of the groups with evaluation records.
        found: The evaluation records of these groups.
        executor: The executor for the shards.
        progress: The progress callback.

    Raises:
        SftprepError: As for `write_group`.
    """
    receipt = receipt_key(task, parents)
    if (done := find_done(task, receipt)) is not None:
        return done
    parts, infos, recipe_keys = join_evaluation(found)
    split = BuildSplit(True, parts, [info.accounting for info in infos])
    written = write_group(task, split, infos, recipe_keys, receipt, executor, progress)
    return finish_group(
        task,
        Receipt(key=receipt, group=written.content, rejected=written.rejected),
        reused=0,
    )


# --- pass 1 ---------------------------------------------------------------------------------------


def tokenize_group(task: GroupTask, executor: Executor, on_bytes: OnBytes) -> list[PartitionResult]:
    """Make the spills of the partitions of a group; return results in the order of the input.

    Raises:
        RecordError: A record is rejected, and the settings say to stop at it.
    """
    settings = task.settings
    stop_at_rejected = settings.config.output.on_bad_record == "error"
    failed_at: list[int] = []  # the indices of partitions with a rejected record
    is_single = isinstance(executor, InProcess)

    def tasks() -> Iterator[TokenizeTask]:
        sources = [each.source for each in task.inputs]
        for partition in cut(sources, settings.slice_bytes):
            if failed_at:
                return
            each = task.inputs[partition.input]
            yield TokenizeTask(
                partition=partition,
                format=each.format,
                recipe=each.recipe,
                recipe_key=each.recipe_key,
                limit=settings.limit,
                spill_folder=settings.work,
                # On another machine, the task of the group has one core.
                threads=is_single and not settings.is_far,
                lane_block=settings.lane_block,
                stats=None if task.evaluation else settings.stats,
            )

    if is_single:
        results = tokenize_pipelined(tasks())
    else:
        results = map_checked(executor, tokenize_partition, tasks())
    parts: list[PartitionResult] = []
    sequences = 0
    for part in results:
        parts.append(part)
        if stop_at_rejected and part.rejected:
            # All partitions before this one are running or done. The first rejected record of the
            # input is in one of them or in this one, so the loop goes on until they have ended.
            failed_at.append(part.partition.index)
        if sequences <= SMALL < sequences + len(part.lengths):
            threading.Thread(target=_load_compiled_planner, daemon=True).start()
        sequences += len(part.lengths)
        on_bytes(part.bytes)
    parts.sort(key=lambda part: part.partition.index)
    if failed_at:
        raise first_record_error(parts, task)
    return parts


def _load_compiled_planner() -> None:
    # The compiled planner for large plans takes half a second to load. It is loaded while
    # partitions are tokenized.
    pack_lengths(np.ones(SMALL + 1, dtype=np.int32), 2)


def _unread_columns(parts: list[PartitionResult], task: GroupTask) -> tuple[tuple[str, ...], ...]:
    found: list[dict[str, None]] = [{} for _ in task.inputs]
    for part in parts:
        found[part.partition.input].update(dict.fromkeys(part.unread_columns))
    return tuple(map(tuple, found))


def _evaluation_part(split: BuildSplit, task: GroupTask) -> EvaluationPart:
    """Return the evaluation records of a group, without those of the training part."""
    parts = split.parts
    if split.take is not None and parts:
        is_taken = np.zeros(sum(len(part.lengths) for part in parts), np.bool_)
        is_taken[split.take] = True
        ends = np.cumsum([len(part.lengths) for part in parts])[:-1]
        parts = [
            part.take_sequences(kept)
            for part, kept in zip(parts, np.split(is_taken, ends), strict=True)
        ]
        parts = copy_held_out(parts, task.settings.work)
    infos = make_input_infos(split, task)
    return EvaluationPart(infos, tuple(parts), tuple(each.recipe_key for each in task.inputs))


# --- passes 2 and 3, and the file of the group ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class WrittenGroup:
    """A group with its shards written.

    Attributes:
        content: The content of the file of the group.
        rejected: The SHA-256 of its rejected records, in hex; "" without any.
    """

    content: str
    rejected: str


def write_group(
    task: GroupTask,
    split: BuildSplit,
    infos: tuple[InputInfo, ...],
    recipe_keys: tuple[str, ...],
    receipt: str,
    executor: Executor,
    progress: Progress,
) -> WrittenGroup:
    """Plan the packs of a group, and write its shards and its rejected records.

    Args:
        task: The group.
        split: Its sequences.
        infos: The entries of its inputs.
        recipe_keys: The key of the recipe of each input.
        receipt: The key of its receipt.
        executor: The executor for the shards.
        progress: The progress callback.

    Raises:
        TooManyRejected: It has all records of the build, and too many of them were rejected.
        EmptyInput: It has all records of the build, and no sequence.
        ConfigError: Its file would be larger than the largest one that can be read.
        StorageError: A file cannot be written.
    """
    config, limit = task.settings.config, task.settings.limit
    ledger = sum_ledgers(info.accounting for info in infos)
    records = _digest_records(task, split, recipe_keys)
    key = digest(_digest_config(task), records)[:16]
    rejected = task.settings.work / raw_rejected_name(receipt)
    write_rejected(split.parts, split.duplicates, [info.path for info in infos], rejected)
    if task.is_only:
        if rejected.exists():  # a ledger of held-out records also has the rejected ones of others
            check_rejected(ledger, [rejected], config)
        check_not_empty(ledger, infos, [rejected], config.format, evaluation=split.evaluation)
    lengths = _count_lengths(task, split, infos)
    place = ShardPlace(
        folder=task.staging / SHARD_FOLDER / key,
        spills=task.settings.work,
        check_size=partial(check_group_size, infos, lengths),
    )
    source = _digest_source(task, split, recipe_keys)
    if config.output.layout == "sequences":
        shards = write_whole_sequences(split, config, place, executor, progress)
    else:
        seed = order_seed(config.pack.seed, source)
        shards = write_packs(split, config, limit.max_length, place, executor, progress, seed=seed)
    create_folder(task.staging / GROUP_FOLDER)
    index_digest = write_index_content(task.staging, key, shards.index)
    group = _describe_group(task, split, infos, ledger, shards, key, lengths)
    group = dataclasses.replace(group, index_digest=index_digest, records=source)
    return WrittenGroup(group.to_json().decode(), find_digest(rejected))


def _describe_group(
    task: GroupTask,
    split: BuildSplit,
    infos: tuple[InputInfo, ...],
    ledger: Ledger,
    shards: WrittenShards,
    key: str,
    lengths: dict[str, Any],
) -> Group:
    limit = task.settings.limit
    return Group(
        key=key,
        config_digest=_digest_config(task),
        max_length=limit.max_length,
        inputs=infos,
        accounting=ledger,
        **lengths,
        plan=_describe_plan(shards, ledger.sequences),
        template=count_rendering(part.counts for part in split.parts),
        max_id=shards.max_id,
        shards=tuple(
            dataclasses.replace(shard, name=f"{key}/{shard.name}") for shard in shards.shards
        ),
        sftprep_version=__version__,
        format_version=FORMAT_VERSION,
        columns=stored_columns(split, task.settings.config, limit.max_length),
    )


def _count_lengths(
    task: GroupTask, split: BuildSplit, infos: tuple[InputInfo, ...]
) -> dict[str, Any]:
    """Return the fields `lengths` and `source_lengths` of a group."""
    parts_of: dict[str, list[PartitionResult]] = {}
    for part in split.parts:
        parts_of.setdefault(infos[part.partition.input].source, []).append(part)
    return {
        "lengths": describe_lengths(
            (part.whole_lengths for part in split.parts),
            _sum_exact_counts(split.parts),
            task.settings.limit,
        ),
        "source_lengths": {name: _sum_exact_counts(parts) for name, parts in parts_of.items()},
    }


def _sum_exact_counts(parts: Sequence[PartitionResult]) -> dict[str, list[int]]:
    return sum_exact_counts(
        (part.exact_lengths for part in parts), (part.trained_positions for part in parts)
    )


def _digest_config(task: GroupTask) -> str:
    config = task.settings.config
    if config.output.layout == "sequences":
        return digest("sequences", config.output.shard_tokens)
    return digest(
        task.settings.limit.max_length,
        dataclasses.asdict(config.pack),
        config.output.position_ids,
        config.output.shard_tokens,
    )


def _digest_records(task: GroupTask, split: BuildSplit, recipe_keys: tuple[str, ...]) -> str:
    """Return the digest of everything that determines the sequences of a group."""
    contents: list[list[str]] = [[] for _ in recipe_keys]
    for part in split.parts:
        contents[part.partition.input].append(f"{part.content}{part.selection}")
    take = None
    if split.take is not None:
        take = xxhash.xxh3_128_hexdigest(split.take.astype("<i8").tobytes())
    return digest(recipe_keys, contents, take, task.occurrence)


def _digest_source(task: GroupTask, split: BuildSplit, recipe_keys: tuple[str, ...]) -> str:
    """Return the digest of the records of a group, whatever is selected and cut."""
    contents: list[list[str]] = [[] for _ in recipe_keys]
    for part in split.parts:
        contents[part.partition.input].append(part.content)
    return digest(recipe_keys, contents, task.occurrence)


def _describe_plan(shards: WrittenShards, sequences: int) -> dict[str, Any]:
    plan, order = shards.plan, shards.order
    if plan is None or order is None:
        return {"cuts": 0}
    return {
        "packs": plan.num_bins,
        "fill": round(plan.fill, 6),
        "digest": xxhash.xxh3_128_hexdigest(
            np.concatenate((plan.members, plan.offsets, order)).astype("<i8").tobytes()
        ),
        "cuts": 0 if plan.starts is None else len(plan.starts) - sequences,
    }

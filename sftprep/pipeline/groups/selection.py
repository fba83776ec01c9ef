"""Selection of the sequences of a group: copies, and held-out records.

1. Find the records that equal an earlier one (`duplicates`), and leave them out.
2. Hold out records for evaluation, by a hash of the record (`eval_fraction`).
3. Count the copies of each of the other records in the build: its `repeat`, and its share if the
   sources of a mixture have weights.

Everything is decided from the records alone: by their position in their source, or by a hash of
their content. So it does not depend on the number of workers, and the held-out records do not even
depend on the order of the inputs. Only the shares of the sources of a mixture, and records that
equal one of another group, are decided for the whole build: see `groups/`. The cost is a few sorts
of arrays with one element per sequence; no token is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sftprep.config.build import BuildConfig, SourceEntry
from sftprep.core.types import Rejected
from sftprep.errors import EmptyInput, setting
from sftprep.pipeline.groups.duplicates import read_duplicates
from sftprep.pipeline.groups.task import GroupTask
from sftprep.pipeline.mixture.quotas import Quota, share_copies, share_sizes
from sftprep.pipeline.mixture.sized_records import SizedRecords
from sftprep.pipeline.mixture.usable_records import UsableRecords
from sftprep.pipeline.passes.sequence_stats import StatsRequest
from sftprep.records.transform import merge_rare_reasons
from sftprep.shards.ledger import Ledger

if TYPE_CHECKING:
    from sftprep.pipeline.passes.tokenize_pass import PartitionResult


@dataclass(frozen=True, slots=True)
class BuildSplit:
    """The training part or the evaluation part of a group.

    Attributes:
        evaluation: Whether it is the evaluation part.
        parts: The partitions that contain its sequences.
        ledgers: The ledger of each input of the group.
        take: int64 [sequences of the split]; the index of each of them among the sequences of
            `parts`. None takes every sequence once.
        duplicates: The records that are left out because they equal an earlier one, by the index of
            their partition.
    """

    evaluation: bool
    parts: list[PartitionResult]
    ledgers: list[Ledger]
    take: NDArray[np.int64] | None = None
    duplicates: dict[int, list[Rejected]] = field(default_factory=dict)


def request_stats(config: BuildConfig, entries: Sequence[SourceEntry]) -> StatsRequest | None:
    """Return the statistics for the selection; None if it takes all sequences."""
    holdout_seed = config.evaluation.eval_seed if config.evaluation.eval_fraction else None
    compare = config.read.duplicates == "drop"
    is_sampled = any(entry.repeat != 1 or entry.weight is not None for entry in entries)
    if not is_sampled and not compare and holdout_seed is None:
        return None
    return StatsRequest(holdout_seed, compare, config.read.duplicates_by)


def select_sequences(parts: list[PartitionResult], task: GroupTask) -> list[BuildSplit]:
    """Assign the sequences of a group to the parts of the build.

    Args:
        parts: The partitions of the group, in order.
        task: The group.

    Returns:
        The evaluation part, if there is one; then the training part, unless all records are for
        evaluation.

    Raises:
        EmptyInput: A source with a weight has no usable record, or the held-out records are none or
            all of those of the build.
    """
    config = task.settings.config
    if task.evaluation or task.settings.stats is None:
        return [BuildSplit(task.evaluation, parts, _count_inputs(parts, task, {}))]
    usable = UsableSequences.find(parts, task)
    table, duplicates, held_out = usable.table, usable.duplicates, usable.held_out
    splits = []
    if config.evaluation.eval_fraction:
        if task.is_only:
            _check_held_out(table, held_out, config)
        left_out = {**duplicates, "in_training": ~held_out & ~_union(duplicates, held_out)}
        ledgers = _count_selected(table, task, left_out, np.zeros_like(held_out), held_out)
        splits.append(BuildSplit(True, parts, ledgers, np.flatnonzero(held_out)))
    split = _take_copies(usable, task, task.quotas or _decide_quotas(usable, task))
    return [*splits, replace(split, duplicates=_duplicate_records(table, duplicates))]


@dataclass(frozen=True, slots=True)
class UsableSequences:
    """The sequences of a group, and those of them that training may use.

    Attributes:
        table: All sequences.
        duplicates: By reason, bool [n]: the sequences of records that equal an earlier one.
        held_out: bool [n]; the sequences that are held out for evaluation.
    """

    table: SequenceTable
    duplicates: dict[str, NDArray[np.bool_]]
    held_out: NDArray[np.bool_]

    @classmethod
    def find(cls, parts: list[PartitionResult], task: GroupTask) -> UsableSequences:
        """Find the usable sequences of a group.

        Args:
            parts: The partitions of the group, in order.
            task: The group, whose settings request statistics.
        """
        config = task.settings.config
        table = SequenceTable.from_parts(parts, task)
        duplicates = {}
        if task.duplicates is not None:
            duplicates = read_duplicates(task.duplicates, table.record)
        elif config.read.duplicates == "drop":
            duplicates = _find_duplicates(table)
        held_out = np.zeros(len(table.input), dtype=np.bool_)
        if config.evaluation.eval_fraction:
            threshold = np.uint64(int(config.evaluation.eval_fraction * 2**64))
            held_out = ~_union(duplicates, held_out) & (table.holdout_hashes < threshold)
        return cls(table, duplicates, held_out)

    @property
    def excluded(self) -> NDArray[np.bool_]:
        """The sequences that training does not use: bool [n]."""
        return self.held_out | _union(self.duplicates, self.held_out)

    def records(self) -> UsableRecords:
        """Return the records of the sequences."""
        return UsableRecords.of_sequences(self.table.record, self.table.entry, self.excluded)

    def count_records(self, task: GroupTask) -> NDArray[np.int64]:
        """Return the number of usable records of each source: int64 [sources]."""
        return self.records().count(len(task.settings.entries))

    def measure_records(self, task: GroupTask) -> SizedRecords:
        """Return the usable records of each source with what the weights count of them."""
        config, table = task.settings.config, self.table
        sizes = table.targets if config.read.mix_by == "trained_tokens" else table.lengths
        return self.records().measure(sizes, len(task.settings.entries), config.pack.seed)


@dataclass(frozen=True, slots=True)
class SequenceTable:
    """All sequences of a group, in the order of the input.

    Each array has one element per sequence.
    """

    parts: list[PartitionResult]  # their partitions
    input: NDArray[np.int64]  # the number of its input
    entry: NDArray[np.int64]  # the index of its source
    record: NDArray[np.int64]  # the number of its record, counted over all inputs, with gaps
    line_of: NDArray[np.int64]  # the line of its record within its partition
    part: NDArray[np.int64]  # the index of its partition in `parts`
    lengths: NDArray[np.int64]  # its tokens
    targets: NDArray[np.int64]  # its targets
    holdout_hashes: NDArray[np.uint64]  # the hash that decides whether it is held out, or empty
    exact_hashes: NDArray[np.uint64]  # the hash of its record, or empty
    near_hashes: NDArray[np.uint64]  # the hash of its record without whitespace, or empty

    @classmethod
    def from_parts(cls, parts: list[PartitionResult], task: GroupTask) -> SequenceTable:
        """Return the table of a group, from its partitions in order."""
        stats = [part.stats for part in parts if part.stats is not None]
        sizes = [len(part.lengths) for part in parts]
        records = np.array([_count_numbers(part.counts) for part in parts], dtype=np.int64)
        first_record = np.repeat(np.cumsum(records) - records, sizes)
        input_of_part = np.array([part.partition.input for part in parts], dtype=np.int64)
        inputs = np.repeat(input_of_part, sizes)
        return cls(
            parts=parts,
            input=inputs,
            entry=np.array([each.entry for each in task.inputs], dtype=np.int64)[inputs],
            record=first_record + _concatenate([s.record for s in stats], np.int64),
            line_of=_concatenate([s.line_of for s in stats], np.int64),
            part=np.repeat(np.arange(len(parts)), sizes),
            lengths=_concatenate([part.lengths for part in parts], np.int64),
            targets=_concatenate([s.targets for s in stats], np.int64),
            holdout_hashes=_concatenate([s.holdout_hashes for s in stats], np.uint64),
            exact_hashes=_concatenate([s.exact_hashes for s in stats], np.uint64),
            near_hashes=_concatenate([s.near_hashes for s in stats], np.uint64),
        )


def _count_numbers(counts: dict[str, int]) -> int:
    """Return how many numbers the records of a partition need.

    See `SequenceStats.record`.
    """
    num_extra = [counts.get(f"extra.{name}", 0) for name in ("transform", "texts")]
    return counts["lines"] + sum(num_extra)


def _concatenate(arrays: Sequence[NDArray[Any] | None], kind: type) -> NDArray[Any]:
    """Return the arrays that are not None as one array."""
    found: list[NDArray[Any]] = [array.astype(kind) for array in arrays if array is not None]
    return np.concatenate(found) if found else np.zeros(0, dtype=kind)


def _union(groups: dict[str, NDArray[np.bool_]], like: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the union of boolean arrays with the shape of `like`."""
    union = np.zeros_like(like)
    for group in groups.values():
        union |= group
    return union


# --- 1. duplicates --------------------------------------------------------------------------------


def _find_duplicates(table: SequenceTable) -> dict[str, NDArray[np.bool_]]:
    """Return the sequences of records that equal an earlier one, by reason: bool [n]."""
    exact = _has_earlier_equal(table.record, table.exact_hashes)
    near = _has_earlier_equal(table.record, table.near_hashes)
    return {"duplicate": exact, "near_duplicate": near & ~exact}


def _has_earlier_equal(record: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Find the sequences with an earlier record of the same hash: bool [n].

    Example:
        record = [0, 0, 1, 2], hashes = [7, 7, 8, 7]  ->  [False, False, False, True]
    """
    known, group = np.unique(hashes, return_inverse=True)
    first_record = np.full(len(known), np.iinfo(np.int64).max)
    np.minimum.at(first_record, group, record)
    is_later: NDArray[np.bool_] = record != first_record[group]
    return is_later


def _duplicate_records(
    table: SequenceTable, duplicates: dict[str, NDArray[np.bool_]]
) -> dict[int, list[Rejected]]:
    """Return the duplicates for the file of rejected records, by index of their partition."""
    found: dict[int, list[Rejected]] = {}
    for reason, is_duplicate in duplicates.items():
        message = "an earlier record is equal"
        if reason == "near_duplicate":
            message += " apart from whitespace"
        # The first sequence of each of these records.
        sequences = np.flatnonzero(is_duplicate)
        _, first = np.unique(table.record[sequences], return_index=True)
        for sequence in sequences[first].tolist():
            part = table.parts[int(table.part[sequence])]
            found.setdefault(part.partition.index, []).append(
                Rejected(int(table.line_of[sequence]), 0, reason, message, "")
            )
    return found


# --- 2. held-out records --------------------------------------------------------------------------


def _check_held_out(table: SequenceTable, held_out: NDArray[np.bool_], config: BuildConfig) -> None:
    # Without any sequence, the error about the whole input says more.
    if not len(held_out) or held_out.any() != held_out.all():
        return
    amount = "no record" if not held_out.any() else "every record"
    fraction = setting("eval_fraction", config.evaluation.eval_fraction)
    raise EmptyInput(
        f"{fraction} holds out {amount} of {len(np.unique(table.record)):,}",
        remedy=[
            "use another fraction",
            f"use another {setting('eval_seed')}",
            f"name evaluation records with {setting('eval_input')}",
        ],
    )


# --- 3. copies of the other records ---------------------------------------------------------------


def _decide_quotas(usable: UsableSequences, task: GroupTask) -> Sequence[Quota]:
    """Return the quota of each source, from the records of the group alone."""
    if task.settings.config.read.mix_by == "records":
        return share_copies(task.settings.entries, usable.count_records(task)[None])[0]
    records = usable.measure_records(task)
    return share_sizes(task.settings.entries, [lambda: records])[0]


def _take_copies(usable: UsableSequences, task: GroupTask, quotas: Sequence[Quota]) -> BuildSplit:
    table, excluded = usable.table, usable.excluded
    copies = usable.records().count_copies(quotas, task.settings.config.pack.seed)
    # All sequences once, then those with a second copy, and so on: this keeps the copies of a
    # record apart.
    rounds = [np.flatnonzero(copies > done) for done in range(int(copies.max(initial=0)))]
    left_out = {
        **usable.duplicates,
        "held_out": usable.held_out,
        "not_sampled": (copies == 0) & ~excluded,
    }
    extra = np.maximum(copies - 1, 0)
    ledgers = _count_selected(table, task, left_out, extra, copies)
    return BuildSplit(False, table.parts, ledgers, _concatenate(rounds, np.int64))


# --- ledgers --------------------------------------------------------------------------------------


def _count_selected(
    table: SequenceTable,
    task: GroupTask,
    left_out: dict[str, NDArray[np.bool_]],
    extra: NDArray[Any],
    copies: NDArray[Any],
) -> list[Ledger]:
    """Return the ledger of each input after the selection.

    Args:
        table: The sequences.
        task: The group.
        left_out: By reason, bool [n]; sequences that are not in the split.
        extra: [n]; the copies of each sequence beyond the first one.
        copies: [n]; the copies of each sequence.
    """
    changes: dict[int, Counter[str]] = {number: Counter() for number in range(len(task.inputs))}

    def add(name: str, values: NDArray[Any]) -> None:
        sums = np.bincount(table.input, weights=values, minlength=len(changes))
        for number, total in enumerate(sums.tolist()):
            changes[number][name] += round(total)

    for reason, is_left_out in left_out.items():
        add(f"left_out.{reason}", is_left_out)
        add(f"tokens_left_out.{reason}", is_left_out * table.lengths)
        add(f"trained_left_out.{reason}", is_left_out * table.targets)
    add("extra.repeated", extra)
    add("tokens_extra.repeated", extra * table.lengths)
    add("trained_extra.repeated", extra * table.targets)
    # Pass 1 has counted each sequence once.
    difference = copies - np.ones(len(copies), dtype=np.int64)
    add("sequences", difference)
    add("tokens", difference * table.lengths)
    add("trained_tokens", difference * table.targets)
    return _count_inputs(table.parts, task, changes)


def _count_inputs(
    parts: list[PartitionResult], task: GroupTask, changes: dict[int, Counter[str]]
) -> list[Ledger]:
    """Return the ledger of each input of a group, including the changes.

    It is the sum of the counts of its partitions and the changes.
    """
    counts_of: dict[int, Counter[str]] = {n: Counter() for n in range(len(task.inputs))}
    for part in parts:
        counts = counts_of[part.partition.input]
        counts.update(part.counts)
        counts.update(f"rejected.{record.reason}" for record in part.rejected)
    for number, counts in counts_of.items():
        counts.update(changes.get(number, {}))
        merge_rare_reasons(counts)
    # A reason that applies to nothing is omitted.
    return [
        Ledger.from_counts(
            {name: number for name, number in counts.items() if number or "." not in name}
        )
        for counts in counts_of.values()
    ]

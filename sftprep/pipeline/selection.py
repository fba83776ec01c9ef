"""Which sequences stand in the build, and how often; which are held out for evaluation; and the
accounts of both.

Everything is decided from the records alone: their place in their source, or a hash of their line.
So it does not depend on how many workers there are, and holding out does not even depend on the
order of the inputs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sftprep.config.build import BuildConfig, SourceEntry
from sftprep.core.hashing import hash64_array
from sftprep.core.types import Rejected
from sftprep.errors import EmptyInput
from sftprep.pipeline.sequence_stats import StatsRequest
from sftprep.pipeline.setup import Setup
from sftprep.shards.manifest import Accounting

if TYPE_CHECKING:
    from sftprep.pipeline.tokenize_pass import PartitionResult


@dataclass(frozen=True, slots=True)
class BuildSplit:
    """The build itself, or that of the evaluation. inputs: numbers of its inputs in the setup;
    accounts: one for each.

    take: int64 [sequences of this side], each one's number among the sequences of `parts`; None for
    all, once; aside: records left out because they stand there already, by the number of their
    partition.
    """

    evaluation: bool
    parts: list[PartitionResult]
    inputs: list[int]
    accounts: list[Accounting]
    take: NDArray[np.int64] | None = None
    aside: dict[int, list[Rejected]] = field(default_factory=dict)


def wanted_facts(config: BuildConfig, setup: Setup) -> StatsRequest | None:
    """What workers have to say of each sequence beside its length; None where nothing is to be
    chosen."""
    key_seed = config.evaluation.eval_seed if config.evaluation.eval_fraction else None
    compare = config.read.duplicates == "drop"
    mixed_up = any(each.repeat != 1 or each.weight is not None for each in setup.entries)
    return StatsRequest(key_seed, compare) if mixed_up or compare or key_seed is not None else None


def choose(parts: list[PartitionResult], setup: Setup, config: BuildConfig) -> list[BuildSplit]:
    """The builds to make of all sequences: that of the evaluation first, where there is one.

    Raises EmptyInput where a source that has a weight holds nothing, or no record was held out.
    """
    training = [number for number, each in enumerate(setup.inputs) if not each.evaluation]
    others = [number for number, each in enumerate(setup.inputs) if each.evaluation]
    sides = [_whole(True, parts, others)] if others else []
    if wanted_facts(config, setup) is None:
        return [*sides, _whole(False, parts, training)]
    table = _Table.of([part for part in parts if part.partition.input < len(training)], setup)
    again = _repeated(table) if config.read.duplicates == "drop" else {}
    held = np.zeros(len(table.input), dtype=np.bool_)
    if config.evaluation.eval_fraction:
        held = ~_any(again, held) & (
            table.keys < np.uint64(int(config.evaluation.eval_fraction * 2**64))
        )
        sides.append(_held_out(table, held, again, training, config))
    trained = _sampled(table, held, again, training, setup.entries, config.pack.seed)
    return [*sides, replace(trained, aside=_aside(table, again))]


def _whole(evaluation: bool, parts: list[PartitionResult], inputs: list[int]) -> BuildSplit:
    numbers = set(inputs)
    own = [part for part in parts if part.partition.input in numbers]
    return BuildSplit(evaluation, own, inputs, _accounts(own, inputs, {}))


@dataclass(frozen=True, slots=True)
class _Table:
    """All sequences to train on, side by side. record: number of each one's record, over all
    inputs; entry: of its source."""

    parts: list[PartitionResult]
    input: NDArray[np.int64]
    entry: NDArray[np.int64]
    record: NDArray[np.int64]
    lengths: NDArray[np.int64]
    targets: NDArray[np.int64]
    keys: NDArray[np.uint64]
    same: NDArray[np.uint64]
    alike: NDArray[np.uint64]

    @classmethod
    def of(cls, parts: list[PartitionResult], setup: Setup) -> _Table:
        facts = [part.facts for part in parts if part.facts is not None]
        sizes = [len(part.lengths) for part in parts]
        lines = np.array([part.counts["lines"] for part in parts], dtype=np.int64)
        inputs = np.repeat(
            np.array([part.partition.input for part in parts], dtype=np.int64), sizes
        )
        return cls(
            parts=parts,
            input=inputs,
            entry=np.array([each.entry for each in setup.inputs], dtype=np.int64)[inputs],
            record=np.repeat(np.cumsum(lines) - lines, sizes)
            + _joined([f.origin for f in facts], np.int64),
            lengths=_joined([part.lengths for part in parts], np.int64),
            targets=_joined([f.targets for f in facts], np.int64),
            keys=_joined([f.keys for f in facts if f.keys is not None], np.uint64),
            same=_joined([f.same for f in facts if f.same is not None], np.uint64),
            alike=_joined([f.alike for f in facts if f.alike is not None], np.uint64),
        )


def _joined(arrays: list[NDArray[Any]], kind: type) -> NDArray[Any]:
    return (
        np.concatenate([array.astype(kind) for array in arrays])
        if arrays
        else np.zeros(0, dtype=kind)
    )


def _repeated(table: _Table) -> dict[str, NDArray[np.bool_]]:
    """By reason, the sequences of records that an earlier record equals: bool [n]."""
    exact, near = (_later(table.record, hashes) for hashes in (table.same, table.alike))
    return {"duplicate": exact, "near_duplicate": near & ~exact}


def _later(record: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which sequences are of a record after the first one with the same hash: bool [n]."""
    known, which = np.unique(hashes, return_inverse=True)
    first = np.full(len(known), np.iinfo(np.int64).max)
    np.minimum.at(first, which, record)
    later: NDArray[np.bool_] = record != first[which]
    return later


def _aside(table: _Table, again: dict[str, NDArray[np.bool_]]) -> dict[int, list[Rejected]]:
    """The records that earlier ones equal, by the number of their partition."""
    found: dict[int, list[Rejected]] = {}
    starts = np.cumsum([0] + [part.counts["lines"] for part in table.parts])
    for reason, which in again.items():
        what = "an earlier record is the same" + (
            " but for blanks" if reason == "near_duplicate" else ""
        )
        for record in np.unique(table.record[which]).tolist():
            part = int(np.searchsorted(starts, record, side="right")) - 1
            line = record - int(starts[part])
            found.setdefault(table.parts[part].partition.index, []).append(
                Rejected(line, 0, reason, what, "")
            )
    return found


def _held_out(
    table: _Table,
    held: NDArray[np.bool_],
    again: dict[str, NDArray[np.bool_]],
    inputs: list[int],
    config: BuildConfig,
) -> BuildSplit:
    take = np.flatnonzero(held)
    if not len(take) or held.all():
        what = "no record" if not len(take) else "every record"
        raise EmptyInput(
            f"--eval-fraction {config.evaluation.eval_fraction} holds out {what} of"
            f" {len(np.unique(table.record)):,}",
            remedy=(
                "give another fraction or --eval-seed, or name evaluation records with --eval-input"
            ),
        )
    out = {**again, "in_training": ~held & ~_any(again, held)}
    return BuildSplit(
        True, table.parts, inputs, _changed(table, inputs, out, np.zeros_like(held), held), take
    )


def _sampled(
    table: _Table,
    held: NDArray[np.bool_],
    again: dict[str, NDArray[np.bool_]],
    inputs: list[int],
    entries: list[SourceEntry],
    seed: int,
) -> BuildSplit:
    not_here = held | _any(again, held)
    copies = np.where(not_here, 0, _copies(table, not_here, entries, seed))
    # Once through all, then again through those that stand there twice, and so on: copies of a
    # record keep apart.
    rounds = [np.flatnonzero(copies > done) for done in range(int(copies.max(initial=0)))]
    out = {**again, "held_out": held, "not_sampled": (copies == 0) & ~not_here}
    return BuildSplit(
        False,
        table.parts,
        inputs,
        _changed(table, inputs, out, np.maximum(copies - 1, 0), copies),
        _joined(rounds, np.int64),
    )


def _any(groups: dict[str, NDArray[np.bool_]], like: NDArray[np.bool_]) -> NDArray[np.bool_]:
    found = np.zeros_like(like)
    for which in groups.values():
        found |= which
    return found


def _copies(
    table: _Table, out: NDArray[np.bool_], entries: list[SourceEntry], seed: int
) -> NDArray[np.int64]:
    """How often each sequence stands in the build: as often as its record. out: those that do not
    stand there at all."""
    records, which = np.unique(table.record, return_inverse=True)
    entry = np.zeros(len(records), dtype=np.int64)
    entry[which] = table.entry
    usable = np.ones(len(records), dtype=np.bool_)
    usable[which] = ~out
    found = np.bincount(entry[usable], minlength=len(entries))
    times = [each.repeat for each in entries]
    weights = [each.weight for each in entries]
    if any(weight is not None for weight in weights):
        for number, each in enumerate(entries):
            if each.weight is not None and not found[number]:
                raise EmptyInput(
                    f"the source {each.name} has a weight, and no usable record",
                    remedy="look at its records, or leave it out",
                )
        unit = min(
            found[n] * times[n] / weight for n, weight in enumerate(weights) if weight is not None
        )
        times = [
            times[n] if weight is None else weight * unit / found[n]
            for n, weight in enumerate(weights)
        ]
    copies = np.zeros(len(records), dtype=np.int64)
    for number, factor in enumerate(times):
        own = np.flatnonzero(usable & (entry == number))
        once_more = round(factor * len(own)) - int(factor) * len(own)
        copies[own] = int(factor)
        if once_more:
            # By a hash of the place in the source, so that what other sources hold does not matter.
            copies[
                own[
                    np.argsort(hash64_array(records[own] - records[own[0]], seed), kind="stable")[
                        :once_more
                    ]
                ]
            ] += 1
    return copies[which]


# --- the accounts ---------------------------------------------------------------------------------


def _changed(
    table: _Table,
    inputs: list[int],
    left_out: dict[str, NDArray[np.bool_]],
    repeated: NDArray[Any],
    copies: NDArray[Any],
) -> list[Accounting]:
    """The accounts of the inputs after sequences were left out, for reasons by name, or stand there
    more than once."""
    changes: dict[int, Counter[str]] = {number: Counter() for number in inputs}

    def add(name: str, numbers: NDArray[Any]) -> None:
        for number, total in enumerate(
            np.bincount(table.input, weights=numbers, minlength=len(inputs)).tolist()
        ):
            changes[number][name] += round(total)

    for reason, which in left_out.items():
        add(f"left_out.{reason}", which)
        add(f"tokens_left_out.{reason}", which * table.lengths)
    add("extra.repeated", repeated)
    add("tokens_extra.repeated", repeated * table.lengths)
    add("sequences", copies - np.ones(len(copies), dtype=np.int64))
    add("tokens", (copies - np.ones(len(copies), dtype=np.int64)) * table.lengths)
    add("trained_tokens", (copies - np.ones(len(copies), dtype=np.int64)) * table.targets)
    return _accounts(table.parts, inputs, changes)


def _accounts(
    parts: list[PartitionResult], inputs: list[int], changes: dict[int, Counter[str]]
) -> list[Accounting]:
    counts: dict[int, Counter[str]] = {number: Counter() for number in inputs}
    for part in parts:
        own = counts[part.partition.input]
        own.update(part.counts)
        own.update(f"rejected.{r.reason}" for r in part.rejected)
    for number, change in changes.items():
        counts[number].update(change)
    # A reason that nothing fell to is no reason to speak of.
    return [
        Accounting.from_counts({name: n for name, n in own.items() if n or "." not in name})
        for own in counts.values()
    ]

"""The quotas of a mixture: how often each group uses the records of each source.

1. Of source k, A_k is what is available: its records, its tokens or its trained tokens (`mix_by`),
   times its `repeat`. With the weights w_k, the unit is u = min over k of A_k / w_k: the source
   with the least for its weight is used completely. The target of source k is w_k * u.
2. Every usable record of the source is used `copies` times: as often as the target allows.
3. The rest of the target comes from single records. By records, the groups get them in proportion
   to their usable records. By tokens, the records of all groups are put into the order of their
   keys, and those up to the place that is nearest to the target are used once more. So the tokens
   of a source differ from the target by at most half of those of the record at that place.

By tokens, no process needs the records of all groups at once: a first pass over the groups sums the
sizes by ranges of keys, and a second one reads only the range in which the place is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftprep.config.build import SourceEntry
from sftprep.errors import EmptyInput
from sftprep.pipeline.mixture.sized_records import SizedRecords

_RANGE_BITS = 10
"""The keys have 64 bits; those with equal first bits are one range."""


@dataclass(frozen=True, slots=True)
class Quota:
    """How often a group uses the records of a source.

    Attributes:
        copies: The copies of each usable record.
        extra: The number of records with one copy more: the first ones in the order of their keys.
    """

    copies: int
    extra: int


def share_copies(
    entries: Sequence[SourceEntry], usable: NDArray[np.int64]
) -> list[tuple[Quota, ...]]:
    """Return the quotas of each group, by records.

    Args:
        entries: The sources.
        usable: int64 [groups, sources]; the number of usable records.

    Raises:
        EmptyInput: A source with a weight has no usable record.

    Example:
        A source without a weight, with the repeat 1.5 and 10 usable records in one group
        ->  [(Quota(copies=1, extra=5),)]
    """
    totals = usable.sum(axis=0)
    quotas: list[list[Quota]] = [[] for _ in usable]
    for number, factor in enumerate(_copies_per_entry(entries, totals)):
        copies = int(factor)
        extra = round(factor * int(totals[number])) - copies * int(totals[number])
        for group, share in enumerate(_share(extra, usable[:, number])):
            quotas[group].append(Quota(copies, share))
    return [tuple(of_group) for of_group in quotas]


def share_sizes(
    entries: Sequence[SourceEntry], groups: Sequence[Callable[[], SizedRecords]]
) -> list[tuple[Quota, ...]]:
    """Return the quotas of each group, by the sizes of the records.

    Args:
        entries: The sources.
        groups: For each group, a function that returns its usable records; it is called twice.

    Raises:
        EmptyInput: A source with a weight has no usable record.

    Example:
        Two sources with the weight 1, one record of 100 tokens and ten of 30 tokens, in one group
        ->  [(Quota(copies=1, extra=0), Quota(copies=0, extra=3))]
    """
    # 1. The sizes of each source by ranges of keys: int64 [sources, ranges].
    sums = np.zeros((len(entries), 1 << _RANGE_BITS), np.int64)
    for read in groups:
        sums += _sum_ranges(read())
    totals = sums.sum(axis=1)
    factors = _copies_per_entry(entries, totals)
    copies = [int(factor) for factor in factors]
    rests = [
        max(factor * total - whole * total, 0.0)
        for factor, whole, total in zip(factors, copies, totals.tolist(), strict=True)
    ]
    # 2. The range of keys in which each source reaches its target, and what is before it.
    ends = np.cumsum(sums, axis=1)
    crossed = [
        min(int(np.searchsorted(of_source, rest)), sums.shape[1] - 1)
        for of_source, rest in zip(ends, rests, strict=True)
    ]
    before = [int(ends[k, n] - sums[k, n]) for k, n in enumerate(crossed)]
    # 3. The records of all groups in that range, of which some are used once more.
    cuts = [_RangeCut.of(read(), crossed) for read in groups]
    extra = np.stack([cut.num_before for cut in cuts])
    for k, rest in enumerate(rests):
        extra[:, k] += _choose_nearest([cut.inside[k] for cut in cuts], rest - before[k])
    return [
        tuple(Quota(whole, number) for whole, number in zip(copies, of_group, strict=True))
        for of_group in extra.tolist()
    ]


def _sum_ranges(records: SizedRecords) -> NDArray[np.int64]:
    """Return the sizes by source and range of keys: int64 [sources, ranges]."""
    num_sources = len(records.counts)
    place = (records.source_of << _RANGE_BITS) + _range_of(records.keys)
    sums = np.bincount(place, records.sizes, num_sources << _RANGE_BITS)
    return sums.astype(np.int64).reshape(num_sources, -1)


def _range_of(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (keys >> np.uint64(64 - _RANGE_BITS)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class _RangeCut:
    """The records of a group up to a range of keys, and those in it.

    Attributes:
        num_before: int64 [sources]; the number of records before the range.
        inside: The keys and the sizes of the records in the range, for each source.
    """

    num_before: NDArray[np.int64]
    inside: list[tuple[NDArray[np.uint64], NDArray[np.int64]]]

    @classmethod
    def of(cls, records: SizedRecords, ranges: Sequence[int]) -> _RangeCut:
        """Return the cut of a group; `ranges` has the number of the range for each source."""
        num_before, inside = [], []
        for start, count, number in zip(records.starts, records.counts, ranges, strict=True):
            keys = records.keys[start : start + count]
            first, last = np.searchsorted(_range_of(keys), [number, number + 1])
            num_before.append(first)
            # Copies, since a part of an array would keep all of it.
            sizes = records.sizes[start : start + count]
            inside.append((keys[first:last].copy(), sizes[first:last].copy()))
        return cls(np.array(num_before, np.int64), inside)


def _choose_nearest(
    groups: Sequence[tuple[NDArray[np.uint64], NDArray[np.int64]]], target: float
) -> NDArray[np.int64]:
    """Return how many of the first records of each group are chosen: int64 [groups].

    Args:
        groups: The keys and the sizes of the records of each group, by key.
        target: The sum of the sizes to come as near to as possible.

    Example:
        keys and sizes [1, 5] and [10, 10] in one group, [3] and [20] in the other, target 27
        ->  [1, 1]
    """
    group_of = np.repeat(np.arange(len(groups)), [len(keys) for keys, _ in groups])
    order = np.argsort(np.concatenate([keys for keys, _ in groups]), kind="stable")
    sizes = np.concatenate([sizes for _, sizes in groups])[order]
    sums = np.concatenate(([0], np.cumsum(sizes)))
    num_chosen = int(np.argmin(np.abs(sums - target)))
    chosen = group_of[order[:num_chosen]]
    return np.bincount(chosen, minlength=len(groups)).astype(np.int64)


def _share(total: int, sizes: NDArray[np.int64]) -> list[int]:
    """Share a number in proportion to sizes, by the largest remainder.

    Example:
        total = 5, sizes = [1, 1, 4]  ->  [1, 1, 3]
    """
    sum_of_sizes = max(1, int(sizes.sum()))
    # Python integers, because the products may exceed 64 bits.
    exact = [total * size for size in sizes.tolist()]
    shares = [product // sum_of_sizes for product in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: (-(exact[n] % sum_of_sizes), n))
    for number in by_remainder[: total - sum(shares)]:
        shares[number] += 1
    return shares


def _copies_per_entry(entries: Sequence[SourceEntry], usable: NDArray[np.int64]) -> list[float]:
    """Return how often each source is used, as a fraction of what is usable of it.

    Args:
        entries: The sources.
        usable: int64 [sources]; the usable records of each source, or their tokens.

    Raises:
        EmptyInput: A source with a weight has no usable record.
    """
    factors = [entry.repeat for entry in entries]
    weights = [entry.weight for entry in entries]
    if all(weight is None for weight in weights):
        return factors
    for entry, number in zip(entries, usable.tolist(), strict=True):
        if entry.weight is not None and not number:
            raise EmptyInput(
                f"the source {entry.name} has a weight, but no usable record",
                remedy="check its records, or remove it from the sources",
            )
    unit = min(
        usable[n] * factors[n] / weight for n, weight in enumerate(weights) if weight is not None
    )
    return [
        factors[n] if weight is None else weight * unit / usable[n]
        for n, weight in enumerate(weights)
    ]

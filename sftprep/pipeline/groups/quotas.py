"""The quotas of a mixture: how often each group uses the records of each source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sftprep.config.build import SourceEntry
from sftprep.errors import EmptyInput
from sftprep.pipeline.groups.task import Quota


def share_copies(
    entries: Sequence[SourceEntry], usable: NDArray[np.int64]
) -> list[tuple[Quota, ...]]:
    """Return the quotas of each group.

    The copies of a source are exact for the whole build; the groups get them in proportion to their
    usable records, by the largest remainder.

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
    """Return how often each source is used, as a fraction of its usable records.

    Of the sources with a weight, the one with the fewest records in relation to its weight is used
    completely; the others are used in proportion to it.

    Args:
        entries: The sources.
        usable: int64 [sources]; the number of usable records of each source.

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

"""Textbook best-fit decreasing: one sequence at a time, over a list of open bins."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit_decreasing_slow(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the sequences of each bin in the order of packing; bins are in the order of opening.

    The longest sequence is first, and of equal lengths the first in the input. Each is put into the
    bin with the smallest sufficient space, and of bins with equal space into the one that has had
    it longest; otherwise into a new bin. Sequences of length 0 are left out.
    """
    bins: list[list[int]] = []
    space: list[int] = []
    since: list[int] = []
    order = sorted(
        (i for i in range(len(lengths)) if lengths[i] > 0), key=lambda i: (-lengths[i], i)
    )
    for step, i in enumerate(order):
        fitting = [b for b in range(len(bins)) if space[b] >= lengths[i]]
        if fitting:
            b = min(fitting, key=lambda b: (space[b], since[b]))
        else:
            b = len(bins)
            bins.append([])
            space.append(capacity)
            since.append(step)
        bins[b].append(i)
        space[b] -= lengths[i]
        since[b] = step
    return bins

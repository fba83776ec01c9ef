"""Plans by counts: packs of any number of sequences from a histogram of their lengths.

The plan of 10**9 sequences takes a millisecond and a few hundred kilobytes, since it depends on the
number of distinct lengths. The bins of the sequences of a partition follow from the plan and from
the histogram of the preceding partitions, so that partitions can be processed in any order:

    plan = plan_counts((lengths, counts), 4096)
    bins = plan.bins_of(lengths_of_partition, counts_before_partition)

Importing this module does not import numba.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sftprep.errors import ConfigError, setting
from sftprep.packing.exact import exact_runs
from sftprep.packing.runs import RunPlanner, best_fit_runs
from sftprep.packing.validation import to_checked_capacity, to_integers

RUN_PLANNERS: dict[str, RunPlanner] = {"bfd": best_fit_runs, "exact": exact_runs}
"""The strategies that need only counts, by name."""


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """A plan of packs by counts.

    Sequences are sorted by length, the longest first, and sequences of equal length by their order
    in the input. A move (first, size, k) puts the next size * k of them into the bins first ..
    first + size - 1, k into each in turn.

    Attributes:
        lengths: int64 [classes]; the distinct lengths of the histogram, ascending.
        counts: int64 [classes]; the number of sequences of each length.
        moves: int64 [moves, 3]; (first, size, k) of each move.
        num_bins: The number of bins; none is empty.
        capacity: The number of tokens that fit into a bin.

    Example:
        lengths = [2, 5], counts = [4, 2], capacity = 8:  moves = [[0, 2, 1], [0, 2, 1], [2, 1, 2]],
        num_bins = 3; the bins contain [5, 2], [5, 2] and [2, 2].
    """

    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]
    moves: NDArray[np.int64]
    num_bins: int
    capacity: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens in all bins together."""
        return int(self.lengths @ self.counts)

    @property
    def fill(self) -> float:
        """Return the used share of the capacity of all bins; 1.0 if there are none."""
        return self.tokens / (self.num_bins * self.capacity) if self.num_bins else 1.0

    def bins_of(self, lengths: ArrayLike, first_ranks: ArrayLike) -> NDArray[np.int64]:
        """Return the bins of the sequences of a partition.

        The bins are those of `pack_lengths` for all partitions in a row. The cost is that of
        sorting the partition, and a binary search in the moves for each sequence.

        Args:
            lengths: Integers [n]; the lengths of the sequences, in the order of the input.
            first_ranks: Integers [classes]; for each class, the number of its sequences in the
                preceding partitions. Their histograms, added up.

        Returns:
            int64 [n]; the bins, -1 for sequences of length 0.

        Raises:
            ConfigError: The histogram has fewer sequences of a length than the partition and the
                preceding ones, or an argument is not an array of integers.

        Example:
            With the plan above, bins_of([2, 5, 2], [1, 1])  ->  [1, 1, 2]
        """
        partition = to_integers(lengths, "lengths", "pass one integer per sequence")
        ranks = to_integers(first_ranks, "first_ranks", "pass one integer per distinct length")
        if ranks.shape != self.lengths.shape:
            raise ConfigError(
                f"first_ranks has {ranks.size} integers, and the plan has {self.lengths.size}"
                " distinct lengths",
                remedy="add up the histograms of the preceding partitions",
            )
        classes = self._classes_of(partition)
        # The rank of each sequence in its class: sort the partition by class.
        order = np.argsort(classes, kind="stable")
        sizes = np.bincount(classes, minlength=ranks.size)
        excess = ranks + sizes > self.counts
        if excess.any() or ranks.min(initial=0) < 0:
            at = int(np.argmax(excess)) if excess.any() else int(np.argmin(ranks))
            raise ConfigError(
                f"the partition has {sizes[at]} sequences of length {self.lengths[at]} after"
                f" {ranks[at]} in the preceding ones, and the plan has {self.counts[at]}",
                remedy="make the plan from the histograms of all partitions",
            )
        # The position of the first one of each class among all sequences, the longest first.
        is_packed = self.lengths > 0
        packed_counts = self.counts * is_packed
        first_position = np.cumsum(packed_counts[::-1])[::-1] - packed_counts + ranks
        # Positions are ascending within a class, so the searches are close to each other.
        position = np.repeat(first_position - (np.cumsum(sizes) - sizes), sizes)
        position += np.arange(partition.size)
        first, size, taken = self.moves.T
        ends = np.cumsum(size * taken)
        move = np.searchsorted(ends, position, side="right")
        bins = np.full(partition.size, -1, np.int64)
        num_empty = int(sizes[~is_packed].sum())  # they are the first in the order
        order, position, move = order[num_empty:], position[num_empty:], move[num_empty:]
        starts = ends - size * taken
        bins[order] = first[move] + (position - starts[move]) // taken[move]
        return bins

    def _classes_of(self, partition: NDArray[np.int64]) -> NDArray[np.intp]:
        """Return the index of each length among the lengths of the plan: [n]."""
        classes = np.searchsorted(self.lengths, partition)
        is_known = classes < self.lengths.size
        is_known[is_known] = self.lengths[classes[is_known]] == partition[is_known]
        if not is_known.all():
            at = int(np.argmin(is_known))
            raise ConfigError(
                f"sequence {at} has {partition[at]} tokens, a length that the plan does not have",
                remedy="make the plan from the histograms of all partitions",
            )
        return classes


def plan_counts(
    histogram: tuple[ArrayLike, ArrayLike], capacity: int, strategy: str = "bfd"
) -> Moves:
    """Plan the packs of any number of sequences from a histogram of their lengths.

    The bins are those of `pack_lengths` with the same strategy.

    Args:
        histogram: The distinct lengths, integers [classes], ascending, and the number of sequences
            of each, integers [classes]; as in the manifest of a build (the values of
            `lengths["exact"]`), or `np.arange(len(counts))` and counts by `np.bincount`. Sequences
            of length 0 are in no bin.
        capacity: Tokens in a pack, 1 .. 2**31 - 1.
        strategy: "bfd" or "exact", see `pack_lengths`.

    Raises:
        ConfigError: The histogram, the capacity or the strategy is invalid, a length is above the
            capacity, or there are 2**62 tokens or more.

    Example:
        plan_counts(([2, 5], [4 * 10**9, 2 * 10**9]), 8).num_bins  ->  2500000000
    """
    planner = RUN_PLANNERS.get(strategy)
    if planner is None:
        raise ConfigError(
            f"the packing strategy {strategy!r} does not plan by counts",
            remedy=f"choose one of: {', '.join(RUN_PLANNERS)}",
        )
    capacity = to_checked_capacity(capacity)
    lengths, counts = _to_checked_histogram(histogram, capacity)
    is_run = (lengths > 0) & (counts > 0)
    moves, num_bins = planner(
        np.ascontiguousarray(lengths[is_run][::-1]),
        np.ascontiguousarray(counts[is_run][::-1]),
        capacity,
    )
    # A copy, since best-fit returns a part of a larger array.
    return Moves(lengths, counts, moves.copy(), num_bins, capacity)


def _to_checked_histogram(
    histogram: tuple[ArrayLike, ArrayLike], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return copies of the lengths and counts of a histogram; raise ConfigError if invalid."""
    if not isinstance(histogram, (tuple, list)) or len(histogram) != 2:
        raise ConfigError(
            "the histogram is not a pair of lengths and counts",
            remedy="pass (lengths, counts); for counts by np.bincount: (np.arange(n), counts)",
        )
    lengths = to_integers(histogram[0], "the lengths of the histogram", "pass distinct lengths")
    counts = to_integers(histogram[1], "the counts of the histogram", "pass a count per length")
    if lengths.size != counts.size:
        raise ConfigError(
            f"the histogram has {lengths.size} lengths and {counts.size} counts",
            remedy="pass one count per length",
        )
    for name, values in (("length", lengths), ("count", counts)):
        if values.min(initial=0) < 0:
            raise ConfigError(
                f"the histogram has a {name} of {values.min()}", remedy=f"pass {name}s of 0 or more"
            )
    if np.any(lengths[1:] <= lengths[:-1]):
        at = int(np.argmax(lengths[1:] <= lengths[:-1]))
        raise ConfigError(
            f"the lengths of the histogram are not ascending: {lengths[at + 1]} follows"
            f" {lengths[at]}",
            remedy="sort the lengths, and add the counts of equal ones",
        )
    overlong = counts[lengths > capacity]
    if overlong.any():
        raise ConfigError(
            f"{overlong.sum()} sequences are longer than the capacity of a pack, {capacity}",
            remedy=[
                "add their count to that of the capacity, as truncation does",
                f"raise the capacity ({setting('max_length')})",
            ],
        )
    # Of floats, so that the check itself cannot overflow.
    if max(float(counts.sum(dtype=np.float64)), float(lengths @ counts.astype(np.float64))) > 2**62:
        raise ConfigError(
            "the histogram has more than 2**62 sequences or tokens", remedy="plan fewer at a time"
        )
    return lengths, counts

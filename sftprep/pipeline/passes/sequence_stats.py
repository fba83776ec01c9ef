"""Statistics of the sequences of a partition, collected together with its spill.

The workers collect them.

The selection needs some of them; the histogram of the lengths before the cut is for the manifest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.hashing import hash64_array
from sftprep.core.mask_arrays import TargetRuns
from sftprep.pipeline.passes.overlong import LengthLimit, Sequences
from sftprep.pipeline.passes.spill import Spill
from sftprep.shards.manifest_size import MOST_EXACT_LENGTHS, POSITION_BIN


@dataclass(frozen=True, slots=True)
class SequenceStats:
    """Statistics of the sequences of one partition.

    The hashes of a sequence are those of its record.

    Attributes:
        line_of: int32 [n]; the line of the record of each sequence.
        record: int32 [n]; the number of its record. It is the line, unless a function of the user
            makes several records of a line.
        targets: int32 [n]; the number of targets of each sequence.
        holdout_hashes: uint64 [n]; hashes with the seed of the evaluation, if records are held out.
        exact_hashes: uint64 [n]; hashes of the record, if records are compared.
        near_hashes: uint64 [n]; hashes of the record without whitespace, if records are compared.
    """

    line_of: NDArray[np.int32]
    record: NDArray[np.int32]
    targets: NDArray[np.int32]
    holdout_hashes: NDArray[np.uint64] | None = None
    exact_hashes: NDArray[np.uint64] | None = None
    near_hashes: NDArray[np.uint64] | None = None


@dataclass(frozen=True, slots=True)
class StatsRequest:
    """The optional statistics to collect.

    Attributes:
        holdout_seed: The seed for `holdout_hashes`; None if no record is held out.
        compare: Whether records are compared with other records.
        compare_by: The keys by which records are compared and held out; empty for everything that
            their format reads.
    """

    holdout_seed: int | None = None
    compare: bool = False
    compare_by: tuple[str, ...] = ()

    @property
    def hash_by(self) -> tuple[str, ...] | None:
        """The hashed keys of records; None if records are not hashed."""
        return self.compare_by if self.compare or self.holdout_seed is not None else None


def collect_stats(
    spill: Spill, rows: NDArray[np.int64], targets: NDArray[np.int64], request: StatsRequest
) -> SequenceStats:
    """Return the statistics of a partition.

    Args:
        spill: The spill of the partition, with hashes if the request needs them.
        rows: int64 [n]; the row of each sequence in the spill.
        targets: int64 [n]; the number of targets of each sequence.
        request: The optional statistics.
    """
    record = spill.line_of if spill.record is None else spill.record
    exact, near, holdout = spill.exact_hashes, spill.near_hashes, None
    if request.holdout_seed is not None and exact is not None:
        holdout = hash64_array(exact[rows].view(np.int64), request.holdout_seed)
    return SequenceStats(
        spill.line_of[rows].astype(np.int32),
        record[rows].astype(np.int32),
        targets.astype(np.int32),
        holdout,
        exact[rows] if request.compare and exact is not None else None,
        near[rows] if request.compare and near is not None else None,
    )


# --- the histogram of lengths ---------------------------------------------------------------------


_LENGTH_COUNTS = ("sequences", "tokens", "trained_tokens")


@lru_cache(maxsize=8)
def length_bounds(limit: LengthLimit) -> NDArray[np.int64]:
    """Return the lengths at the ends of the histogram bins: int64 [bins].

    They are the multiples of 64 up to 1024 and 16 lengths for each doubling after that, so they are
    few and at most a sixteenth apart; and the two lengths of the limit.
    """
    octave = np.arange(17, 33)
    lengths = [np.arange(64, 1025, 64), *(octave << exponent for exponent in range(6, 27))]
    bounds = np.concatenate([*lengths, [limit.max_length, limit.model_limit or 64]])
    return np.array(sorted({*bounds.tolist()}), np.int64)  # np.unique would import numpy.ma


def count_lengths(
    sequences: Sequences, targets: TargetRuns, limit: LengthLimit
) -> NDArray[np.int64]:
    """Return the histogram of the lengths of whole sequences.

    Args:
        sequences: The sequences, before the cut.
        targets: Their targets.
        limit: The limit.

    Returns:
        int64 [3, bins]. The first row counts sequences by their length. The others count tokens and
        targets by the smallest `max_length` that keeps them, if long sequences are dropped or
        rejected as the limit says, and truncated otherwise. Empty bins at the end are omitted.

    Example:
        A sequence of 100 tokens with the targets 1 to 99, which is truncated, and bins that end at
        64 and 128  ->  [[0, 1], [64, 36], [63, 36]]
    """
    offsets = sequences.offsets.astype(np.int64)
    lengths = np.diff(offsets)
    bounds = length_bounds(limit)
    bounds = bounds[: np.searchsorted(bounds, lengths.max(initial=1)) + 1]
    bins = np.searchsorted(bounds, lengths)
    by_length = np.bincount(bins, minlength=len(bounds))
    if limit.overlong in ("drop", "error"):
        if limit.overlong == "error":  # rejects a record for its longest sequence
            _, record = np.unique(sequences.line_of, return_inverse=True)
            largest_bin = np.zeros(len(bins), np.int64)
            np.maximum.at(largest_bin, record, bins)
            bins = largest_bin[record]
        found = targets.count_in(offsets[:-1], offsets[1:])
        counts = [np.bincount(bins, weights, len(bounds)) for weights in (lengths, found)]
        return np.stack([by_length, *counts]).astype(np.int64)
    # Truncation keeps a token whose position is below `max_length`, counted from the other end.
    sequence, firsts, lasts = _locate_targets(sequences, targets)
    if limit.truncate_side == "left":  # and a target only with the token before it
        firsts, lasts = lengths[sequence] - lasts + 1, lengths[sequence] - firsts + 1
    tokens = _count_by_bin(bounds, np.zeros_like(lengths), lengths)
    return np.stack([by_length, tokens, _count_by_bin(bounds, firsts, lasts)])


def count_exact_lengths(sequences: Sequences, limit: LengthLimit) -> NDArray[np.int64]:
    """Return how many whole sequences have each length up to the limit: int64 [longest + 1].

    Lengths above `MOST_EXACT_LENGTHS` are not counted.

    Example:
        Sequences of 2, 2 and 9 tokens, and a limit of 4  ->  [0, 0, 2]
    """
    lengths = np.diff(sequences.offsets)
    return np.bincount(lengths[lengths <= min(limit.max_length, MOST_EXACT_LENGTHS)])


def count_trained_positions(sequences: Sequences, targets: TargetRuns) -> NDArray[np.int64]:
    """Return how many targets are at the positions of each bin: int64 [bins].

    Bin k has the positions from 64 k to 64 k + 63 in the whole sequence, up to
    `MOST_EXACT_LENGTHS`. So the sum of the first n bins is what 64 n tokens of each sequence keep.

    Example:
        A sequence of 100 tokens with the targets 1 to 99  ->  [63, 36]
    """
    _, firsts, lasts = _locate_targets(sequences, targets)
    firsts, lasts = (np.minimum(ends, MOST_EXACT_LENGTHS) for ends in (firsts, lasts))
    bounds = np.arange(POSITION_BIN, lasts.max(initial=0) + POSITION_BIN, POSITION_BIN)
    return _count_by_bin(bounds, firsts, lasts)


def _locate_targets(
    sequences: Sequences, targets: TargetRuns
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the sequence of each run of targets, and the range of its positions there."""
    offsets = sequences.offsets.astype(np.int64)
    sequence = np.searchsorted(offsets, targets.firsts, side="right") - 1
    starts = offsets[sequence]
    return sequence, targets.firsts - starts, targets.lasts - starts


def sum_exact_counts(
    lengths: Iterable[NDArray[np.int64]], trained_positions: Iterable[NDArray[np.int64]]
) -> dict[str, list[int]]:
    """Return the sums of exact counts, for the file of a group.

    The lengths that no sequence has are omitted.

    Args:
        lengths: Results of `count_exact_lengths`.
        trained_positions: Results of `count_trained_positions`.
    """
    sequences = _sum_arrays(lengths)
    found = np.flatnonzero(sequences)
    return {
        "lengths": found.tolist(),
        "sequences": sequences[found].tolist(),
        "trained_positions": _sum_arrays(trained_positions).tolist(),
    }


def _sum_arrays(arrays: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the sum of arrays of any lengths; what is beyond their end counts as 0."""
    found = [*arrays]
    total = np.zeros(max(map(len, found), default=0), np.int64)
    for each in found:
        total[: len(each)] += each
    return total


def _count_by_bin(
    bounds: NDArray[np.int64], firsts: NDArray[np.int64], lasts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Count the integers in ranges by bound: int64 [bins].

    The ranges are [first, last). An integer is counted for the first bound above it.
    """
    # The number below a bound is the sum of max(bound - first, 0) - max(bound - last, 0).
    ends, sign = np.concatenate((firsts, lasts)), np.repeat([1, -1], len(firsts))
    bins = np.searchsorted(bounds, ends)
    open_ranges, sums = (
        np.cumsum(np.bincount(bins, weights, len(bounds))).astype(np.int64)
        for weights in (sign, sign * ends)
    )
    return np.diff(bounds * open_ranges - sums, prepend=0)


def describe_lengths(
    histograms: Iterable[NDArray[np.int64]], exact: dict[str, list[int]], limit: LengthLimit
) -> dict[str, Any]:
    """Return the sums of histograms, for the manifest.

    Args:
        histograms: Results of `count_lengths`.
        exact: The result of `sum_exact_counts`.
        limit: The limit of both.
    """
    bounds = length_bounds(limit)
    total = np.zeros((3, len(bounds)), np.int64)
    for histogram in histograms:
        total[:, : histogram.shape[1]] += histogram
    is_filled = total.any(axis=0)
    return {
        "model_limit": limit.model_limit,
        "up_to": bounds[is_filled].tolist(),
        **{name: row[is_filled].tolist() for name, row in zip(_LENGTH_COUNTS, total, strict=True)},
        "exact": exact,
    }


def sum_lengths(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Return the sum of two results of `describe_lengths` with one limit; the first may be {}."""
    if not left:
        return right
    up_to = sorted({*left["up_to"], *right["up_to"]})
    total: dict[str, Any] = {"model_limit": left["model_limit"], "up_to": up_to}
    for name in _LENGTH_COUNTS:
        sums = dict.fromkeys(up_to, 0)
        for lengths in (left, right):
            for bound, number in zip(lengths["up_to"], lengths[name], strict=True):
                sums[bound] += number
        total[name] = [*sums.values()]
    total["exact"] = _sum_exact(left["exact"], right["exact"])
    return total


def _sum_exact(left: dict[str, list[int]], right: dict[str, list[int]]) -> dict[str, list[int]]:
    counts = Counter(dict(zip(left["lengths"], left["sequences"], strict=True)))
    counts.update(dict(zip(right["lengths"], right["sequences"], strict=True)))
    lengths = sorted(counts)
    positions = (each["trained_positions"] for each in (left, right))
    return {
        "lengths": lengths,
        "sequences": [counts[length] for length in lengths],
        "trained_positions": [*map(sum, zip_longest(*positions, fillvalue=0))],
    }

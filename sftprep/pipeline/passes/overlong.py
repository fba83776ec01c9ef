"""The cut of sequences longer than `max_length`, and of those without targets.

Pass 1 keeps whole sequences, so that its result serves every length. The cut selects ranges of
them, which are ranges of tokens. Each treatment of long sequences is one function in the table
`OVERLONG`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sftprep.config.validation import TruncateSide
from sftprep.core.mask_arrays import TargetRuns
from sftprep.core.types import Rejected
from sftprep.packing.cut import SequenceRanges, drop, split, truncate
from sftprep.sources.readers.jsonl import add_excerpts

NO_LIMIT = 2**31 - 1
"""The largest length of a sequence that can be stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthLimit:
    """The longest sequence of a build, and the treatment of longer ones.

    Attributes:
        max_length: The largest number of tokens.
        overlong: A key of OVERLONG; or "keep", which cuts nothing.
        truncate_side: The end at which "truncate" cuts.
        model_limit: The largest number of tokens that the model accepts, according to its
            tokenizer; None if the tokenizer has no limit.
    """

    max_length: int
    overlong: str
    truncate_side: TruncateSide = "right"
    model_limit: int | None = None


class Sequences(Protocol):
    """Whole sequences of a partition, in memory (`TokenBatch`) or a file (`Spill`)."""

    @property
    def offsets(self) -> NDArray[Any]:
        """Integers [n + 1]."""

    @property
    def completion_mask(self) -> NDArray[np.bool_] | NDArray[np.uint8] | None:
        """The mask of trained tokens (1 or True); None if all are trained."""

    @property
    def line_of(self) -> NDArray[np.int64]:
        """The line of the record of each sequence: int64 [n]."""

    @property
    def counts(self) -> dict[str, int]:
        """The counts of the partition, by name."""

    @property
    def first_lines(self) -> dict[str, int]:
        """By the name of a count, the line of the first record that it counts."""

    @property
    def rejected(self) -> list[Rejected]:
        """The rejected records."""


@dataclass(frozen=True, slots=True)
class FittedSequences:
    """The ranges of a partition used by a build or a stream.

    Attributes:
        ranges: The ranges; none is longer than the limit, and each trains something.
        targets: int64 [m]; the number of targets of each range.
        counts: The counts of the partition, by name.
        rejected: The rejected records, in the order of their lines.
        first_lines: By the name of a count, the line of the first record that it counts.
    """

    ranges: SequenceRanges
    targets: NDArray[np.int64]
    counts: dict[str, int]
    rejected: list[Rejected]
    first_lines: dict[str, int]


def fit_lengths(
    sequences: Sequences, targets: TargetRuns, data: bytes, limit: LengthLimit
) -> FittedSequences:
    """Select the ranges of sequences within the limit and with something to train.

    Args:
        sequences: The sequences of a partition.
        targets: Their targets.
        data: The lines of the partition, for the excerpts of records that are too long.
        limit: The limit.
    """
    counts, rejected = Counter(sequences.counts), [*sequences.rejected]
    first_lines = dict(sequences.first_lines)
    offsets = sequences.offsets.astype(np.int64)
    lengths = np.diff(offsets)
    tokens, trained = int(offsets[-1]), targets.total
    counts.update(tokens_in=tokens, trained_in=trained)
    # 1. Cut what is too long.
    ranges = SequenceRanges.whole(lengths)
    is_cut = limit.overlong != "keep" and bool((lengths > limit.max_length).any())
    if is_cut:
        ranges = OVERLONG[limit.overlong](lengths, sequences.line_of, limit, counts, rejected)
        add_excerpts(rejected, data)
        first_cut = int(sequences.line_of[np.argmax(lengths > limit.max_length)])
        first_lines |= {name: first_cut for name in _COUNTS_OF_CUTS if counts.get(name)}
    begins = offsets[ranges.rows] + ranges.starts
    found = targets.count_in(begins, begins + ranges.lengths)
    # 2. Count what was cut. The first token of a range is not a target, although it is not cut.
    if is_cut:
        later = begins[ranges.starts > 0]
        mask = sequences.completion_mask
        firsts = len(later) if mask is None else int(np.count_nonzero(mask[later]))
        counts["trained_dropped.first_of_sequence"] = firsts
        if (reason := _CUT_AS.get(limit.overlong)) is not None:
            counts[f"tokens_{reason}"] = tokens - int(ranges.lengths.sum())
            counts[f"trained_{reason}"] = trained - int(found.sum()) - firsts
    # 3. Leave out what trains nothing.
    is_trained = found > 0
    if not is_trained.all():
        counts["dropped.no_trained_token"] = int(np.count_nonzero(~is_trained))
        counts["tokens_dropped.no_trained_token"] = int(ranges.lengths[~is_trained].sum())
        first = ranges.rows[int(np.argmin(is_trained))]
        first_lines["dropped.no_trained_token"] = int(sequences.line_of[first])
        ranges, found = ranges.select(is_trained), found[is_trained]
    counts.update(
        sequences=len(found), tokens=int(ranges.lengths.sum()), trained_tokens=int(found.sum())
    )
    return FittedSequences(
        ranges,
        found,
        dict(counts),
        sorted(rejected, key=lambda record: record.line),
        first_lines,
    )


_COUNTS_OF_CUTS = ("truncated", "extra.split", "dropped.overlong")
"""The counts of long sequences, whose first line is kept."""

OverlongRule = Callable[
    [NDArray[np.int64], NDArray[np.int64], LengthLimit, Counter[str], list[Rejected]],
    SequenceRanges,
]
"""A function of the lengths of the sequences (int64 [n]), the lines of their records (int64 [n])
and the limit. It returns the ranges to keep, counts the sequences, and rejects records."""


def _truncate(
    lengths: NDArray[np.int64],
    line_of: NDArray[np.int64],
    limit: LengthLimit,
    counts: Counter[str],
    rejected: list[Rejected],
) -> SequenceRanges:
    """Cut each overlong sequence at one end."""
    ranges = truncate(lengths, limit.max_length, limit.truncate_side)
    counts["truncated"] = int(np.count_nonzero(ranges.lengths < lengths))
    return ranges


def _split(
    lengths: NDArray[np.int64],
    line_of: NDArray[np.int64],
    limit: LengthLimit,
    counts: Counter[str],
    rejected: list[Rejected],
) -> SequenceRanges:
    """Split overlong sequences into ranges of `max_length` tokens and a shorter one."""
    ranges = split(lengths, limit.max_length, limit.truncate_side)
    counts["extra.split"] = len(ranges.rows) - len(lengths)
    return ranges


def _drop(
    lengths: NDArray[np.int64],
    line_of: NDArray[np.int64],
    limit: LengthLimit,
    counts: Counter[str],
    rejected: list[Rejected],
) -> SequenceRanges:
    """Leave out each overlong sequence."""
    ranges = drop(lengths, limit.max_length, limit.truncate_side)
    counts["dropped.overlong"] = len(lengths) - len(ranges.rows)
    return ranges


def _reject(
    lengths: NDArray[np.int64],
    line_of: NDArray[np.int64],
    limit: LengthLimit,
    counts: Counter[str],
    rejected: list[Rejected],
) -> SequenceRanges:
    """Reject each record with an overlong sequence."""
    is_long = lengths > limit.max_length
    rejected_lines, record = np.unique(line_of[is_long], return_inverse=True)
    longest = np.zeros(len(rejected_lines), np.int64)
    np.maximum.at(longest, record, lengths[is_long])
    for line, length in zip(rejected_lines.tolist(), longest.tolist(), strict=True):
        message = f"{length} tokens, more than max_length ({limit.max_length})"
        rejected.append(Rejected(line, 0, "overlong", message, ""))
    kept = np.flatnonzero(~np.isin(line_of, rejected_lines))
    # A record is counted once under `rejected`; its other sequences need an entry of their own, or
    # the ledger would not balance.
    counts["dropped.of_rejected_record"] = len(lengths) - len(kept) - len(rejected_lines)
    return SequenceRanges(kept, np.zeros_like(kept), lengths[kept])


OVERLONG: dict[str, OverlongRule] = {
    "truncate": _truncate,
    "split": _split,
    "drop": _drop,
    "error": _reject,
}

_CUT_AS = {
    "truncate": "truncated",
    "drop": "dropped.overlong",
    "error": "dropped.overlong",
}
"""The names under which the tokens that a treatment cuts are counted."""

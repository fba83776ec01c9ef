"""Sequences that are too long: cut at one end, cut into several, left out, or an error; and those
that train nothing left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from sftprep.config.validation import TruncateSide
from sftprep.core.types import Rejected, TokenBatch
from sftprep.masking import targets_of

Fit = Callable[[TokenBatch, int, TruncateSide, Counter[str], list[Rejected]], TokenBatch]


def fit_lengths(
    batch: TokenBatch,
    overlong: str,
    max_length: int,
    side: TruncateSide,
    counts: Counter[str],
    rejected: list[Rejected],
) -> TokenBatch:
    """The batch with no sequence above `max_length` tokens, by one of OVERLONG; "keep" leaves all
    as they are.

    What is cut off or left out is counted; with "error", records are set aside in `rejected`, each
    with all its sequences.
    """
    counts["tokens_in"] += int(batch.offsets[-1])
    if overlong == "keep" or not (batch.lengths > max_length).any():
        return batch
    return OVERLONG[overlong](batch, max_length, side, counts, rejected)


def without_untrained(batch: TokenBatch, counts: Counter[str]) -> TokenBatch:
    """Without the sequences that train nothing: no token is marked beyond their first, which
    nothing predicts."""
    lengths = batch.lengths
    targets = targets_of(batch.completion_mask, batch.offsets)
    trained = targets > 0
    counts["trained_tokens"] = int(targets[trained].sum())
    counts["sequences"] = int(np.count_nonzero(trained))
    if not trained.all():
        counts["dropped.no_trained_token"] = int(np.count_nonzero(~trained))
        counts["tokens_dropped.no_trained_token"] = int(lengths[~trained].sum())
        batch = batch.gather(np.flatnonzero(trained), lengths[trained])
    counts["tokens"] = int(batch.offsets[-1])
    return batch


def _truncated(
    batch: TokenBatch,
    max_length: int,
    side: TruncateSide,
    counts: Counter[str],
    rejected: list[Rejected],
) -> TokenBatch:
    lengths = batch.lengths
    kept = np.minimum(lengths, max_length)
    cut = lengths - kept
    counts["truncated"] += int(np.count_nonzero(cut))
    counts["tokens_truncated"] += int(cut.sum())
    return batch.gather(np.arange(len(lengths)), kept, cut if side == "left" else None)


def _split(
    batch: TokenBatch,
    max_length: int,
    side: TruncateSide,
    counts: Counter[str],
    rejected: list[Rejected],
) -> TokenBatch:
    """Each too long sequence as several of `max_length` tokens, the last one shorter. Source:
    `bfd_split` of TRL 1.16."""
    pieces = np.maximum(1, -(-batch.lengths // max_length))
    which = np.repeat(np.arange(len(pieces)), pieces)
    starts = (np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_length
    counts["extra.split"] += len(which) - len(pieces)
    return batch.gather(which, np.minimum(batch.lengths[which] - starts, max_length), starts)


def _dropped(
    batch: TokenBatch,
    max_length: int,
    side: TruncateSide,
    counts: Counter[str],
    rejected: list[Rejected],
) -> TokenBatch:
    long = batch.lengths > max_length
    counts["dropped.overlong"] += int(np.count_nonzero(long))
    counts["tokens_dropped.overlong"] += int(batch.lengths[long].sum())
    return batch.gather(np.flatnonzero(~long), batch.lengths[~long])


def _refused(
    batch: TokenBatch,
    max_length: int,
    side: TruncateSide,
    counts: Counter[str],
    rejected: list[Rejected],
) -> TokenBatch:
    long = batch.lengths > max_length
    lines = np.unique(batch.origin[long])
    for line in lines.tolist():
        longest = int(batch.lengths[batch.origin == line].max())
        message = f"{longest} tokens, more than --max-length {max_length}"
        rejected.append(Rejected(line, 0, "overlong", message, ""))
    gone = np.isin(batch.origin, lines)
    # A record is set aside once, whatever number of sequences it makes.
    counts["dropped.of_rejected_record"] += int(np.count_nonzero(gone)) - len(lines)
    counts["tokens_dropped.overlong"] += int(batch.lengths[gone].sum())
    return batch.gather(np.flatnonzero(~gone), batch.lengths[~gone])


OVERLONG: dict[str, Fit] = {
    "truncate": _truncated,
    "split": _split,
    "drop": _dropped,
    "error": _refused,
}

"""Treatment of sequences that are longer than `max_length`, and of those that train nothing.

Each treatment is one function in the table `OVERLONG`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from sftprep.config.validation import TruncateSide
from sftprep.core.types import Rejected, TokenBatch
from sftprep.masking import targets_of

OverlongRule = Callable[[TokenBatch, int, TruncateSide, Counter[str], list[Rejected]], TokenBatch]


def fit_lengths(
    batch: TokenBatch,
    overlong: str,
    max_length: int,
    side: TruncateSide,
    counts: Counter[str],
    rejected: list[Rejected],
) -> TokenBatch:
    """Return a batch in which no sequence has more than `max_length` tokens.

    Args:
        batch: The sequences.
        overlong: A key of OVERLONG; or "keep", which changes nothing.
        max_length: The largest number of tokens.
        side: The end at which "truncate" cuts.
        counts: Receives the numbers of tokens and sequences that are cut off or left out.
        rejected: Receives the records that "error" rejects, each with all of its sequences.
    """
    counts["tokens_in"] += int(batch.offsets[-1])
    if overlong == "keep" or not (batch.lengths > max_length).any():
        return batch
    return OVERLONG[overlong](batch, max_length, side, counts, rejected)


def drop_untrained(batch: TokenBatch, counts: Counter[str]) -> TokenBatch:
    """Return the batch without the sequences that train nothing, and count both kinds.

    A sequence trains nothing if no token after its first one is trained: the first token is never a
    target, because nothing predicts it.
    """
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


def _truncate(
    batch: TokenBatch,
    max_length: int,
    side: TruncateSide,
    counts: Counter[str],
    rejected: list[Rejected],
) -> TokenBatch:
    """Cut each overlong sequence at one end."""
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
    """Split each overlong sequence into pieces of `max_length` tokens and a shorter last piece.

    The rule is that of `bfd_split` in TRL 1.16.
    """
    pieces = np.maximum(1, -(-batch.lengths // max_length))
    # For each piece: the index of its sequence, and its first token in that sequence.
    sequence = np.repeat(np.arange(len(pieces)), pieces)
    first_piece = np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = (np.arange(len(sequence)) - first_piece) * max_length
    counts["extra.split"] += len(sequence) - len(pieces)
    lengths = np.minimum(batch.lengths[sequence] - starts, max_length)
    return batch.gather(sequence, lengths, starts)


def _drop(
    batch: TokenBatch,
    max_length: int,
    side: TruncateSide,
    counts: Counter[str],
    rejected: list[Rejected],
) -> TokenBatch:
    """Leave out each overlong sequence."""
    overlong = batch.lengths > max_length
    counts["dropped.overlong"] += int(np.count_nonzero(overlong))
    counts["tokens_dropped.overlong"] += int(batch.lengths[overlong].sum())
    return batch.gather(np.flatnonzero(~overlong), batch.lengths[~overlong])


def _reject(
    batch: TokenBatch,
    max_length: int,
    side: TruncateSide,
    counts: Counter[str],
    rejected: list[Rejected],
) -> TokenBatch:
    """Reject each record with an overlong sequence."""
    lines = np.unique(batch.origin[batch.lengths > max_length])
    for line in lines.tolist():
        longest = int(batch.lengths[batch.origin == line].max())
        message = f"{longest} tokens, more than max_length ({max_length})"
        rejected.append(Rejected(line, 0, "overlong", message, ""))
    removed = np.isin(batch.origin, lines)
    # A record is counted once under `rejected`; its other sequences need an entry of their own, or
    # the accounting would not balance.
    counts["dropped.of_rejected_record"] += int(np.count_nonzero(removed)) - len(lines)
    counts["tokens_dropped.overlong"] += int(batch.lengths[removed].sum())
    return batch.gather(np.flatnonzero(~removed), batch.lengths[~removed])


OVERLONG: dict[str, OverlongRule] = {
    "truncate": _truncate,
    "split": _split,
    "drop": _drop,
    "error": _reject,
}

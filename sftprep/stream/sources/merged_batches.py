"""The sequences of a block whose records were tokenized in groups of one kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import to_offsets
from sftprep.core.types import Rejected, TokenBatch


def merge_batches(
    batches: Sequence[TokenBatch], positions: Sequence[NDArray[np.int64]]
) -> TokenBatch:
    """Merge the groups of a block to one batch, in the order of their records.

    Args:
        batches: The sequences of each group.
        positions: int64 [lines] for each group, the index of each of its lines in the block.

    Example:
        Groups with the lines 0, 1, 3 and with line 2 give a batch with the lines 0, 1, 2, 3.
    """
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update(batch.counts)
    # Concatenate the batches, then sort the sequences by their line in the block.
    line_of = np.concatenate(
        [lines[batch.line_of] for batch, lines in zip(batches, positions, strict=True)]
    )
    lengths = np.concatenate([batch.lengths for batch in batches])
    joined = TokenBatch(
        np.concatenate([batch.input_ids for batch in batches]),
        to_offsets(lengths),
        np.concatenate([batch.completion_mask for batch in batches]),
        line_of,
        loss_weights=_concatenate_weights(batches),
    )
    order = np.argsort(line_of, kind="stable")
    merged = joined.gather(order, lengths[order])
    merged.counts = dict(counts)
    rejected = [
        Rejected(int(lines[r.line]), r.column, r.reason, r.message, r.excerpt)
        for batch, lines in zip(batches, positions, strict=True)
        for r in batch.rejected
    ]
    merged.rejected = sorted(rejected, key=lambda r: r.line)
    for batch, lines in zip(batches, positions, strict=True):
        for name, line in batch.first_lines.items():
            first = int(lines[line])
            merged.first_lines[name] = min(first, merged.first_lines.get(name, first))
    return merged


def _concatenate_weights(batches: Sequence[TokenBatch]) -> NDArray[np.float32] | None:
    """Return the weight of every token, or None if no batch has weights."""
    if all(batch.loss_weights is None for batch in batches):
        return None
    return np.concatenate(
        [
            np.ones(len(batch.input_ids), np.float32)
            if batch.loss_weights is None
            else batch.loss_weights
            for batch in batches
        ]
    )

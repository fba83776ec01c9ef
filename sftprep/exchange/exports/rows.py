"""Columns of exported rows, computed from packs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.shards.reading.pack import Pack

IGNORED = -100
"""The label of a token that is not trained, as in torch and transformers."""

Row = dict[str, NDArray[Any]]
"""One exported row: a one-dimensional array by the name of its column."""


def find_targets(pack: Pack) -> NDArray[np.bool_]:
    """Return the trained tokens that another token predicts: bool [T].

    The first token of a sequence has no context, so it is not one of them.
    """
    targets = pack.completion_mask.copy()
    targets[find_starts(pack)] = False
    return targets


def find_starts(pack: Pack) -> NDArray[np.int32]:
    """Return the position of the first token of each sequence: int32 [S]."""
    starts = np.zeros(len(pack.seq_lengths), np.int32)
    np.cumsum(pack.seq_lengths[:-1], out=starts[1:])
    return starts


def make_labels(pack: Pack) -> NDArray[np.int32]:
    """Return the id of each target, and -100 for all other tokens: int32 [T]."""
    return np.where(find_targets(pack), pack.input_ids, np.int32(IGNORED))


def packed_row(pack: Pack) -> Row:
    """Return a pack with labels and the lengths of its sequences."""
    return {
        "input_ids": pack.input_ids,
        "labels": make_labels(pack),
        "seq_lengths": pack.seq_lengths,
    }


def weighted_row(pack: Pack) -> Row:
    """Return a pack with labels and with the weight of each token in the loss.

    If the build has no weights, they are 1 for trained tokens and 0 for all others.
    """
    weights = pack.loss_weights
    return {
        **packed_row(pack),
        "loss_weights": pack.completion_mask.astype(np.float32) if weights is None else weights,
    }


def complete_row(pack: Pack) -> Row:
    """Return a pack with all columns of a build that describe its tokens, and with labels."""
    return {
        **weighted_row(pack),
        "position_ids": pack.position_ids.astype(np.int32),
        "completion_mask": pack.completion_mask,
    }


def shifted_row(pack: Pack) -> Row:
    """Return a pack whose mask is true where a token *predicts* a target.

    Example:
        sequences [5, 6, 7] and [8, 9], of which 7 and 9 are trained:
        loss_mask = [0, 1, 0, 1, 0], seq_start_id = [0, 3]
    """
    mask = np.zeros(len(pack.input_ids), np.int8)
    mask[:-1] = find_targets(pack)[1:]
    return {"input_ids": pack.input_ids, "loss_mask": mask, "seq_start_id": find_starts(pack)}


def sequence_rows(pack: Pack) -> Iterator[Row]:
    """Yield the sequences of a pack, one row for each."""
    labels, ends = make_labels(pack), np.cumsum(pack.seq_lengths)
    for first, last in zip(find_starts(pack).tolist(), ends.tolist(), strict=True):
        yield {
            "input_ids": pack.input_ids[first:last],
            "attention_mask": np.ones(last - first, np.int8),
            "labels": labels[first:last],
        }

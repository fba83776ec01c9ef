"""Padded batches of the sequences of a packed row.

They are for models without isolation of sequences in one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedGroup:
    """Some sequences of a row, right-padded to the longest of them."""

    index: Tensor
    """Index of each token in the row, int64 [sequences, longest]; 0 at padding."""
    real: Tensor
    """False at padding, bool [sequences, longest]."""


def group_by_length(lengths: Sequence[int]) -> Iterator[PaddedGroup]:
    """Divide the sequences of a row into groups of similar length.

    No sequence is shorter than half of the longest of its group. Padding therefore at most doubles
    the tokens, and there are at most log2(longest) + 1 groups.

    Args:
        lengths: The lengths of the sequences in tokens. Empty sequences are in no group.

    Example:
        [1, 4, 3]  ->  index [[1, 2, 3, 4], [5, 6, 7, 0]] and index [[0]]
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    # The longest sequences come first; equal lengths keep the order of the row.
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i))
    begin = 0
    while begin < len(order):
        longest = lengths[order[begin]]
        end = begin
        while end < len(order) and 2 * lengths[order[end]] >= longest:
            end += 1
        members = order[begin:end]
        column = torch.arange(longest)
        real = column < torch.tensor([lengths[i] for i in members])[:, None]
        index = (torch.tensor([starts[i] for i in members])[:, None] + column) * real
        yield PaddedGroup(index, real)
        begin = end

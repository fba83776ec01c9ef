"""The sequences of a packed row as padded batches, for models that cannot keep them apart in one
row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Some sequences of a row, right-padded to the longest of them.

    index: int64 [sequences, longest], where in the row each token is (0 where padded); real: bool,
    the same shape.
    """

    index: Tensor
    real: Tensor


def groups_of_like_length(lengths: Sequence[int]) -> Iterator[Group]:
    """Cut a row of sequences into groups in which none is shorter than half of the longest.

    So padding at most doubles the tokens, and there are at most log2(longest) + 1 groups. Every
    token of the row is in exactly one group, once; sequences of no token are in none.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
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
        yield Group(index, real)
        begin = end

"""The cut of sequences that are longer than a pack, by their lengths alone.

A cut selects ranges of tokens of the sequences. Each treatment is one function in the table `CUTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class SequenceRanges(NamedTuple):
    """Ranges of tokens of sequences, in the order of the sequences.

    Attributes:
        rows: int64 [m]; the index of the sequence of each range.
        starts: int64 [m]; its first token in that sequence.
        lengths: int64 [m]; its number of tokens.
    """

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def whole(cls, lengths: NDArray[np.int64]) -> SequenceRanges:
        """Return the ranges that are whole sequences: int64 [n], their lengths."""
        return cls(np.arange(len(lengths)), np.zeros(len(lengths), np.int64), lengths)

    def select(self, selected: NDArray[np.bool_] | NDArray[np.int64]) -> SequenceRanges:
        """Return some of the ranges, by a boolean or an index of each."""
        return SequenceRanges(*(values[selected] for values in self))


def truncate(lengths: NDArray[np.int64], max_length: int, side: str) -> SequenceRanges:
    """Cut each longer sequence at one end.

    Args:
        lengths: int64 [n].
        max_length: The largest number of tokens.
        side: The end at which a sequence is cut: "right" or "left".
    """
    kept = np.minimum(lengths, max_length)
    starts = lengths - kept if side == "left" else np.zeros_like(kept)
    return SequenceRanges(np.arange(len(lengths)), starts, kept)


def split(lengths: NDArray[np.int64], max_length: int, side: str) -> SequenceRanges:
    """Split longer sequences into ranges of `max_length` tokens and a shorter one.

    The rule is that of `bfd_split` in TRL 1.16. The arguments are those of `truncate`.
    """
    number = np.maximum(1, -(-lengths // max_length))
    # For each range: the index of its sequence, and its first token in that sequence.
    rows = np.repeat(np.arange(len(number)), number)
    first_range = np.repeat(np.cumsum(number) - number, number)
    starts = (np.arange(len(rows)) - first_range) * max_length
    return SequenceRanges(rows, starts, np.minimum(lengths[rows] - starts, max_length))


def drop(lengths: NDArray[np.int64], max_length: int, side: str) -> SequenceRanges:
    """Leave out each longer sequence. The arguments are those of `truncate`."""
    kept = np.flatnonzero(lengths <= max_length)
    return SequenceRanges(kept, np.zeros_like(kept), lengths[kept])


CUTS: dict[str, Callable[[NDArray[np.int64], int, str], SequenceRanges]] = {
    "truncate": truncate,
    "split": split,
    "drop": drop,
}
"""Treatments of longer sequences by name: the values of `overlong` that need only lengths."""

"""Packs as the trainer takes them, from shards or from anything with the same fields."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class PackLike(Protocol):
    """One row of the shards: T tokens in S sequences."""

    @property
    def input_ids(self) -> NDArray[np.int32]:
        """int32 [T]"""
        ...

    @property
    def completion_mask(self) -> NDArray[np.bool_]:
        """bool [T], True = trained"""
        ...

    @property
    def seq_lengths(self) -> NDArray[np.int32]:
        """int32 [S], summing to T"""
        ...


class PackSource(Protocol):
    """Packs by number: what `sftprep.open_shards` gives, and anything shaped like it."""

    def __len__(self) -> int:
        """Number of packs."""
        ...

    def __getitem__(self, index: int, /) -> PackLike:
        """One pack."""
        ...

    def seq_lengths(self, index: int, /) -> NDArray[np.int32]:
        """Lengths of the sequences of one pack, without reading its tokens."""
        ...


def longest_sequence(source: PackSource) -> int:
    """Tokens of the longest sequence in any pack; reads their lengths only."""
    return max(
        (int(source.seq_lengths(index).max(initial=0)) for index in range(len(source))), default=0
    )

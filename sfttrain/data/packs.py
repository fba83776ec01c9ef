"""Packs for the trainer, from shards or from any object with the same fields."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class PackLike(Protocol):
    """One pack: T tokens in S sequences."""

    @property
    def input_ids(self) -> NDArray[np.int32]:
        """Token ids, int32 [T]."""
        ...

    @property
    def completion_mask(self) -> NDArray[np.bool_]:
        """Trained tokens, bool [T]."""
        ...

    @property
    def seq_lengths(self) -> NDArray[np.int32]:
        """Lengths of the sequences in tokens, int32 [S], with the sum T."""
        ...


class PackSource(Protocol):
    """Packs by index, such as the result of `sftprep.open_shards`."""

    def __len__(self) -> int:
        """Return the number of packs."""
        ...

    def __getitem__(self, index: int, /) -> PackLike:
        """Return one pack."""
        ...

    def seq_lengths(self, index: int, /) -> NDArray[np.int32]:
        """Return the lengths of the sequences of one pack, without reading its tokens."""
        ...


def longest_sequence(source: PackSource) -> int:
    """Return the length of the longest sequence in tokens; no token is read."""
    return max(
        (int(source.seq_lengths(index).max(initial=0)) for index in range(len(source))), default=0
    )

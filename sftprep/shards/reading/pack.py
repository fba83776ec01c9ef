"""A pack: several sequences, one after the other."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from sftprep.errors import format_count


@dataclass(frozen=True, slots=True, repr=False)
class Pack:
    """One row of a shard: several sequences, one after the other.

    In a pack of `open_shards`, all arrays are read-only views of the memory-mapped file, except for
    `completion_mask`, which is stored as bits, and for position ids that are not stored.

    `pack["input_ids"]` is a column, as in a row of `datasets`, and `pack[1:3]` is the pack of the
    sequences 1 and 2.

    Example:
        A pack of the sequences [5, 6] and [7]:
        input_ids = [5, 6, 7], position_ids = [0, 1, 0], seq_lengths = [2, 1]
    """

    input_ids: NDArray[np.int32]  # [T], the tokens of all sequences
    position_ids: NDArray[Any]  # uint16 or int32 [T], restarts at 0 with each sequence
    completion_mask: NDArray[np.bool_]  # [T], True = trained
    seq_lengths: NDArray[np.int32]  # [S], sums to T
    origin: NDArray[np.int64]  # [S], slice and line of the record; see `Manifest.locate`
    # [T], weight of each token in the loss, 0 = not trained; None if every trained one weighs 1
    loss_weights: NDArray[np.float32] | None = None
    flags: NDArray[np.uint8] | None = None  # [S], see `schema.py`; None before version 2.0

    def __repr__(self) -> str:
        trained = np.count_nonzero(self.completion_mask)
        return (
            f"Pack({format_count(len(self.input_ids), 'token')}, {trained:,} trained,"
            f" {format_count(len(self.seq_lengths), 'sequence')})"
        )

    @overload
    def __getitem__(self, key: str) -> NDArray[Any]: ...

    @overload
    def __getitem__(self, key: slice) -> Pack: ...

    def __getitem__(self, key: str | slice) -> NDArray[Any] | Pack:
        """Return a column by its name, or a pack of some of the sequences, in their order.

        Raises:
            KeyError: The pack has no such column.
            TypeError: The key is neither a name nor a slice.
            ValueError: The step of the slice is negative.
        """
        if isinstance(key, slice):
            return self._take_sequences(key)
        if not isinstance(key, str):
            raise TypeError(
                f'{key!r} is neither the name of a column, as in pack["input_ids"], nor a slice of'
                " sequences, as in pack[0:1]"
            )
        columns = self.columns()
        if key not in columns:
            raise KeyError(f"this pack has no column {key!r}, but {', '.join(columns)}")
        return columns[key]

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns that the pack has, by their names in shards."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: column for name, column in values.items() if column is not None}

    def _take_sequences(self, key: slice) -> Pack:
        """Return a pack of some sequences, in their order; the arrays are copies."""
        if key.step is not None and key.step < 0:
            raise ValueError("the sequences of a pack cannot be reversed: the step is negative")
        is_taken = np.zeros(len(self.seq_lengths), dtype=np.bool_)
        is_taken[key] = True
        is_token_taken = np.repeat(is_taken, self.seq_lengths)
        return Pack(
            **{
                name: values[is_taken if name in _PER_SEQUENCE else is_token_taken]
                for name, values in self.columns().items()
            }
        )


_PER_SEQUENCE = ("seq_lengths", "origin", "flags")
"""The columns with one value for each sequence; the others have one for each token."""

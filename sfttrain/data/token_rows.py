"""Rows that are tokenized already, as packs: each is trained as it is, nothing is cut, packed or
packed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sftprep.errors import ConfigError


class RowsByNumber(Protocol):
    """A `datasets.Dataset`, or a list."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """One row."""
        ...


@dataclass(frozen=True, slots=True)
class TokenPack:
    """One row; see `sfttrain.data.packs.PackLike`."""

    input_ids: NDArray[np.int32]
    completion_mask: NDArray[np.bool_]
    seq_lengths: NDArray[np.int32]


class TokenRows:
    """Rows with `input_ids`, as a `PackSource`.

    Trained are the tokens that `labels` do not set to -100; without labels, those that
    `completion_mask` and `assistant_masks` both have, where they are there; without any, all.
    `seq_lengths` (or `position_ids` that start anew at 0) say where the sequences of a row begin;
    without them a row is one sequence. Raises ConfigError, when a row is read, for columns that do
    not fit together.
    """

    def __init__(self, rows: RowsByNumber, *, completion_only: bool = True) -> None:
        self._rows, self._completion_only = rows, completion_only

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> TokenPack:
        row = self._rows[int(index)]
        ids = np.asarray(row["input_ids"], dtype=np.int32)
        return TokenPack(ids, self._mask(row, ids, index), self._lengths(row, index))

    def seq_lengths(self, index: int, /) -> NDArray[np.int32]:
        """Lengths of the sequences of one row: int32 [S]."""
        return self._lengths(self._rows[int(index)], index)

    def _mask(
        self, row: Mapping[str, Any], ids: NDArray[np.int32], index: int
    ) -> NDArray[np.bool_]:
        labels = row.get("labels")
        if labels is not None:
            found = np.asarray(labels, dtype=np.int64)
            _check(len(found) == len(ids), index, f"{len(found)} labels for {len(ids)} input_ids")
            trained: NDArray[np.bool_] = found != -100
            _check(
                bool((found[trained] == ids[trained]).all()),
                index,
                "labels that are neither -100 nor the token itself",
            )
            return trained
        mask = np.ones(len(ids), dtype=np.bool_)
        for name in (
            ("completion_mask", "assistant_masks")
            if self._completion_only
            else ("assistant_masks",)
        ):
            marks = row.get(name)
            if marks is not None:
                _check(
                    len(marks) == len(ids), index, f"{len(marks)} {name} for {len(ids)} input_ids"
                )
                mask &= np.asarray(marks, dtype=np.bool_)
        return mask

    def _lengths(self, row: Mapping[str, Any], index: int) -> NDArray[np.int32]:
        tokens = len(row["input_ids"])
        lengths = row.get("seq_lengths")
        if lengths is not None:
            found = np.asarray(lengths, dtype=np.int32)
            _check(
                int(found.sum()) == tokens,
                index,
                f"seq_lengths that sum up to {found.sum()}, and {tokens} input_ids",
            )
            return found
        positions = row.get("position_ids")
        if positions is not None and tokens:
            starts = np.flatnonzero(np.asarray(positions) == 0)
            _check(
                len(positions) == tokens and len(starts) > 0 and starts[0] == 0,
                index,
                "position_ids that do not start at 0",
            )
            return np.diff(starts, append=tokens).astype(np.int32)
        return np.array([tokens], dtype=np.int32)


def holds_tokens(row: Mapping[str, Any]) -> bool:
    """Whether a row is tokenized already."""
    return row.get("input_ids") is not None


def holds_packs(row: Mapping[str, Any]) -> bool:
    """Whether a row is tokenized already, and says where its sequences begin."""
    return holds_tokens(row) and (
        row.get("seq_lengths") is not None or row.get("position_ids") is not None
    )


def _check(fits: bool, index: int, what: str) -> None:
    if not fits:
        raise ConfigError(
            f"row {index} of the dataset has {what}",
            remedy="mend the dataset, or give it untokenized",
        )

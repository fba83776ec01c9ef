"""Tokenized rows as packs.

Each row is trained as it is: it is not truncated and not packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sftprep.errors import ConfigError


class IndexedRows(Protocol):
    """Rows by index: a `datasets.Dataset`, a torch map-style dataset or a list."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return one row."""
        ...


@dataclass(frozen=True, slots=True)
class TokenPack:
    """One row; see `sfttrain.data.packs.PackLike`."""

    input_ids: NDArray[np.int32]
    completion_mask: NDArray[np.bool_]
    seq_lengths: NDArray[np.int32]


class TokenRows:
    """Rows with `input_ids` as a `PackSource`.

    Trained tokens are those with a label other than -100. Without `labels`, they are the tokens
    that are set in both `completion_mask` and `assistant_masks`, as far as the row has these; a row
    without masks is trained completely. The sequences of a row are delimited by `seq_lengths`, or
    by `position_ids` that restart at 0; without these, a row is one sequence.

    Args:
        rows: The rows of the dataset.
        completion_only: Whether `completion_mask` is applied.

    Raises:
        ConfigError: When a row is read whose columns contradict each other.

    Example:
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "seq_lengths": [2, 1]}
        ->  TokenPack([5, 6, 7], [False, True, True], [2, 1])
    """

    def __init__(self, rows: IndexedRows, *, completion_only: bool = True) -> None:
        self._rows, self._completion_only = rows, completion_only

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> TokenPack:
        row = self._rows[int(index)]
        ids = np.asarray(row["input_ids"], dtype=np.int32)
        return TokenPack(ids, self._trained_mask(row, ids, index), self._lengths(row, index))

    def seq_lengths(self, index: int, /) -> NDArray[np.int32]:
        """Return the lengths of the sequences of one row in tokens: int32 [S]."""
        return self._lengths(self._rows[int(index)], index)

    def _trained_mask(
        self, row: Mapping[str, Any], ids: NDArray[np.int32], index: int
    ) -> NDArray[np.bool_]:
        labels = row.get("labels")
        if labels is not None:
            labels = np.asarray(labels, dtype=np.int64)
            _check(len(labels) == len(ids), index, f"{len(labels)} labels for {len(ids)} input_ids")
            trained: NDArray[np.bool_] = labels != -100
            # A pack has a mask and no labels of its own, so other targets would be lost.
            _check(
                bool((labels[trained] == ids[trained]).all()),
                index,
                "labels that are neither -100 nor the token itself",
            )
            return trained
        mask = np.ones(len(ids), dtype=np.bool_)
        attended = row.get("attention_mask")
        if attended is not None:
            # Padding is never trained; TRL 1.16 ignores this column and trains it.
            problem = f"{len(attended)} attention_mask for {len(ids)} input_ids"
            _check(len(attended) == len(ids), index, problem)
            mask &= np.asarray(attended, dtype=np.bool_)
        for name in (
            ("completion_mask", "assistant_masks")
            if self._completion_only
            else ("assistant_masks",)
        ):
            column = row.get(name)
            if column is not None:
                _check(
                    len(column) == len(ids), index, f"{len(column)} {name} for {len(ids)} input_ids"
                )
                mask &= np.asarray(column, dtype=np.bool_)
        return mask

    def _lengths(self, row: Mapping[str, Any], index: int) -> NDArray[np.int32]:
        tokens = len(row["input_ids"])
        lengths = row.get("seq_lengths")
        if lengths is not None:
            lengths_array = np.asarray(lengths, dtype=np.int32)
            _check(
                int(lengths_array.sum()) == tokens,
                index,
                f"seq_lengths that sum up to {lengths_array.sum()}, but {tokens} input_ids",
            )
            return lengths_array
        positions = row.get("position_ids")
        if positions is not None and tokens:
            array = np.asarray(positions)
            starts = np.flatnonzero(array == 0)
            _check(
                len(array) == tokens and len(starts) > 0 and starts[0] == 0,
                index,
                "position_ids that do not start at 0",
            )
            sizes = np.diff(starts, append=tokens)
            counted = np.arange(tokens) - np.repeat(starts, sizes)
            _check(
                np.array_equal(counted, array),
                index,
                "position_ids that do not count up from 0 in each sequence",
            )
            return sizes.astype(np.int32)
        return np.array([tokens], dtype=np.int32)


def has_tokens(row: Mapping[str, Any]) -> bool:
    """Return whether a row is tokenized."""
    return row.get("input_ids") is not None


def has_packed_tokens(row: Mapping[str, Any]) -> bool:
    """Return whether a row is tokenized and delimits its sequences."""
    return has_tokens(row) and (
        row.get("seq_lengths") is not None or row.get("position_ids") is not None
    )


def _check(condition: bool, index: int, problem: str) -> None:
    if not condition:
        raise ConfigError(
            f"row {index} of the dataset has {problem}",
            remedy=["fix the dataset", "pass it untokenized"],
        )

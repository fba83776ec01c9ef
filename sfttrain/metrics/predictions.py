"""Predictions for `compute_metrics`: one row per sequence, from all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import EvalPrediction

from sftprep.errors import ConfigError
from sfttrain.data.batching import RowBatch
from sfttrain.packed.forward import ForwardMode, scored_outputs

Preprocess = Callable[[Tensor, Tensor], Tensor]


def all_logits(model: nn.Module, batch: RowBatch, mode: ForwardMode) -> Tensor:
    """Return the logits of every position of a row, in its order: [1, T, V]."""
    # The target of a position is its own index. It is returned with the logits, which may be in
    # another order.
    positions = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    fully_scored: Any = {**batch, "scored": positions, "targets": positions, "weights": None}
    scored = scored_outputs(model, fully_scored, mode)
    return scored.outputs[scored.targets.argsort()][None]


class Predictions:
    """Collector of a model's predictions, sequence by sequence.

    Args:
        preprocess: `preprocess_logits_for_metrics` of the trainer, which reduces the logits
            [1, T, V] with labels [1, T], for example to their argmax. Without it, all logits are
            kept in memory.
    """

    def __init__(self, preprocess: Preprocess | None) -> None:
        self._preprocess = preprocess
        self._predictions: list[NDArray[Any]] = []  # of each sequence, [length, ...]
        self._labels: list[NDArray[Any]] = []  # of each sequence, [length]

    def add(self, logits: Tensor, labels: Tensor, lengths: tuple[int, ...] | None) -> None:
        """Add the predictions of a batch.

        Args:
            logits: [B, T, V].
            labels: [B, T].
            lengths: The lengths of the sequences of one packed row, B = 1; None if each row of the
                batch is one sequence.

        Raises:
            ConfigError: If the user's function returns another shape.
        """
        predictions = logits if self._preprocess is None else self._preprocess(logits, labels)
        if not isinstance(predictions, Tensor) or predictions.shape[:2] != labels.shape:
            found = (
                tuple(predictions.shape)
                if isinstance(predictions, Tensor)
                else type(predictions).__name__
            )
            raise ConfigError(
                f"preprocess_logits_for_metrics returned {found} for labels of"
                f" {tuple(labels.shape)}",
                remedy=(
                    "return a tensor with the same first two dimensions, such as logits.argmax(-1)"
                ),
            )
        # NumPy has no bfloat16.
        values = (
            (predictions.float() if predictions.is_floating_point() else predictions).cpu().numpy()
        )
        label_values = labels.cpu().numpy()
        if lengths is None:
            self._predictions += list(values)
            self._labels += list(label_values)
            return
        offsets = np.cumsum(lengths)[:-1]
        self._predictions += np.split(values[0], offsets)
        self._labels += np.split(label_values[0], offsets)

    def gather(self, world: int) -> EvalPrediction:
        """Return the predictions of all ranks, padded with -100 to the longest sequence.

        Every rank must call this method. `world` is the number of ranks.
        """
        pairs = [*zip(self._predictions, self._labels, strict=True)]
        if world > 1:
            from accelerate.utils import gather_object

            pairs = gather_object(pairs)
        longest = max((len(labels) for _, labels in pairs), default=0)
        return EvalPrediction(
            predictions=_pad([predictions for predictions, _ in pairs], longest),
            label_ids=_pad([labels for _, labels in pairs], longest),
        )


def _pad(rows: list[NDArray[Any]], longest: int) -> NDArray[Any]:
    """Return rows of different lengths as one array, padded with -100.

    Returns:
        [rows, longest, ...].
    """
    if not rows:
        return np.zeros((0, longest), dtype=np.int64)
    out = np.full((len(rows), longest, *rows[0].shape[1:]), -100, dtype=rows[0].dtype)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out

"""What compute_metrics is given: the predictions of an evaluation set, a row a sequence, gathered
over the ranks."""

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


def all_logits(model: nn.Module, batch: RowBatch, feeding: ForwardMode) -> Tensor:
    """The logits of every position of a row, in the order of the row: [1, T, V]."""
    # The target of a position is its own place: it comes back with the logits, whatever their
    # order.
    places = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    whole: Any = {**batch, "scored": places, "targets": places, "weights": None}
    scored = scored_outputs(model, whole, feeding)
    return scored.outputs[scored.targets.argsort()][None]


class Predictions:
    """Collects what the model predicts, sequence by sequence.

    preprocess: what `preprocess_logits_for_metrics` makes of the logits, [1, T, V] with labels [1,
    T], before they are kept: such as their argmax, without which whole logits are kept in memory.
    """

    def __init__(self, preprocess: Preprocess | None) -> None:
        self._preprocess = preprocess
        self._kept: list[NDArray[Any]] = []
        self._labels: list[NDArray[Any]] = []

    def add(self, logits: Tensor, labels: Tensor, lengths: tuple[int, ...] | None) -> None:
        """Keep the rows of a batch. logits: [B, T, V]; labels: [B, T]; lengths: of the sequences of
        one packed row, B = 1."""
        kept = logits if self._preprocess is None else self._preprocess(logits, labels)
        if not isinstance(kept, Tensor) or kept.shape[:2] != labels.shape:
            found = tuple(kept.shape) if isinstance(kept, Tensor) else type(kept).__name__
            raise ConfigError(
                f"preprocess_logits_for_metrics returned {found} for labels of"
                f" {tuple(labels.shape)}",
                remedy=(
                    "return a tensor with the same first two dimensions, such as logits.argmax(-1)"
                ),
            )
        values = (kept.float() if kept.is_floating_point() else kept).cpu().numpy()
        wanted = labels.cpu().numpy()
        if lengths is None:
            self._kept += list(values)
            self._labels += list(wanted)
            return
        bounds = np.cumsum(lengths)[:-1]
        self._kept += np.split(values[0], bounds)
        self._labels += np.split(wanted[0], bounds)

    def gathered(self, world: int) -> EvalPrediction:
        """All of them, over all ranks, filled up to the longest sequence with -100. Every rank must
        call this."""
        pairs = [*zip(self._kept, self._labels, strict=True)]
        if world > 1:
            from accelerate.utils import gather_object

            pairs = gather_object(pairs)
        longest = max((len(labels) for _, labels in pairs), default=0)
        return EvalPrediction(
            predictions=_filled([kept for kept, _ in pairs], longest),
            label_ids=_filled([labels for _, labels in pairs], longest),
        )


def _filled(rows: list[NDArray[Any]], longest: int) -> NDArray[Any]:
    """Rows of unlike length as one array, with -100 where they end: [rows, longest, ...]."""
    if not rows:
        return np.zeros((0, longest), dtype=np.int64)
    out = np.full((len(rows), longest, *rows[0].shape[1:]), -100, dtype=rows[0].dtype)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out

"""Loss of the batches of a user-provided collator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfttrain.losses.fused_cross_entropy import LossSums, LossType, loss_from_logits


def collated_loss_sums(
    model: nn.Module, batch: Mapping[str, Any], kind: LossType
) -> tuple[LossSums, Tensor]:
    """Run the model on a batch of a collator.

    Args:
        model: The model.
        batch: The arguments of the model, `labels` [B, T], and `total_weight`.
        kind: The kind of loss.

    Returns:
        The sums of the loss, and the logits of all positions, [B, T, V].
    """
    arguments = {
        name: value for name, value in batch.items() if name not in ("labels", "total_weight")
    }
    logits: Tensor = model(**arguments).logits
    # The logits of a position predict the next token.
    targets = batch["labels"][:, 1:]
    valid = targets != -100
    if not bool(valid.any()):
        # One position with the target -100 gives a loss of 0 that still has a gradient.
        valid = torch.zeros_like(valid)
        valid[0, 0] = True
    return loss_from_logits(logits[:, :-1][valid], targets[valid], kind), logits

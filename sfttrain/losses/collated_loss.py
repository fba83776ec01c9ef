"""The loss of batches that a user's own collator makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfttrain.losses.fused_cross_entropy import LossSums, LossType, loss_from_logits


def foreign_sums(
    model: nn.Module, batch: Mapping[str, Any], kind: LossType
) -> tuple[LossSums, Tensor]:
    """Run the model on a batch; the sums of its loss, and the logits of all positions: [B, T,
    V]."""
    arguments = {
        name: value for name, value in batch.items() if name not in ("labels", "total_weight")
    }
    logits: Tensor = model(**arguments).logits
    targets = batch["labels"][:, 1:]
    valid = targets != -100
    if not bool(valid.any()):
        valid = torch.zeros_like(valid)
        valid[0, 0] = True
    return loss_from_logits(logits[:, :-1][valid], targets[valid], kind), logits

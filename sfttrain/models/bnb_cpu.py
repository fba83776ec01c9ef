"""bitsandbytes' 4-bit layers on a CPU, kept able to train."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU able to train after an evaluation; nothing is done to other
    models.

    bitsandbytes (0.50) packs their weights anew at the first forward in eval mode on CPUs with
    AVX512_BF16, for a kernel that has no backward, and uses it from then on: training goes on, with
    no gradients for all that lies below.
    """
    layers: list[Any] = [
        module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")
    ]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # saving unpacks them

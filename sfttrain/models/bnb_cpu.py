"""Training of bitsandbytes' 4-bit layers on a CPU."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU trainable after an evaluation.

    Other models are not changed.

    On CPUs with AVX512_BF16, bitsandbytes (0.50) repacks the weights at the first forward in eval
    mode, for a kernel without a backward, and uses this kernel from then on. Training would
    continue without gradients for all layers below.
    """
    layers: list[Any] = [
        module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")
    ]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # as a side effect, saving restores the original format

"""Auxiliary loss for the balance of experts, captured at the model's output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sftprep.errors import ConfigError, setting
from sfttrain.models.unwrap import unwrap_peft


class ExpertBalance:
    """The model's own auxiliary loss, weighted, as a part of the tokens' loss.

    The mean over the micro-batches of a step is added, as in TRL 1.16.

    Args:
        model: The model. One without experts has no auxiliary loss.
        requested: The weight (router_aux_loss_coef); None for the weight in the model's config.

    Raises:
        ConfigError: If a weight is requested and the model has no such loss.
    """

    def __init__(self, model: nn.Module, requested: float | None) -> None:
        inner = unwrap_peft(model)
        config = inner.config.get_text_config()
        has_router = hasattr(config, "output_router_logits")
        if requested and not has_router:
            raise ConfigError(
                f"{setting('router_aux_loss_coef')} is {requested}, but {type(inner).__name__} has"
                " no experts",
                remedy=f"remove {setting('router_aux_loss_coef')}",
            )
        default = getattr(config, "router_aux_loss_coef", 0.0) or 0.0
        weight = default if requested is None else requested
        self.weight = float(weight) if has_router else 0.0
        self._inner, self._config = inner, config
        # Sum and number of the losses since the last `read`, for the log; on the device.
        self._sum: Tensor | None = None
        self._count = 0

    @contextlib.contextmanager
    def capture(self, training: bool) -> Iterator[list[Tensor]]:
        """Yield a list for the auxiliary losses of forwards in this context.

        Args:
            training: Whether the model is trained; in evaluation, nothing is captured.
        """
        captured: list[Tensor] = []
        if not (self.weight and training):
            yield captured
            return

        def capture_output(_module: nn.Module, _args: Any, output: Any) -> None:
            if getattr(output, "aux_loss", None) is not None:
                captured.append(output.aux_loss)

        hook = self._inner.register_forward_hook(capture_output)
        # The model computes its auxiliary loss only with this setting.
        before, self._config.output_router_logits = self._config.output_router_logits, True
        try:
            yield captured
        finally:
            self._config.output_router_logits = before
            hook.remove()

    def share(self, captured: list[Tensor], micro_batches: int, device: torch.device) -> Tensor:
        """Return the auxiliary term in the loss of one micro-batch.

        Args:
            captured: The auxiliary losses of the forwards of the micro-batch.
            micro_batches: The number of micro-batches in the step.
            device: The device of the result.

        Returns:
            A scalar; 0 if nothing was captured. Ranks average their gradients.
        """
        if not captured:
            return torch.zeros((), device=device)
        mean = torch.stack([loss.float().to(device) for loss in captured]).mean()
        self._sum = mean.detach() if self._sum is None else self._sum + mean.detach()
        self._count += 1
        return self.weight * mean / micro_batches

    def read(self, accelerator: Any) -> dict[str, float]:
        """Return the mean auxiliary loss since the last call over all ranks, for the log.

        The result is empty for a model without experts.
        """
        if self._sum is None:
            return {}
        mean: float = accelerator.reduce(self._sum / self._count, reduction="mean").item()
        self._sum, self._count = None, 0
        return {"aux_loss": mean}

"""The loss that keeps the experts of a mixture equally busy, where a model has one: heard at the
model's own output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sftprep.errors import ConfigError
from sfttrain.models.unwrap import unwrap_peft


class ExpertBalance:
    """Adds the model's own auxiliary loss, weighted, to that of the tokens.

    asked: the weight, or None for that of the model's config; a model without experts has none. The
    mean over the micro-batches of a step is added, as in TRL 1.16. Raises ConfigError where a
    weight is asked for and the model has no such loss.
    """

    def __init__(self, model: nn.Module, asked: float | None) -> None:
        inner = unwrap_peft(model)
        config = inner.config.get_text_config()
        known = hasattr(config, "output_router_logits")
        if asked and not known:
            raise ConfigError(
                f"router_aux_loss_coef is {asked}, and {type(inner).__name__} has no experts whose"
                " use it could balance",
                remedy="leave router_aux_loss_coef out",
            )
        self.weight = (
            float((getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if asked is None else asked)
            if known
            else 0.0
        )
        self._inner, self._config = inner, config
        self._sum: Tensor | None = None
        self._count = 0

    @contextlib.contextmanager
    def listening(self, training: bool) -> Iterator[list[Tensor]]:
        """While this is open, what the model says of its experts in training is put into the
        list."""
        heard: list[Tensor] = []
        if not (self.weight and training):
            yield heard
            return

        def listen(_module: nn.Module, _args: Any, output: Any) -> None:
            if getattr(output, "aux_loss", None) is not None:
                heard.append(output.aux_loss)

        hook = self._inner.register_forward_hook(listen)
        before, self._config.output_router_logits = self._config.output_router_logits, True
        try:
            yield heard
        finally:
            self._config.output_router_logits = before
            hook.remove()

    def share(self, heard: list[Tensor], micro_batches: int, device: torch.device) -> Tensor:
        """What is added to the loss of one micro-batch of a step; ranks take the mean of theirs."""
        if not heard:
            return torch.zeros((), device=device)
        mean = torch.stack([each.float().to(device) for each in heard]).mean()
        self._sum = mean.detach() if self._sum is None else self._sum + mean.detach()
        self._count += 1
        return self.weight * mean / micro_batches

    def read(self, accelerator: Any) -> dict[str, float]:
        """The mean of the auxiliary loss since the last reading, over all ranks, as it is logged;
        nothing without experts."""
        if self._sum is None:
            return {}
        mean: float = accelerator.reduce(self._sum / self._count, reduction="mean").item()
        self._sum, self._count = None, 0
        return {"aux_loss": mean}

"""Stops a run at the step at which its loss, its gradient or its weights are not finite.

A run that goes on would train on NaN, save NaN, and report success.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sftprep.errors import TrainingDiverged

_MOST_ROWS = 10
_CHUNK = 1 << 24
"""Values of a tensor that are checked at once."""
_MOST_SKIPPED = 50
"""Steps in a row that the scaler of fp16 may skip; its scale is below 1e-10 by then."""

_REMEDY = (
    "look at these rows; resume from the newest checkpoint with a lower --learning_rate, or a "
    "longer --warmup_steps"
)


class FiniteGuard:
    """Checks each optimizer step of a trainer, on all ranks together.

    accelerator: accelerate's; locate: the name of the row of a sequence (file:line), by its origin.
    """

    def __init__(self, accelerator: Any, locate: Callable[[int], str]) -> None:
        self._accelerator, self._locate = accelerator, locate
        self._losses: list[tuple[Tensor, Sequence[int]]] = []
        """Loss of each device batch since the last step, and the origins of its sequences."""
        self._last_step, self._last_batches = -1, self._losses
        """The step that was checked last, and its device batches."""
        self._norm: Tensor | float | None = None
        """Of all gradients of the step; None where it is not known, or has been checked."""
        self._scale: float | None = None
        """Of the gradients of the step; None where they are not scaled."""
        self._skipped = 0
        """Steps that the scaler has skipped in a row."""

    def add_batch(self, loss: Tensor, origins: Sequence[int]) -> None:
        """Note the loss of a device batch; does not wait for the device."""
        self._losses.append((loss, origins))

    def check_gradient(self, norm: Tensor | float | None, step: int) -> None:
        """Check the step that is about to be made, before it changes a weight.

        norm: of all gradients; None where it is not known.

        Raises:
            TrainingDiverged: on every rank, if a loss or the norm is not finite on any.
        """
        self._norm = norm
        # Where gradients are scaled, the scaler decides whether to make this step.
        self._scale = self._current_scale()
        if self._scale is None:
            self._check(step)

    def check_step(self, step: int) -> None:
        """Check the step that was made or skipped. Raises as `check_gradient`."""
        scale = self._current_scale()
        # accelerate does not see that a fused optimizer skips a step; the scale always shows it.
        if self._losses and scale is not None and self._scale is not None and scale < self._scale:
            # The gradients overflowed at this scale, which is no fault: the scaler lowers it.
            self._losses, self._norm, self._skipped = [], None, self._skipped + 1
            if self._skipped >= _MOST_SKIPPED:
                raise TrainingDiverged(
                    f"the last {_MOST_SKIPPED} steps were skipped, since their gradients overflow "
                    f"in fp16 (step {step})",
                    remedy="use --bf16, or lower --learning_rate",
                )
            return
        self._skipped = 0
        self._check(step)

    def _current_scale(self) -> float | None:
        scaler = getattr(self._accelerator, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())

    def _check(self, step: int) -> None:
        losses, self._losses = self._losses, []
        norm, self._norm = self._norm, None
        if not losses and norm is None:
            return
        self._last_step, self._last_batches = step, losses
        # One flag for everything, since reading it waits for the device. Where a trainer has a
        # training_step of its own, no losses are known, and the norm shows all.
        device = losses[0][0].device if losses else self._accelerator.device
        finite = [loss.detach().isfinite().all() for loss, _ in losses]
        norm = torch.as_tensor(0.0 if norm is None else norm, device=device)
        bad = (~torch.stack([*finite, norm.isfinite()])).sum()
        if not self._accelerator.reduce(bad, reduction="sum").item():
            return
        culprits = [batch for batch, good in zip(losses, finite, strict=True) if not good.item()]
        if culprits:
            what = f"the loss is {float(culprits[0][0])}"
        elif not norm.isfinite():
            what = f"the gradient norm is {float(norm)}"
        else:
            what = "the loss is not finite in another process"
        rows = self._rows_of(culprits or losses)
        raise TrainingDiverged(
            f"{what} at step {step}{f', trained on {rows}' if rows else ''}", remedy=_REMEDY
        )

    def _rows_of(self, batches: Sequence[tuple[Tensor, Sequence[int]]]) -> str:
        """The rows of these batches on all ranks, for the message; '' if none is known."""
        from accelerate.utils import gather_object

        own = [self._locate(origin) for _, origins in batches for origin in origins if origin >= 0]
        rows = list(dict.fromkeys(gather_object(own)))
        if not rows:
            return ""
        more = f" and {len(rows) - _MOST_ROWS:,} more" if len(rows) > _MOST_ROWS else ""
        return f"{', '.join(rows[:_MOST_ROWS])}{more}"

    def check_weights(self, model: nn.Module, step: int) -> None:
        """Check the trained weights before they are saved in a checkpoint.

        Raises:
            TrainingDiverged: on every rank, if a weight is not finite on any.
        """
        trained = [
            (name, parameter.detach())
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point() and parameter.numel()
        ]
        device = trained[0][1].device if trained else torch.device("cpu")
        bad = torch.zeros((), device=device)
        if trained:
            largest = torch.nn.utils.get_total_norm([p for _, p in trained], math.inf)
            bad += float(not math.isfinite(float(largest)))
        if self._accelerator.reduce(bad, reduction="sum").item():
            self._refuse([n for n, p in trained if not p.isfinite().all()], step)

    def check_all(self, model: nn.Module, step: int) -> None:
        """Check all tensors that are saved with a model, trained or not.

        Those of an adapter are its own and what is trained with it; its base is not saved.

        Raises:
            TrainingDiverged: on every rank, if a tensor is not finite on any.
        """
        names = tensors_not_finite(model, trained_only=hasattr(model, "get_base_model"))
        bad = torch.tensor(float(bool(names)), device=self._accelerator.device)
        if self._accelerator.reduce(bad, reduction="sum").item():
            self._refuse(names, step)

    def _refuse(self, names: list[str], step: int) -> None:
        where = f" ({names[0]}{' and others' if len(names) > 1 else ''})" if names else ""
        rows = self._rows_of(self._last_batches) if step == self._last_step else ""
        raise TrainingDiverged(
            f"weights are not finite after step {step}{where}, so they are not saved"
            + (f"; the step was trained on {rows}" if rows else ""),
            remedy="resume from an older checkpoint with a lower --learning_rate, or a longer"
            " --warmup_steps",
        )


def tensors_not_finite(model: nn.Module, *, trained_only: bool = False) -> list[str]:
    """Return the names of the tensors of a model that would be saved and are not finite.

    Args:
        model: any module.
        trained_only: leave out frozen parameters and buffers.
    """
    found = []
    for prefix, module in model.named_modules():
        tensors: dict[str, Tensor | None] = {
            name: parameter
            for name, parameter in module._parameters.items()
            if parameter is not None and (parameter.requires_grad or not trained_only)
        }
        if not trained_only:
            temporary = module._non_persistent_buffers_set  # they are not saved
            tensors.update((n, b) for n, b in module._buffers.items() if n not in temporary)
        for name, tensor in tensors.items():
            if tensor is not None and not _is_finite(tensor.detach()):
                found.append(f"{prefix}.{name}" if prefix else name)
    return found


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; those of this rank, where a tensor is divided among ranks."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    # In chunks, since the flags of all values would take a quarter of the tensor's memory.
    for chunk in local.reshape(-1).split(_CHUNK):
        values = chunk.float() if chunk.element_size() == 1 else chunk
        if not bool(values.isfinite().all()):
            return False
    return True

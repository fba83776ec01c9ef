"""The check that the loss, the gradient and the weights of a run are finite.

It stops the run at the first step with a NaN or an infinite value. Without it, the run would train
on NaN, save NaN, and report success.

1. Each device batch adds its loss, without waiting for the device.
2. At each optimizer step one flag is computed from the losses and the norm of the gradient, and
   reduced over all ranks: one synchronization per step.
3. Where the flag shows a fault, the weights are inspected, to blame this step or the one before.
4. At each save all tensors that will be written are read once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sftprep.errors import ConfigError, TrainingDiverged, setting

_MOST_ROWS = 10
_CHUNK = 1 << 24
"""The number of values of a tensor that are checked at once."""
_MOST_SKIPPED = 50
"""The successive steps that the scaler of fp16 may skip; its scale is below 1e-10 by then."""

_NEW_RUN_REMEDY = (
    f"start a new run with a lower {setting('learning_rate')} or a longer"
    f" {setting('warmup_steps')}, possibly from the weights of a checkpoint"
    f" ({setting('model', 'OUTPUT_DIR/checkpoint-N')} and another {setting('output_dir')}): a"
    " resumed run keeps the learning rate of its checkpoint"
)
_ROWS_REMEDY = f"look at these rows; {_NEW_RUN_REMEDY}"


class FiniteGuard:
    """Check of each optimizer step of a trainer, on all ranks together.

    Args:
        accelerator: The Accelerator of the trainer.
        locate: Returns the name of the record of a sequence ("file:line"), by its origin.
        model: Returns the model whose weights are inspected after a fault; without it, no step is
            blamed for its update.
    """

    def __init__(
        self,
        accelerator: Any,
        locate: Callable[[int], str],
        model: Callable[[], nn.Module] | None = None,
    ) -> None:
        self._accelerator, self._locate, self._model = accelerator, locate, model
        # Names of tensors that were not finite when training began; they explain no later fault.
        self.bad_before: frozenset[str] = frozenset()
        # The last step after which all saved tensors were finite; None if unknown.
        self.good_step: int | None = None
        # The loss of each device batch since the last step, and the origins of its sequences.
        self._losses: list[tuple[Tensor, Sequence[int]]] = []
        # The step that was checked last, and its device batches.
        self._last_step, self._last_batches = -1, self._losses
        # The norm of all gradients of the step; None where it is not known or has been checked.
        self._norm: Tensor | float | None = None
        # The scale of the gradients of the step; None where they are not scaled.
        self._scale: float | None = None
        # The number of successive steps that the scaler has skipped.
        self._skipped = 0

    def add_batch(self, loss: Tensor, origins: Sequence[int]) -> None:
        """Record the loss of a device batch, without waiting for the device.

        Args:
            loss: The loss, with any number of values.
            origins: The origin of each sequence in the batch; negative where it has none.
        """
        self._losses.append((loss, origins))

    def check_gradient(self, norm: Tensor | float | None, step: int) -> None:
        """Check the coming optimizer step, before it changes a weight.

        Args:
            norm: The norm of all gradients; None where it is not known.
            step: The number of the step, 1-based.

        Raises:
            TrainingDiverged: On every rank, if a loss or the norm is not finite on any of them.
        """
        self._norm = norm
        # Where gradients are scaled, the scaler decides whether this step is made: see check_step.
        self._scale = self._current_scale()
        if self._scale is None:
            self._check(step, updated=False)

    def check_step(self, step: int) -> None:
        """Check the last step, made or skipped; raise the errors of `check_gradient`."""
        scale = self._current_scale()
        # accelerate does not see that a fused optimizer skips a step; the scale always shows it.
        if self._losses and scale is not None and self._scale is not None and scale < self._scale:
            # The gradients overflowed at this scale. That is normal: the scaler lowers the scale.
            self._losses, self._norm, self._skipped = [], None, self._skipped + 1
            if self._skipped >= _MOST_SKIPPED:
                raise TrainingDiverged(
                    f"the last {_MOST_SKIPPED} steps were skipped because their gradients overflow "
                    f"in fp16 (step {step})",
                    remedy=[
                        f"use {setting('bf16', True)}",
                        f"start a new run with a lower {setting('learning_rate')}",
                    ],
                )
            return
        self._skipped = 0
        self._check(step, updated=True)

    def _current_scale(self) -> float | None:
        scaler = getattr(self._accelerator, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())

    def _check(self, step: int, *, updated: bool) -> None:
        """Check the losses and the gradient of a step.

        Args:
            step: The number of the step.
            updated: Whether it has changed the weights already.
        """
        losses, self._losses = self._losses, []
        norm, self._norm = self._norm, None
        if not losses and norm is None:
            return
        before = (self._last_step, self._last_batches)
        self._last_step, self._last_batches = step, losses
        # 1. Compute one flag for everything, because reading a flag waits for the device. Where a
        #    subclass overrides training_step, no losses are known, and the norm decides alone.
        device = losses[0][0].device if losses else self._accelerator.device
        finite = [loss.detach().isfinite().all() for loss, _ in losses]
        norm = torch.as_tensor(0.0 if norm is None else norm, device=device)
        bad = (~torch.stack([*finite, norm.isfinite()])).sum()
        if not self._accelerator.reduce(bad, reduction="sum").item():
            return
        # 2. Raise for the step before, if its update made weights non-finite.
        if not updated:
            self._blame_update(step, *before)
        # 3. Otherwise raise for this step, and name the rows of its non-finite losses.
        culprits = [batch for batch, good in zip(losses, finite, strict=True) if not good.item()]
        if culprits:
            fault = f"the loss is {float(culprits[0][0])}"
        elif not norm.isfinite():
            fault = f"the gradient norm is {float(norm)}"
        else:
            fault = "the loss is not finite in another process"
        rows = self._format_rows(culprits or losses)
        raise TrainingDiverged(
            f"{fault} at step {step}{f', trained on {rows}' if rows else ''}", remedy=_ROWS_REMEDY
        )

    def _blame_update(
        self, step: int, step_before: int, batches: Sequence[tuple[Tensor, Sequence[int]]]
    ) -> None:
        """Raise TrainingDiverged if weights were not finite before a forward pass.

        Args:
            step: The step whose loss or gradient is not finite.
            step_before: The step that was checked before it.
            batches: The device batches of that step.
        """
        if self._model is None:
            return
        names = names_not_finite(all_tensors(self._model()))
        names = [name for name in names if name not in self.bad_before]
        bad = torch.tensor(float(bool(names)), device=self._accelerator.device)
        if not self._accelerator.reduce(bad, reduction="sum").item():
            return
        if step_before != step - 1:
            raise TrainingDiverged(
                f"the weights were not finite before step {step}{format_names(names)}",
                remedy="check the weights that the run starts from",
            )
        rows = self._format_rows(batches)
        # An unused row of an embedding can have been non-finite for many steps.
        known = self.good_step == step_before - 1
        raise TrainingDiverged(
            f"weights became non-finite in step {step_before}{'' if known else ' or before'}"
            f"{format_names(names)}"
            + (f"; the rows of step {step_before}: {rows}" if rows else ""),
            remedy=_ROWS_REMEDY,
        )

    def _format_rows(self, batches: Sequence[tuple[Tensor, Sequence[int]]]) -> str:
        """Return the rows of batches on all ranks, for a message; "" if none is known."""
        from accelerate.utils import gather_object

        local_rows = [
            self._locate(origin) for _, origins in batches for origin in origins if origin >= 0
        ]
        rows = list(dict.fromkeys(gather_object(local_rows)))
        if not rows:
            return ""
        more = f" and {len(rows) - _MOST_ROWS:,} more" if len(rows) > _MOST_ROWS else ""
        return f"{', '.join(rows[:_MOST_ROWS])}{more}"

    def check_saved(self, model: nn.Module, step: int, optimizer: Any | None = None) -> None:
        """Check everything to be saved: the tensors of the model and of the optimizer.

        Frozen tensors are checked at every save as well, because callbacks can change them. The
        check reads each value once, which costs a small part of writing it.

        Args:
            model: The model, or the PeftModel whose adapters are saved.
            step: The optimizer step after which it is saved.
            optimizer: The optimizer that is saved with it; None if none is saved.

        Raises:
            TrainingDiverged: On every rank, if a tensor is not finite on any of them.
        """
        names = names_not_finite(saved_tensors(model))
        states = [] if names or optimizer is None else _states_not_finite(optimizer, model)
        states += [] if names or optimizer is None else _settings_not_finite(optimizer)
        bad = torch.tensor(float(bool(names or states)), device=self._accelerator.device)
        if not self._accelerator.reduce(bad, reduction="sum").item():
            self.good_step = step
            return
        rows = self._format_rows(self._last_batches) if step == self._last_step else ""
        kind = "states of the optimizer" if states else "weights"
        raise TrainingDiverged(
            f"{kind} are not finite after step {step}{format_names(names or states)}, so they are"
            " not saved" + (f"; the step was trained on {rows}" if rows else ""),
            remedy=_NEW_RUN_REMEDY,
        )


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model, without copies.

    Returns:
        The tensors by name.
    """
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        temporary = module._non_persistent_buffers_set  # they are not saved
        buffers = {n: b for n, b in module._buffers.items() if n not in temporary}
        for name, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                found[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    return found


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in a save of a model, by name, without copies.

    For a PeftModel these are the tensors of all its adapters, including frozen adapters and saved
    embeddings, and all trained parameters.
    """
    tensors = all_tensors(model)
    adapters = getattr(model, "peft_config", None)
    if not hasattr(model, "get_base_model") or not adapters:
        return tensors
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    found = {name: tensor for name, tensor in tensors.items() if name in trained}
    for adapter in adapters:
        found.update(adapter_tensors(model, adapter, tensors))
    return found


def adapter_tensors(
    model: Any, adapter: str, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors in peft's file of an adapter, by name.

    Args:
        model: The PeftModel.
        adapter: The name of the adapter.
        tensors: The result of `all_tensors(model)`, if it is already known.
    """
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft repeats them when the adapter is saved
        found: dict[str, Tensor] = get_peft_model_state_dict(
            model, dict(tensors or all_tensors(model)), adapter_name=adapter
        )
    return found


def names_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors with a NaN or an infinite value."""
    finite_keys: set[tuple[Any, ...]] = set()  # a tensor with several names is read once
    found = []
    for name, tensor in tensors.items():
        key = _storage_key(tensor)
        if key in finite_keys:
            continue
        if _is_finite(tensor):
            finite_keys.add(key)
        else:
            found.append(name)
    return found


def format_names(names: Sequence[str]) -> str:
    """Return the first of some names in brackets, for a message; "" for no names."""
    return f" ({names[0]}{' and others' if len(names) > 1 else ''})" if names else ""


def reject_not_finite(model: nn.Module) -> None:
    """Refuse a model with non-finite weights.

    Raises:
        ConfigError: A tensor is not finite; the message names it.
    """
    if names := names_not_finite(all_tensors(model)):
        raise ConfigError(
            f"the model has non-finite weights: {names[0]}"
            f" ({f'and {len(names) - 1:,} more' if names[1:] else 'NaN or infinite values'})",
            remedy="check the model's files: they were probably saved after training diverged",
        )


def _states_not_finite(optimizer: Any, model: nn.Module) -> list[str]:
    """Return the names of the non-finite states of an optimizer.

    Example:
        "exp_avg of NAME"
    """
    states = getattr(optimizer, "state", None)
    if not isinstance(states, Mapping):
        return []  # the optimizer of a library that keeps its states elsewhere
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return names_not_finite(
        {
            f"{key} of {names.get(id(parameter), f'parameter {number}')}": value
            for number, (parameter, values) in enumerate(states.items())
            if isinstance(values, Mapping)
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
    )


def _settings_not_finite(optimizer: Any) -> list[str]:
    """Return the names of the non-finite settings of an optimizer.

    Example:
        "lr of group 0"
    """
    groups = getattr(optimizer, "param_groups", None)
    return [
        f"{key} of group {number}"
        for number, group in enumerate(groups or ())
        for key, value in group.items()
        if key != "params" and not _is_valid_setting(key, value)
    ]


def _is_valid_setting(key: str, value: Any) -> bool:
    """Return whether a setting of an optimizer can be saved.

    Infinity is a valid limit in some optimizers, but not a valid learning rate.
    """
    if isinstance(value, (list, tuple)):
        return all(_is_valid_setting(key, part) for part in value)
    if isinstance(value, Tensor):
        return _is_finite(value)
    if not isinstance(value, float):
        return True
    return math.isfinite(value) if key in ("lr", "initial_lr") else not math.isnan(value)


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key for the memory of a tensor.

    It is equal for two names of the same tensor.
    """
    if type(tensor) is not Tensor:  # a DTensor, or a library's own class
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; of a DTensor, those of this rank."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return True
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    # In chunks, because the flags of all values would take a quarter of the tensor's memory.
    for chunk in local.reshape(-1).split(_CHUNK):
        values = chunk.float() if chunk.element_size() == 1 else chunk
        # A sum is many times faster than a flag per value, and is non-finite if any value is. But
        # it can overflow although all values are finite, so only a finite sum is conclusive.
        kind = torch.float32 if values.element_size() == 2 else None
        if not bool(values.sum(dtype=kind).isfinite()) and not bool(values.isfinite().all()):
            return False
    return True

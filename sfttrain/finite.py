"""Stops a run at the step at which its loss, its gradient or its weights are not finite.

A run that goes on would train on NaN, save NaN, and report success.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sftprep.errors import ConfigError, TrainingDiverged

_MOST_ROWS = 10
_CHUNK = 1 << 24
"""Values of a tensor that are checked at once."""
_MOST_SKIPPED = 50
"""Steps in a row that the scaler of fp16 may skip; its scale is below 1e-10 by then."""

_START_ANEW = (
    "start a new run with a lower --learning_rate or a longer --warmup_steps, if you like from the"
    " weights of a checkpoint (--model OUTPUT_DIR/checkpoint-N and another --output_dir): a resumed"
    " run keeps the learning rate of its checkpoint"
)
_REMEDY = f"look at these rows; {_START_ANEW}"


class FiniteGuard:
    """Checks each optimizer step of a trainer, on all ranks together.

    accelerator: accelerate's; locate: the name of the row of a sequence (file:line), by its origin;
    model: gives the model whose weights are looked at where a fault is found.
    """

    def __init__(
        self,
        accelerator: Any,
        locate: Callable[[int], str],
        model: Callable[[], nn.Module] | None = None,
    ) -> None:
        self._accelerator, self._locate, self._model = accelerator, locate, model
        self.bad_before: frozenset[str] = frozenset()
        """Tensors that were not finite when training began, and so explain no later fault."""
        self.good_step: int | None = None
        """The last step after which all saved tensors were found to be finite; None if unknown."""
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
            self._check(step, updated=False)

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
                    remedy="use --bf16, or start a new run with a lower --learning_rate",
                )
            return
        self._skipped = 0
        self._check(step, updated=True)

    def _current_scale(self) -> float | None:
        scaler = getattr(self._accelerator, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())

    def _check(self, step: int, *, updated: bool) -> None:
        """Check losses and gradient of a step; updated: whether it has changed the weights yet."""
        losses, self._losses = self._losses, []
        norm, self._norm = self._norm, None
        if not losses and norm is None:
            return
        before = (self._last_step, self._last_batches)
        self._last_step, self._last_batches = step, losses
        # One flag for everything, since reading it waits for the device. Where a trainer has a
        # training_step of its own, no losses are known, and the norm shows all.
        device = losses[0][0].device if losses else self._accelerator.device
        finite = [loss.detach().isfinite().all() for loss, _ in losses]
        norm = torch.as_tensor(0.0 if norm is None else norm, device=device)
        bad = (~torch.stack([*finite, norm.isfinite()])).sum()
        if not self._accelerator.reduce(bad, reduction="sum").item():
            return
        if not updated:
            self._blame_update(step, *before)
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

    def _blame_update(
        self, step: int, step_before: int, batches: Sequence[tuple[Tensor, Sequence[int]]]
    ) -> None:
        """Raise TrainingDiverged where weights were not finite before the forward of a step.

        step_before, batches: the step that was checked before it, and its device batches.
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
                f"the weights were not finite before step {step}{listed(names)}",
                remedy="check the weights that the run starts from",
            )
        rows = self._rows_of(batches)
        # A row of an embedding that is not used may have been bad for long.
        known = self.good_step == step_before - 1
        raise TrainingDiverged(
            f"weights became non-finite in step {step_before}{'' if known else ' or before'}"
            f"{listed(names)}" + (f"; the rows of step {step_before}: {rows}" if rows else ""),
            remedy=_REMEDY,
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

    def check_saved(self, model: nn.Module, step: int, optimizer: Any | None = None) -> None:
        """Check all that is about to be saved: the tensors of the model, and of the optimizer.

        Frozen tensors are checked at every save as well, since callbacks can change them: the check
        reads each value once, which costs a small part of writing it.

        Args:
            model: the model, or PeftModel of which the adapters are saved.
            step: the optimizer step after which it is saved.
            optimizer: what is saved with it; None where no optimizer is saved.

        Raises:
            TrainingDiverged: on every rank, if a tensor is not finite on any.
        """
        names = names_not_finite(saved_tensors(model))
        states = [] if names or optimizer is None else _states_not_finite(optimizer, model)
        states += [] if names or optimizer is None else _settings_not_finite(optimizer)
        bad = torch.tensor(float(bool(names or states)), device=self._accelerator.device)
        if not self._accelerator.reduce(bad, reduction="sum").item():
            self.good_step = step
            return
        rows = self._rows_of(self._last_batches) if step == self._last_step else ""
        what = "states of the optimizer" if states else "weights"
        raise TrainingDiverged(
            f"{what} are not finite after step {step}{listed(names or states)}, so they are not"
            " saved" + (f"; the step was trained on {rows}" if rows else ""),
            remedy=_START_ANEW,
        )


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model by name, without copies."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        temporary = module._non_persistent_buffers_set  # they are not saved
        buffers = {n: b for n, b in module._buffers.items() if n not in temporary}
        for name, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                found[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    return found


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a save of a model writes, by name, without copies.

    Of a PeftModel they are those of all its adapters, which may include frozen ones and an
    embedding, and everything that is trained.
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
    """Return what peft saves for an adapter, by the names in its file.

    tensors: those of the model, where they are at hand.
    """
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come once more when the adapter is saved
        found: dict[str, Tensor] = get_peft_model_state_dict(
            model, dict(tensors or all_tensors(model)), adapter_name=adapter
        )
    return found


def names_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that have a value that is not finite."""
    good: set[tuple[Any, ...]] = set()  # a tensor may have several names, and is read once
    found = []
    for name, tensor in tensors.items():
        key = _place(tensor)
        if key in good:
            continue
        if _is_finite(tensor):
            good.add(key)
        else:
            found.append(name)
    return found


def listed(names: Sequence[str]) -> str:
    """Return the first of some names for a message, in brackets; '' for none."""
    return f" ({names[0]}{' and others' if len(names) > 1 else ''})" if names else ""


def reject_not_finite(model: nn.Module) -> None:
    """Refuse a model that was loaded with weights that are not finite.

    Raises:
        ConfigError: with the name of such a tensor.
    """
    if names := names_not_finite(all_tensors(model)):
        raise ConfigError(
            f"the model has non-finite weights: {names[0]}"
            f" ({f'and {len(names) - 1:,} more' if names[1:] else 'NaN or infinite values'})",
            remedy="check the file of the model; it was probably saved after training diverged",
        )


def _states_not_finite(optimizer: Any, model: nn.Module) -> list[str]:
    """Names of the states of an optimizer that are not finite: exp_avg of NAME."""
    states = getattr(optimizer, "state", None)
    if not isinstance(states, Mapping):
        return []  # of a library that keeps its states elsewhere
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
    """Names of the numbers in the groups of an optimizer that are not finite: lr of group 0."""
    groups = getattr(optimizer, "param_groups", None)
    return [
        f"{key} of group {number}"
        for number, group in enumerate(groups or ())
        for key, value in group.items()
        if key != "params" and not _is_number_fine(key, value)
    ]


def _is_number_fine(key: str, value: Any) -> bool:
    """Whether a setting of an optimizer can be saved; infinity is a limit in some, but no rate."""
    if isinstance(value, (list, tuple)):
        return all(_is_number_fine(key, part) for part in value)
    if isinstance(value, Tensor):
        return _is_finite(value)
    if not isinstance(value, float):
        return True
    return math.isfinite(value) if key in ("lr", "initial_lr") else not math.isnan(value)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where the values are: the same for two names of one tensor."""
    if type(tensor) is not Tensor:  # divided among ranks, or of a library
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; those of this rank, where a tensor is divided among ranks."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return True
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    # In chunks, since the flags of all values would take a quarter of the tensor's memory.
    for chunk in local.reshape(-1).split(_CHUNK):
        values = chunk.float() if chunk.element_size() == 1 else chunk
        # A sum is many times faster than flags of all values, and not finite if a value is not.
        # It may overflow where all values are finite, so only a finite one decides.
        kind = torch.float32 if values.element_size() == 2 else None
        if not bool(values.sum(dtype=kind).isfinite()) and not bool(values.isfinite().all()):
            return False
    return True

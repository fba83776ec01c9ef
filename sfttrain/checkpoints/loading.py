"""Loading from a checkpoint: expected tensors, converted weights, typed errors."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sftprep.errors import ConfigError, MismatchError, setting
from sfttrain.checkpoints.contents import ExpectedTensors
from sfttrain.finite import adapter_tensors, all_tensors


def has_adapter(model: Any) -> bool:
    """Return whether a model is a PeftModel."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def expected_tensors(model: Any) -> ExpectedTensors | None:
    """Return the tensors in a saved file of a model or adapter; None if unknown."""
    adapter = str(getattr(model, "active_adapters", [""])[0]) if has_adapter(model) else ""
    if adapter:
        return ExpectedTensors(shapes=_to_shapes(adapter_tensors(model, adapter)), adapter=adapter)
    saved = _to_saved_tensors(model, all_tensors(model))
    if saved is None:
        return None
    return ExpectedTensors(shapes=_to_shapes(saved), optional=frozenset(_find_tied_names(model)))


def load_converted_weights(folder: str, model: Any) -> None:
    """Load weights with other names in the file than in the model, such as experts.

    Trainer loads the tensors by their names and would leave these as they were.
    """
    tensors = all_tensors(model)
    saved = _to_saved_tensors(model, tensors)
    if saved is None or saved.keys() == tensors.keys():
        return
    loaded = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())


@contextlib.contextmanager
def mismatch_errors(checkpoint: str | None, state_name: str) -> Iterator[None]:
    """Convert the errors of torch, peft and transformers on files of another run.

    Args:
        checkpoint: The folder, for the message.
        state_name: The name of the loaded state, for the message.

    Raises:
        MismatchError: The block raised one of these errors.
    """
    try:
        yield
    except (
        KeyError,
        ValueError,
        RuntimeError,
        TypeError,
        AttributeError,
        IndexError,
        pickle.UnpicklingError,
    ) as error:
        if isinstance(error, torch.OutOfMemoryError):  # a RuntimeError with another cause
            raise
        detail = " ".join(str(error).split())[:300]
        verb = "does" if state_name == "scaler" else "do"
        raise MismatchError(
            f"the {state_name} of {checkpoint} {verb} not fit this run:"
            f" {type(error).__name__}: {detail}",
            remedy="resume with the model and the settings of the checkpoint, or from another one",
        ) from error


def best_checkpoint_error(folder: Path, fault: str) -> ConfigError:
    """Return the error for a best checkpoint with other files than the saved ones."""
    latest = setting("resume_from_checkpoint", "latest")
    return ConfigError(
        f"the best checkpoint, {folder}, is not complete: {fault}; no final model is saved",
        remedy=f"to keep the last weights, resume with {latest} and without"
        f" {setting('load_best_model_at_end')}",
    )


def _to_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _find_tied_names(model: nn.Module) -> set[str]:
    """Return the names of parameters with several names.

    A file has only one of these names.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def _to_saved_tensors(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors by their names in a saved file, without values.

    The result is None if the names are unknown.

    transformers renames and splits some tensors, such as experts, when it saves a model.
    """
    without_values = {name: tensor.to("meta") for name, tensor in tensors.items()}
    try:
        from transformers.core_model_loading import revert_weight_conversion

        saved: dict[str, Tensor] = revert_weight_conversion(model, without_values)
    except Exception:  # the function is not documented; without it, the check is skipped
        return None
    return saved

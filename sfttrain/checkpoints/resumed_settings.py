"""The settings of the optimizer and the schedule after a resume.

A resume restores the state of the optimizer, which includes its learning rate, weight decay and so
on: the values of the checkpoint apply, whatever this run specifies. The shape of the schedule is
not part of that state, so the shape that this run specifies applies, starting at the learning rate
of the checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from sftprep.errors import MismatchError, setting

_SCHEDULE_SETTINGS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
_NAMES = {
    "initial_lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
}
"""The setting behind a key of a parameter group, where the names differ."""
_NOT_SETTINGS = {"params", "param_names", "lr", "step", "foreach", "fused", "capturable"}
"""Keys of a parameter group that change during training or only affect how it is computed."""
_KIND_KEYS = {"betas", "momentum", "nesterov", "scale_parameter", "alpha", "rho", "lr_decay"}
"""Keys that distinguish kinds of optimizers in checkpoints of older versions."""

logger = logging.getLogger(__name__)


def settings_to_record(args: Any, optimizer: Any) -> dict[str, Any]:
    """Return the settings for a checkpoint, in addition to the optimizer's state.

    Args:
        args: The SFTConfig.
        optimizer: The optimizer of torch, or accelerate's wrapper of it.
    """
    values = {name: getattr(args, name, None) for name in _SCHEDULE_SETTINGS}
    values["optim"] = args.optim
    values["optimizer"] = _optimizer_kind(optimizer)
    # The round trip makes them equal to values read from a file: enumerations become strings.
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def reject_other_optimizer(
    recorded: Mapping[str, Any], saved: Any, args: Any, optimizer: Any, folder: str
) -> None:
    """Refuse to load the state of one kind of optimizer into another.

    Args:
        recorded: The settings that the checkpoint records; empty in older versions.
        saved: The content of its optimizer.pt; None if it was not read.
        args: The SFTConfig of this run.
        optimizer: The optimizer of this run.
        folder: The checkpoint.

    Raises:
        MismatchError: The kinds differ.
    """
    before, now = recorded.get("optimizer"), _optimizer_kind(optimizer)
    differs = before is not None and before != now
    if before is None and isinstance(saved, Mapping) and saved.get("param_groups"):
        keys = _KIND_KEYS & saved["param_groups"][0].keys()
        differs = keys != _KIND_KEYS & optimizer.param_groups[0].keys()
    if differs:
        optim = recorded.get("optim")
        earlier = setting("optim", optim) if optim else "another optimizer"
        name = getattr(args.optim, "value", args.optim)
        raise MismatchError(
            f"{folder} was trained with {earlier}, but this run has {setting('optim', name)}:"
            " the state of one does not fit the other",
            remedy=[
                f"use the {setting('optim')} of the checkpoint",
                f"start a new run from its weights: {setting('model', folder)}",
            ],
        )


def list_group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """Return the settings in each parameter group of an optimizer."""
    return [
        {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
        for group in optimizer.param_groups
    ]


def warn_of_changes(
    recorded: Mapping[str, Any], args: Any, configured: list[dict[str, Any]], optimizer: Any
) -> None:
    """Log the settings different from the checkpoint's, and the applied ones.

    Args:
        recorded: The settings that the checkpoint records; empty in older versions.
        args: The SFTConfig of this run.
        configured: The `list_group_settings` of the optimizer before the checkpoint was loaded.
        optimizer: The optimizer after the checkpoint was loaded.
    """
    restored: dict[str, tuple[Any, Any]] = {}
    for specified, loaded in zip(configured, list_group_settings(optimizer), strict=False):
        for key in specified.keys() & loaded.keys():
            if _to_comparable(specified[key]) != _to_comparable(loaded[key]):
                restored.setdefault(_NAMES.get(key, key), (loaded[key], specified[key]))
    if restored:
        changes = ", ".join(
            f"{name} is {saved}, not {specified}"
            for name, (saved, specified) in sorted(restored.items())
        )
        logger.warning(
            "the optimizer continues with the settings of the checkpoint: %s as specified for this "
            "run; to change them, start a new run from its weights",
            changes,
        )
    now = settings_to_record(args, optimizer)
    shapes = [
        f"{name} is {now[name]}, was {recorded[name]}"
        for name in _SCHEDULE_SETTINGS
        if name in recorded and recorded[name] != now[name]
    ]
    if shapes:
        logger.warning(
            "the learning rate schedule continues as specified for this run, not as in the "
            "checkpoint: %s",
            ", ".join(shapes),
        )


def _optimizer_kind(optimizer: Any) -> str:
    """Return the package and class of an optimizer, inside accelerate's wrapper."""
    kind = type(getattr(optimizer, "optimizer", optimizer))
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _to_comparable(value: Any) -> Any:
    if hasattr(value, "tolist"):  # a learning rate may be a tensor
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value

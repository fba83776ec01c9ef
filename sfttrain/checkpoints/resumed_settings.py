"""Which settings of optimizer and schedule are in force after a resume.

A resume restores the state of the optimizer, and the learning rate, weight decay and so on are part
of it: those of the checkpoint stay in force, whatever is set now. The shape of the schedule is
not part of the state, so that of this run is in force, from the learning rate of the checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from sftprep.errors import MismatchError

_OF_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
_NAMES = {
    "initial_lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
}
"""Settings by what optimizers call them, where they differ."""
_NOT_SETTINGS = {"params", "param_names", "lr", "step", "foreach", "fused", "capturable"}
"""Keys of a parameter group that change while it is trained, or only how it is computed."""
_OF_KINDS = {"betas", "momentum", "nesterov", "scale_parameter", "alpha", "rho", "lr_decay"}
"""Keys by which kinds of optimizers are told apart in checkpoints of older versions."""

logger = logging.getLogger(__name__)


def settings_to_record(args: Any, optimizer: Any) -> dict[str, Any]:
    """Return the settings that a checkpoint records: what the state of the optimizer does not say.

    Args:
        args: the SFTConfig.
        optimizer: torch's, or accelerate's around it.
    """
    values = {name: getattr(args, name, None) for name in _OF_SCHEDULE}
    values["optim"] = args.optim
    values["optimizer"] = _kind_of(optimizer)
    # As they come back from the file: enumerations are strings there.
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def reject_other_optimizer(
    recorded: Mapping[str, Any], saved: Any, args: Any, optimizer: Any, folder: str
) -> None:
    """Refuse to load the state of one kind of optimizer into another.

    Args:
        recorded: settings of the checkpoint; empty in older versions.
        saved: content of its optimizer.pt; None where it has none.
        args: the SFTConfig of this run.
        optimizer: the optimizer of this run.
        folder: the checkpoint.

    Raises:
        MismatchError: the kinds differ.
    """
    before, now = recorded.get("optimizer"), _kind_of(optimizer)
    differs = before is not None and before != now
    if before is None and isinstance(saved, Mapping) and saved.get("param_groups"):
        keys = _OF_KINDS & saved["param_groups"][0].keys()
        differs = keys != _OF_KINDS & optimizer.param_groups[0].keys()
    if differs:
        was = f"--optim {recorded['optim']}" if recorded.get("optim") else "another optimizer"
        name = getattr(args.optim, "value", args.optim)
        raise MismatchError(
            f"{folder} was trained with {was}, and this run has --optim {name}:"
            " their states do not fit",
            remedy=f"give the --optim of the checkpoint, or start a new run from its weights:"
            f" --model {folder}",
        )


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return the settings of each parameter group of an optimizer."""
    return [
        {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
        for group in optimizer.param_groups
    ]


def warn_of_changes(
    recorded: Mapping[str, Any], args: Any, wanted: list[dict[str, Any]], optimizer: Any
) -> None:
    """Log which settings differ from those of the checkpoint, and which are in force.

    Args:
        recorded: settings of the checkpoint; empty in older versions.
        args: the SFTConfig of this run.
        wanted: `groups_of` the optimizer before the state of the checkpoint was loaded.
        optimizer: the optimizer, with that state.
    """
    restored: dict[str, tuple[Any, Any]] = {}
    for own, loaded in zip(wanted, groups_of(optimizer), strict=False):
        for key in own.keys() & loaded.keys():
            if _comparable(own[key]) != _comparable(loaded[key]):
                restored.setdefault(_NAMES.get(key, key), (loaded[key], own[key]))
    if restored:
        changes = ", ".join(
            f"{name} is {was}, not {now}" for name, (was, now) in sorted(restored.items())
        )
        logger.warning(
            "the optimizer goes on as it was saved in the checkpoint: %s as set for this run; to "
            "change that, start a new run from its weights",
            changes,
        )
    now = settings_to_record(args, optimizer)
    shapes = [
        f"{name} is {now[name]}, was {recorded[name]}"
        for name in _OF_SCHEDULE
        if name in recorded and recorded[name] != now[name]
    ]
    if shapes:
        logger.warning(
            "the schedule of the learning rate goes on as set for this run, not as in the "
            "checkpoint: %s",
            ", ".join(shapes),
        )


def _kind_of(optimizer: Any) -> str:
    """Package and class of an optimizer, below accelerate's."""
    kind = type(getattr(optimizer, "optimizer", optimizer))
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _comparable(value: Any) -> Any:
    if hasattr(value, "tolist"):  # a learning rate may be a tensor
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value

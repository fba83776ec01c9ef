"""Settings that TRL or Trainer know and that are not done here: refused by name, each with what to
do instead."""

from __future__ import annotations

import importlib.util
import json
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sftprep.errors import ConfigError, MissingDependency


@dataclass(frozen=True)
class Refusal:
    """One setting. holds: whether a value of it is fine."""

    name: str
    holds: Callable[[Any], bool]
    why: str
    remedy: str


def _off(value: Any) -> bool:
    return not value


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "label_smoothing_factor",
        _off,
        "label smoothing is not done here",
        "leave label_smoothing_factor at 0",
    ),
    Refusal(
        "auto_find_batch_size",
        _off,
        "auto_find_batch_size changes which packs a step trains on",
        "set --per_device_train_batch_size yourself",
    ),
    Refusal(
        "train_sampling_strategy",
        lambda value: value in ("random", "sequential"),
        "train_sampling_strategy orders rows by length to save padding, and rows are never padded"
        " here",
        "choose random or sequential; packing=True fills the rows",
    ),
    Refusal(
        "batch_eval_metrics",
        _off,
        "compute_metrics gets a whole evaluation set, not its batches",
        "leave batch_eval_metrics out",
    ),
    Refusal(
        "include_for_metrics",
        _off,
        "compute_metrics gets predictions and labels only",
        "leave include_for_metrics out",
    ),
    Refusal(
        "eval_do_concat_batches",
        bool,
        "predictions come back as one array, a row a sequence",
        "leave eval_do_concat_batches at True",
    ),
    Refusal(
        "fp16_full_eval",
        _off,
        "evaluation has the precision of training",
        "leave fp16_full_eval out",
    ),
    Refusal(
        "bf16_full_eval",
        _off,
        "evaluation has the precision of training",
        "leave bf16_full_eval out",
    ),
    Refusal(
        "use_cache",
        _off,
        "a cache of keys would hide the bounds of packed sequences",
        "leave use_cache out",
    ),
    Refusal(
        "label_names",
        lambda value: value in (None, ["labels"]),
        "the labels of packs are called labels",
        "leave label_names out",
    ),
)
"""Add a setting here when it is known elsewhere and means nothing, or something else, here."""

CHOICES: dict[str, tuple[str, ...]] = {
    "loss_impl": ("auto", "logits", "fused"),
    "loss_type": ("nll", "dft"),
    "truncation_mode": ("keep_start", "keep_end"),
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "on_bad_record": ("error", "quarantine"),
}

_SYNONYMS = {"chunked_nll": "nll", "bfd-requeue": "bfd_split", "ffd": "bfd"}
"""Values of TRL's that mean the same: ffd (first fit) was replaced by best fit in TRL itself."""


MINIMUMS: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "ddp_timeout": 1,
}
"""The least that a setting may be; None is fine where a field has it."""


def check_numbers(config: Any) -> None:
    """Raise ConfigError for a text where a number or a switch is to be, and for a number that is
    too small or not whole."""
    kinds = typing.get_type_hints(type(config))
    for name, kind in kinds.items():
        allowed = {kind, *typing.get_args(kind)}
        value = getattr(config, name, None)
        if isinstance(value, str) and allowed & {int, float, bool} and str not in allowed:
            number = f"a number: {name}={value} (2e-4 is a text in YAML, 2.0e-4 is not)"
            raise ConfigError(
                f"{name} is {value!r}, a text",
                remedy=f"write {'True or False' if bool in allowed else number}",
            )
        if (
            isinstance(value, float)
            and int in allowed
            and float not in allowed
            and not value.is_integer()
        ):
            raise ConfigError(f"{name} is {value}", remedy="give a whole number")
        if isinstance(value, float) and not math.isfinite(value) and name not in MINIMUMS:
            raise ConfigError(f"{name} is {value}", remedy="give a finite number")
    if bad := next(_not_finite(config.lr_scheduler_kwargs), None):
        raise ConfigError(
            f"lr_scheduler_kwargs: {bad[0]} is {bad[1]}", remedy="give a finite number"
        )
    for name, least in MINIMUMS.items():
        value = getattr(config, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise ConfigError(f"{name} is {value}", remedy=f"give a number from {least} on")


def _not_finite(values: Any, name: str = "it") -> Iterator[tuple[str, float]]:
    """The numbers in a nested setting that are not finite, with the key each of them is below."""
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except ValueError:
            return  # text, or refused later on
    if isinstance(values, float) and not math.isfinite(values):
        yield name, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _not_finite(value, str(key))
    elif isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            yield from _not_finite(value, name)


def check_choices(config: Any) -> None:
    """Settle synonyms, and raise ConfigError for values that are none of those to choose from."""
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        value = _SYNONYMS.get(value, value)
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}", remedy=f"choose one of: {', '.join(choices)}")
        setattr(config, name, value)
    if not set(config.allow_mismatch or ()) <= {"tokenizer", "length"}:
        raise ConfigError(
            f"allow_mismatch is {config.allow_mismatch}", remedy="choose from: tokenizer, length"
        )
    config.pad_to_multiple_of = _multiple(config.pad_to_multiple_of)
    if isinstance(config.max_length, str) or (
        config.max_length is not None and config.max_length < 2
    ):
        raise ConfigError(
            f"max_length is {config.max_length}",
            remedy="give a number of tokens from 2 on, or None",
        )
    if config.packing and config.max_length is None:
        raise ConfigError(
            "packing needs to know how long a row is, and max_length is None",
            remedy="give max_length",
        )


def reject_unsupported(config: Any) -> None:
    """Raise ConfigError for a setting that is not done here, MissingDependency for one that needs a
    package."""
    for refusal in REFUSALS:
        value = getattr(config, refusal.name)
        if not refusal.holds(value):
            raise ConfigError(f"{refusal.name} is {value!r}: {refusal.why}", remedy=refusal.remedy)
    checkpointing = (
        getattr(config, "activation_checkpointing_kwargs", None)
        or config.gradient_checkpointing_kwargs
    )
    if isinstance(checkpointing, dict) and checkpointing.get("selective"):
        raise ConfigError(
            "gradient_checkpointing_kwargs: selective is TRL's own, and not done here",
            remedy="leave selective out: all layers are recomputed",
        )
    accelerator = config.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if (
            accelerator.get(name)
            if isinstance(accelerator, dict)
            else getattr(accelerator, name, None)
        ) is True:
            raise ConfigError(
                f"accelerator_config: {name} would share rows out once more",
                remedy=f"leave {name} out: each rank has its own",
            )
    if config.use_liger_kernel:
        _refuse_liger_without_gpu(config)


def _refuse_liger_without_gpu(config: Any) -> None:
    """Liger's kernels are Triton's: they need a GPU. Only those of layers are used; the loss of
    packed rows is ours."""
    if not torch.cuda.is_available() or config.use_cpu:
        raise ConfigError(
            "use_liger_kernel needs a GPU with Triton, and there is none",
            remedy="leave it out: loss_impl='fused' saves the same memory on every device",
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise MissingDependency("liger-kernel", extra="liger", needed_for="use_liger_kernel")
    asked = dict(config.liger_kernel_config or {})
    for name in ("fused_linear_cross_entropy", "cross_entropy"):
        if asked.get(name):
            raise ConfigError(
                f"liger_kernel_config: {name} would replace the loss of packed rows",
                remedy=f"leave {name} out: loss_impl='fused' never keeps the logits either",
            )
    config.liger_kernel_config = {
        **asked,
        "fused_linear_cross_entropy": False,
        "cross_entropy": False,
    }


def _multiple(value: Any) -> int | None:
    """A number from 2 on, or None where rows are not filled up."""
    if value in (None, "auto", "none", "None", "null", 0, 1, "0", "1"):
        return None
    try:
        number = int(value)
    except ValueError:
        number = -1
    if number < 1:
        raise ConfigError(
            f"pad_to_multiple_of is {value!r}",
            remedy="give a number of tokens such as 64, auto, or none",
        )
    return number

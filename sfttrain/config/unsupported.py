"""Validation of SFTConfig: unsupported settings of TRL and Trainer, and values.

Each unsupported setting is refused by name, with an alternative.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sftprep.config import check_local_path
from sftprep.errors import ConfigError, MissingDependency, setting


@dataclass(frozen=True)
class Refusal:
    """A setting with only some values supported by sfttrain."""

    name: str
    is_supported: Callable[[Any], bool]
    """Returns whether a value is supported."""
    reason: str
    remedy: str


def _is_off(value: Any) -> bool:
    return not value


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "label_smoothing_factor",
        _is_off,
        "label smoothing is not supported",
        f"leave {setting('label_smoothing_factor')} at 0",
    ),
    Refusal(
        "auto_find_batch_size",
        _is_off,
        "it changes which packs a step trains on",
        f"specify {setting('per_device_train_batch_size')} yourself",
    ),
    Refusal(
        "train_sampling_strategy",
        lambda value: value in ("random", "sequential"),
        "ordering rows by length saves padding, but rows are never padded here",
        f"choose random or sequential; {setting('packing', True)} fills the rows",
    ),
    Refusal(
        "batch_eval_metrics",
        _is_off,
        "compute_metrics receives a whole evaluation set, not its batches",
        f"leave {setting('batch_eval_metrics')} out",
    ),
    Refusal(
        "include_for_metrics",
        _is_off,
        "compute_metrics receives only predictions and labels",
        f"leave {setting('include_for_metrics')} out",
    ),
    Refusal(
        "eval_do_concat_batches",
        bool,
        "predictions are returned as one array with a row per sequence",
        f"leave {setting('eval_do_concat_batches')} at True",
    ),
    Refusal(
        "fp16_full_eval",
        _is_off,
        "evaluation uses the precision of training",
        f"leave {setting('fp16_full_eval')} out",
    ),
    Refusal(
        "bf16_full_eval",
        _is_off,
        "evaluation uses the precision of training",
        f"leave {setting('bf16_full_eval')} out",
    ),
    Refusal(
        "use_cache",
        _is_off,
        "a key-value cache would hide the boundaries of packed sequences",
        f"leave {setting('use_cache')} out",
    ),
    Refusal(
        "label_names",
        lambda value: value in (None, ["labels"]),
        "the labels of packs are called labels",
        f"leave {setting('label_names')} out",
    ),
)
"""Add a setting here if TRL or Trainer knows it and it would be ignored or differ here."""

CHOICES: dict[str, tuple[str, ...]] = {
    "loss_impl": ("auto", "logits", "fused"),
    "loss_type": ("nll", "dft"),
    "truncation_mode": ("keep_start", "keep_end"),
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "on_bad_record": ("error", "quarantine"),
    "images": ("error", "drop"),
}

_SYNONYMS = {"chunked_nll": "nll", "bfd-requeue": "bfd_split", "ffd": "bfd"}
"""Equivalent values in TRL; ffd (first fit) is one because TRL itself replaced it by best fit."""

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
"""The minimum of each setting; None is valid where the field allows it."""


def check_numbers(config: Any) -> None:
    """Check the types and ranges of the numeric settings.

    Raises:
        ConfigError: A setting is a string instead of a number or boolean, or a number that is not
            finite, not an integer, or too small.
    """
    # 1. Compare each value with the annotation of its field.
    kinds = typing.get_type_hints(type(config))
    for name, kind in kinds.items():
        allowed = {kind, *typing.get_args(kind)}
        value = getattr(config, name, None)
        # YAML files and scripts pass strings for numbers, which would fail later without a name.
        if isinstance(value, str) and allowed & {int, float, bool} and str not in allowed:
            number = f"a number: {value} (YAML reads 2e-4 as a string, and 2.0e-4 as a number)"
            raise ConfigError(
                f"{setting(name)} is {value!r}, a string",
                remedy=f"write {'True or False' if bool in allowed else number}",
            )
        if (
            isinstance(value, float)
            and int in allowed
            and float not in allowed
            and not value.is_integer()
        ):
            raise ConfigError(f"{setting(name)} is {value}", remedy="specify a whole number")
        if isinstance(value, float) and not math.isfinite(value) and name not in MINIMUMS:
            raise ConfigError(f"{setting(name)} is {value}", remedy="specify a finite number")
    # 2. Search nested settings for numbers that are not finite.
    if bad := next(_find_non_finite(config.lr_scheduler_kwargs), None):
        raise ConfigError(
            f"{setting('lr_scheduler_kwargs')}: {bad[0]} is {bad[1]}",
            remedy="specify a finite number",
        )
    # 3. Check the minimums.
    for name, minimum in MINIMUMS.items():
        value = getattr(config, name)
        if value is not None and not (value >= minimum and math.isfinite(value)):
            raise ConfigError(
                f"{setting(name)} is {value}", remedy=f"specify a number of at least {minimum}"
            )


def _find_non_finite(values: Any, name: str = "it") -> Iterator[tuple[str, float]]:
    """Yield the non-finite numbers in a nested setting, each with its key."""
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except ValueError:
            return  # a plain string, or refused later
    if isinstance(values, float) and not math.isfinite(values):
        yield name, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _find_non_finite(value, str(key))
    elif isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            yield from _find_non_finite(value, name)


def check_choices(config: Any) -> None:
    """Replace synonyms, and check the settings with a fixed set of values.

    Raises:
        ConfigError: A value is not one of the choices.
    """
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        value = _SYNONYMS.get(value, value)
        if value not in choices:
            raise ConfigError(
                f"{setting(name)} is {value!r}", remedy=f"choose one of: {', '.join(choices)}"
            )
        setattr(config, name, value)
    if not set(config.allow_mismatch or ()) <= {"tokenizer", "length"}:
        raise ConfigError(
            f"{setting('allow_mismatch')} is {config.allow_mismatch}",
            remedy="choose from: tokenizer, length",
        )
    config.pad_to_multiple_of = _parse_multiple(config.pad_to_multiple_of)
    if isinstance(config.max_length, str) or (
        config.max_length is not None and config.max_length < 2
    ):
        raise ConfigError(
            f"{setting('max_length')} is {config.max_length}",
            remedy="specify a number of tokens of at least 2, or None",
        )
    if config.packing and config.max_length is None:
        raise ConfigError(
            f"{setting('packing')} needs the length of a row, but {setting('max_length')} is None",
            remedy=f"specify {setting('max_length')}",
        )


def reject_unsupported(config: Any) -> None:
    """Check the settings with partial support in sfttrain.

    Raises:
        ConfigError: A setting has a value that is not supported.
        MissingDependency: A setting needs a package that is not installed.
    """
    for refusal in REFUSALS:
        value = getattr(config, refusal.name)
        if not refusal.is_supported(value):
            raise ConfigError(
                f"{setting(refusal.name)} is {value!r}: {refusal.reason}", remedy=refusal.remedy
            )
    checkpointing = (
        getattr(config, "activation_checkpointing_kwargs", None)
        or config.gradient_checkpointing_kwargs
    )
    if isinstance(checkpointing, dict) and checkpointing.get("selective"):
        raise ConfigError(
            f"{setting('gradient_checkpointing_kwargs')}: selective is a feature of TRL that is not"
            " supported",
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
                f"{setting('accelerator_config')}: {name} would distribute rows a second time",
                remedy=f"leave {name} out: each rank loads only its own rows",
            )
    if config.use_liger_kernel:
        _configure_liger(config)


def _configure_liger(config: Any) -> None:
    """Check that Liger's kernels can run, and switch off those of the loss.

    The kernels are written in Triton, which needs a GPU. The loss of packed rows is sfttrain's own.

    Raises:
        ConfigError: There is no GPU, or a kernel of the loss was requested.
        MissingDependency: liger-kernel is not installed.
    """
    if not torch.cuda.is_available() or config.use_cpu:
        raise ConfigError(
            f"{setting('use_liger_kernel')} needs a GPU with Triton, which is not available",
            remedy=f"leave it out: {setting('loss_impl', 'fused')} saves the same memory on every"
            " device",
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise MissingDependency("liger-kernel", extra="liger", needed_for="use_liger_kernel")
    requested = dict(config.liger_kernel_config or {})
    for name in ("fused_linear_cross_entropy", "cross_entropy"):
        if requested.get(name):
            raise ConfigError(
                f"{setting('liger_kernel_config')}: {name} would replace the loss of packed rows",
                remedy=f"leave {name} out: {setting('loss_impl', 'fused')} does not keep the logits"
                " either",
            )
    config.liger_kernel_config = {
        **requested,
        "fused_linear_cross_entropy": False,
        "cross_entropy": False,
    }


def _parse_multiple(value: Any) -> int | None:
    """Parse pad_to_multiple_of to a number of at least 2; None without padding."""
    if value in (None, "auto", "none", "None", "null", 0, 1, "0", "1"):
        return None
    try:
        number = int(value)
    except ValueError:
        number = -1
    if number < 1:
        raise ConfigError(
            f"{setting('pad_to_multiple_of')} is {value!r}",
            remedy="specify a number of tokens such as 64, auto, or none",
        )
    return number


def reject_url(name: str | None, setting_name: str) -> None:
    """Raise ConfigError for the URL of a store, because no library here can load it.

    Args:
        name: A local path, or a name on the Hub; None if the setting is not specified.
        setting_name: The setting.
    """
    if name and not os.path.exists(name):
        check_local_path(str(name), setting(setting_name))

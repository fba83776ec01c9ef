"""Settings of older versions of TRL and transformers, and what they are called now."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from sftprep.errors import ConfigError

CURRENT_NAMES = {
    "max_seq_length": "max_length",
    "use_liger": "use_liger_kernel",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy",
    "dataset_batch_size": "",
    "num_of_sequences": "",
    "chars_per_token": "",
    "overwrite_output_dir": "",
    "save_safetensors": "",
    "logging_dir": "",
}
"""Older names, and the names of today; '' where there is none, because the setting means nothing
any more."""


def _old(name: str) -> Any:
    """A field that only older scripts give."""
    text = (
        f"Old name of {CURRENT_NAMES[name]}."
        if CURRENT_NAMES[name]
        else "Of older versions; does nothing, and says so."
    )
    return field(default=None, metadata={"help": text})


@dataclass
class DeprecatedSettings:
    """The fields themselves: None where they are not given."""

    max_seq_length: int | None = _old("max_seq_length")
    use_liger: bool | None = _old("use_liger")
    evaluation_strategy: str | None = _old("evaluation_strategy")
    warmup_ratio: float | None = _old("warmup_ratio")
    no_cuda: bool | None = _old("no_cuda")
    group_by_length: bool | None = _old("group_by_length")
    dataset_batch_size: int | None = _old("dataset_batch_size")
    num_of_sequences: int | None = _old("num_of_sequences")
    chars_per_token: float | None = _old("chars_per_token")
    overwrite_output_dir: bool | None = _old("overwrite_output_dir")
    save_safetensors: bool | None = _old("save_safetensors")
    logging_dir: str | None = _old("logging_dir")


def apply_deprecated_settings(config: Any) -> None:
    """Give the settings of today the values that came under older names, and say so of those that
    do nothing any more.

    Raises ConfigError where a setting came under both names with unlike values.
    """
    fields = config.__dataclass_fields__
    for name, now in CURRENT_NAMES.items():
        value = getattr(config, name)
        if value is None:
            continue
        if not now:
            warnings.warn(
                f"{name} does nothing any more: leave it out", FutureWarning, stacklevel=4
            )
            continue
        if name == "group_by_length":
            value = "group_by_length" if value else "random"
        before = getattr(config, now)
        given_too = before != fields[now].default and before is not None
        if given_too and before != value:
            raise ConfigError(
                f"{name} is {value!r} and {now} is {before!r}, which are the same setting",
                remedy=f"leave {name} out",
            )
        setattr(config, now, value)
        setattr(
            config, name, None
        )  # so that a copy of the settings that changes the name of today is not held back

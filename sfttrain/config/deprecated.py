"""Deprecated settings of TRL and transformers, and their current names."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from sftprep.errors import ConfigError, setting

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
"""The current name of each deprecated setting; "" for settings that have no effect any more."""


def _deprecated_field(name: str) -> Any:
    """Return a dataclass field for a setting of older scripts."""
    text = (
        f"Old name of {CURRENT_NAMES[name]}."
        if CURRENT_NAMES[name]
        else "Deprecated; has no effect except a warning."
    )
    return field(default=None, metadata={"help": text})


@dataclass
class DeprecatedSettings:
    """The deprecated settings as fields; None where they are not specified."""

    max_seq_length: int | None = _deprecated_field("max_seq_length")
    use_liger: bool | None = _deprecated_field("use_liger")
    evaluation_strategy: str | None = _deprecated_field("evaluation_strategy")
    warmup_ratio: float | None = _deprecated_field("warmup_ratio")
    no_cuda: bool | None = _deprecated_field("no_cuda")
    group_by_length: bool | None = _deprecated_field("group_by_length")
    dataset_batch_size: int | None = _deprecated_field("dataset_batch_size")
    num_of_sequences: int | None = _deprecated_field("num_of_sequences")
    chars_per_token: float | None = _deprecated_field("chars_per_token")
    overwrite_output_dir: bool | None = _deprecated_field("overwrite_output_dir")
    save_safetensors: bool | None = _deprecated_field("save_safetensors")
    logging_dir: str | None = _deprecated_field("logging_dir")


def apply_deprecated_settings(config: Any) -> None:
    """Copy the values of deprecated settings to the current ones.

    Settings without an effect give a warning.

    Args:
        config: An SFTConfig, which is changed in place.

    Raises:
        ConfigError: A setting has different values under its two names.
    """
    fields = config.__dataclass_fields__
    for name, current_name in CURRENT_NAMES.items():
        value = getattr(config, name)
        if value is None:
            continue
        if not current_name:
            warnings.warn(f"{name} has no effect: leave it out", FutureWarning, stacklevel=4)
            continue
        # A boolean became one of several strategies.
        if name == "group_by_length":
            value = "group_by_length" if value else "random"
        current = getattr(config, current_name)
        is_specified_too = current != fields[current_name].default and current is not None
        if is_specified_too and current != value:
            raise ConfigError(
                f"{setting(name)} is {value!r} and {setting(current_name)} is {current!r}, which"
                " are the same setting",
                remedy=f"leave {setting(name)} out",
            )
        setattr(config, current_name, value)
        # Otherwise dataclasses.replace() with a new value of the current setting would fail above.
        setattr(config, name, None)

"""The names of SFTConfig's settings in errors of sftprep.

An error of sftprep refers to its settings by `sftprep.errors.setting`, and each front end renders
these references. A trainer has other names for some settings, expresses some by several of its own,
and does not have the rest: a remedy with one of those is dropped if there is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from sftprep.errors import FlagNames, PythonNames

DATASET_OF_STREAM = "the data set"
"""The name of an iterable dataset in the errors of a stream."""

# A setting of `sftprep.build`, and the setting of SFTConfig that has the same effect.
_RENAMED = {
    "chat_template": "chat_template_path",
    "output": "dataset_cache_dir",
    "text_field": "dataset_text_field",
    "tokenizer": "processing_class",
    "workers": "dataset_num_proc",
}
_SAME = {
    "allow_mismatch",
    "as_chat",
    "chat_template_kwargs",
    "eos_token",
    "escape_special",
    "format",
    "images",
    "map",
    "max_length",
    "on_bad_record",
    "reasoning",
    "seed",
    "strip_nulls",
    "system",
    "train_end",
    "train_roles",
    "transform",
    "transform_id",
    "trust_remote_code",
}
# Settings whose values differ as well: the settings of SFTConfig for each value, with None for the
# setting without a value.
_BY_VALUE: dict[str, dict[str | None, tuple[tuple[str, str | None], ...]]] = {
    "order": {
        "keep": (("shuffle_dataset", "False"),),
        "shuffle": (("shuffle_dataset", "True"),),
        None: (("shuffle_dataset", None),),
    },
    "packing": {
        "none": (("packing", "False"),),
        "bfd": (("packing_strategy", "bfd"),),
        "bfd_split": (("packing_strategy", "bfd_split"),),
        "wrapped": (("packing_strategy", "wrapped"),),
        None: (("packing", None),),
    },
    "overlong": {
        "split": (("packing_strategy", "bfd_split"),),
        None: (("packing_strategy", None),),
    },
    "train_on": {
        "all": (("completion_only_loss", "False"), ("assistant_only_loss", "False")),
        "assistant": (("assistant_only_loss", "True"),),
        "completion": (("completion_only_loss", "True"),),
        None: (("completion_only_loss", None), ("assistant_only_loss", None)),
    },
    "truncate_side": {
        "left": (("truncation_mode", "keep_end"),),
        "right": (("truncation_mode", "keep_start"),),
        None: (("truncation_mode", None),),
    },
}
_LOAD_DATASET_ARGUMENTS = {"split": "split", "config_name": "name"}
_PYTHON_ONLY = {"tokenizer"}
"""Settings that are an argument of SFTTrainer and not a flag of `sfttrain run`."""


@dataclass(frozen=True)
class TrainerNames:
    """The settings of `sftprep.build` as those of SFTConfig.

    Args:
        dataset: The name of the argument that has the records, such as `train_dataset`.
        rows: The file to which the trainer wrote the records; None for a file of the user.
        spelling: The form of the settings: keyword arguments or flags.

    Example:
        TrainerNames("train_dataset", None).setting("chat_template", None) -> "chat_template_path"
        TrainerNames("train_dataset", None).setting("train_on", "all")
            -> "completion_only_loss=False and assistant_only_loss=False"
    """

    dataset: str
    rows: str | None
    spelling: PythonNames | FlagNames = field(default_factory=PythonNames)

    def setting(self, name: str, value: str | None) -> str | None:
        """Return the text for a setting, or None without an equivalent in SFTConfig."""
        if name in _BY_VALUE:
            pairs = _BY_VALUE[name].get(value, _BY_VALUE[name][None])
            return " and ".join(self.spelling.setting(*pair) or "" for pair in pairs)
        # Records in memory have no files in which to choose a split or rename a column.
        if name in _LOAD_DATASET_ARGUMENTS and self.rows is not None:
            return f"datasets.load_dataset(..., {_LOAD_DATASET_ARGUMENTS[name]}={value!r})"
        if name == "map" and self.rows is not None:
            entries = (value or "").strip("'").split(",")
            renames = dict(entry.split("=", 1) for entry in entries if entry)
            return f"{self.dataset}.rename_columns" + (f"({renames})" if renames else "")
        is_known = name in _RENAMED or name in _SAME
        if not is_known or (name in _PYTHON_ONLY and isinstance(self.spelling, FlagNames)):
            return None
        return self.spelling.setting(_RENAMED.get(name, name), value)

    def source(self, path: str) -> str:
        """Return the name of the dataset for the trainer's own file.

        Other paths are returned unchanged.
        """
        return self.dataset if path == self.rows else path


@dataclass(frozen=True)
class StreamNames(TrainerNames):
    """The settings of a stream as those of its trainer."""

    renamed: ClassVar[Mapping[str, str]] = {"workers": "dataloader_num_workers"}

    def setting(self, name: str, value: str | None) -> str | None:
        """Return the text for a setting, or None without an equivalent in the trainer."""
        if name in self.renamed:
            return self.spelling.setting(self.renamed[name], value)
        return super().setting(name, value)


@dataclass(frozen=True)
class RunStreamNames(StreamNames):
    """The settings of a stream as those of `sfttrain run --stream`.

    The command has more of them than the trainer.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        **StreamNames.renamed,
        "lanes": "stream_lanes",
        "order": "stream_order",
        "pack_window": "stream_window",
    }

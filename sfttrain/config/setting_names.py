"""How the trainer shows the settings that an error of sftprep names: as those of SFTConfig."""

from __future__ import annotations

from dataclasses import dataclass, field

from sftprep.errors import FlagNames, PythonNames

DATASET_OF_STREAM = "the data set"
"""What a stream calls an iterable dataset in its errors."""

# A setting of `sftprep.build`, and the setting of SFTConfig that has the same effect. What is in
# neither table has the same name in both, or does not exist in SFTConfig.
_RENAMED = {
    "chat_template": "chat_template_path",
    "output": "dataset_cache_dir",
    "text_field": "dataset_text_field",
    "tokenizer": "processing_class",
    "workers": "dataset_num_proc",
}
_SAME = {
    "allow_mismatch",
    "eos_token",
    "max_length",
    "on_bad_record",
    "packing",
}
_TRAIN_ON = {
    "all": (("completion_only_loss", "False"), ("assistant_only_loss", "False")),
    "assistant": (("assistant_only_loss", "True"),),
    "completion": (("completion_only_loss", "True"),),
    None: (("completion_only_loss", None), ("assistant_only_loss", None)),
}
_OF_LOAD_DATASET = {"split": "split", "config_name": "name"}


@dataclass(frozen=True)
class TrainerNames:
    """Settings of `sftprep.build` as those of SFTConfig.

    Args:
        dataset: The name of the argument that has the records, such as `train_dataset`.
        rows: The file in which the trainer wrote them; None for a file of the user.
        spelling: How settings are spelled.
    """

    dataset: str
    rows: str | None
    spelling: PythonNames | FlagNames = field(default_factory=PythonNames)

    def setting(self, name: str, value: str | None) -> str | None:
        """Return the text for a setting, or None where SFTConfig has none with that effect."""
        if name == "train_on":
            pairs = _TRAIN_ON.get(value, _TRAIN_ON[None])
            return " and ".join(self.spelling.setting(*pair) or "" for pair in pairs)
        if name in _OF_LOAD_DATASET and self.rows is not None:
            return f"datasets.load_dataset(..., {_OF_LOAD_DATASET[name]}={value!r})"
        if name == "map" and self.rows is not None:
            return f"{self.dataset}.rename_columns"
        if name in _RENAMED or name in _SAME:
            return self.spelling.setting(_RENAMED.get(name, name), value)
        return None

    def source(self, path: str) -> str:
        """Return the name of the dataset for a file that the trainer wrote, else the path."""
        return self.dataset if path == self.rows else path

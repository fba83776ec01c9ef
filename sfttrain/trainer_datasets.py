"""The data of a trainer: what it is given, as packs or as rows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sftprep.errors import ConfigError, MismatchError
from sftprep.shards import MANIFEST_NAME
from sfttrain.config.setting_names import TrainerNames
from sfttrain.config.sft_config import SFTConfig
from sfttrain.data.inputs import is_packs
from sfttrain.data.packs import PackSource
from sfttrain.data.prepare import DataPreparation
from sfttrain.models.loading import (
    ShardsLike,
    check_match,
)
from sfttrain.models.unwrap import unwrap_peft


@dataclass
class TrainerParts:
    """A trainer's parts. evaluation: one set, sets by name, or None; preparation: for datasets that
    come later."""

    args: SFTConfig
    model: Any
    processing: Any | None
    train: Any | None
    evaluation: Any | None
    preparation: DataPreparation
    attention: str
    """As asked for in the settings, or else in model_init_kwargs."""
    name: str = ""
    """Of the model, where it was given by name."""


def packs_for(parts: TrainerParts, source: Any, name: str, *, packing: bool) -> PackSource:
    """Packs of a dataset, checked to fit the model where it was built for it just now."""
    built_before = is_packs(source)
    packs = parts.preparation.packs(source, name, packing=packing)
    if not built_before and hasattr(packs, "manifest"):
        try:
            check_match(
                unwrap_peft(parts.model),
                cast(ShardsLike, packs),
                None,
                parts.args.allow_mismatch or (),
            )
        except MismatchError as error:
            raise (
                error
                if _is_folder_of_packs(source)
                else error.shown_by(TrainerNames(name, "the shards"))
            ) from error
    return packs


def packs_for_evaluation(parts: TrainerParts, source: Any, name: str) -> PackSource:
    """The same, packed as evaluation sets are."""
    packing = parts.args.packing if parts.args.eval_packing is None else parts.args.eval_packing
    return packs_for(parts, source, name, packing=packing)


def _train_packs(parts: TrainerParts, source: Any) -> Any:
    """Packs to train on: a stream of them where an iterable dataset is given and max_steps says
    when it is enough."""
    args = parts.args
    if args.max_steps > 0 and hasattr(source, "num_shards") and not hasattr(source, "__len__"):
        stream = parts.preparation.stream(source, "train_dataset", packing=args.packing)
        if stream is not None:
            return stream
    return packs_for(parts, source, "train_dataset", packing=args.packing)


def _is_folder_of_packs(place: Any) -> bool:
    return isinstance(place, (str, os.PathLike)) and (Path(place) / MANIFEST_NAME).exists()


class PreparedRows:
    """Packs of one sequence each as the rows that TRL gives a collator: `input_ids` and `labels`,
    lists of integers."""

    def __init__(self, packs: PackSource) -> None:
        self._packs = packs

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        pack = self._packs[index]
        labels = [
            int(token) if trained else -100
            for token, trained in zip(pack.input_ids, pack.completion_mask, strict=True)
        ]
        return {"input_ids": [int(token) for token in pack.input_ids], "labels": labels}


def rows_for_collator(parts: TrainerParts, source: Any, name: str) -> Any:
    """The rows that a collator is given: as they are with skip_prepare_dataset, tokenized
    otherwise.

    Raises ConfigError for packing, whose bounds a foreign collator would not keep, and for rows
    that have no numbers.
    """
    if parts.args.packing or parts.args.eval_packing:
        raise ConfigError(
            "data_collator and packing do not go together: the collator does not know the bounds of"
            " packed sequences",
            remedy="leave one of them out",
        )
    options = parts.args.dataset_kwargs
    if isinstance(options, dict) and options.get("skip_prepare_dataset"):
        if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
            raise ConfigError(
                f"{name} is a {type(source).__name__}: rows for a data_collator are taken by"
                " number",
                remedy="give a datasets.Dataset or a list",
            )
        return source
    return PreparedRows(packs_for(parts, source, name, packing=False))

"""The datasets of a trainer, as packs or as rows for a collator."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

from sftprep.errors import ConfigError, MismatchError, setting
from sftprep.shards import is_finished_build
from sfttrain.config.setting_names import TrainerNames
from sfttrain.config.sft_config import SFTConfig
from sfttrain.data.inputs import is_packs
from sfttrain.data.packs import PackSource
from sfttrain.data.prepare import DataPreparation
from sfttrain.models.loading import ShardsLike, check_match
from sfttrain.models.unwrap import unwrap_peft


@dataclass
class TrainerParts:
    """The resolved arguments of a trainer."""

    args: SFTConfig
    """The settings."""
    model: Any
    """The model, with its adapter."""
    processing: Any | None
    """The tokenizer, or the processor that has one."""
    train: Any | None
    """The packs, the stream or the rows to train on; None if there are none."""
    evaluation: Any | None
    """An evaluation set, a dictionary of sets, or None."""
    preparation: DataPreparation
    """Prepares evaluation sets that are passed to `evaluate` later."""
    attention: str
    """The requested attention: that of the settings, else that in model_init_kwargs."""
    name: str = ""
    """The name of the model, if it was specified by name."""


def packs_for(parts: TrainerParts, source: Any, name: str, *, packing: bool) -> PackSource:
    """Return the packs of a dataset, and check that new ones fit the model.

    Args:
        parts: The parts of the trainer.
        source: The dataset, or packs.
        name: The name of the argument that has it, for messages.
        packing: Whether several records share a pack.

    Raises:
        MismatchError: The packs have token ids or lengths that the model does not support.
        SftprepError: The records cannot be prepared.
    """
    are_packs = is_packs(source)
    packs = parts.preparation.packs(source, name, packing=packing)
    if not are_packs and hasattr(packs, "manifest"):
        try:
            check_match(
                unwrap_peft(parts.model),
                cast(ShardsLike, packs),
                None,
                parts.args.allow_mismatch or (),
            )
        except MismatchError as error:
            # `check_match` calls the packs "the shards"; records have the name of their dataset.
            rows = None if _is_folder_of_packs(source) else "the shards"
            raise error.shown_by(TrainerNames(name, rows)) from error
    return packs


def packs_for_evaluation(parts: TrainerParts, source: Any, name: str) -> PackSource:
    """Return the packs of an evaluation set; see `packs_for`."""
    packing = parts.args.packing if parts.args.eval_packing is None else parts.args.eval_packing
    return packs_for(parts, source, name, packing=packing)


def packs_for_training(parts: TrainerParts, source: Any) -> Any:
    """Return the packs to train on; see `packs_for`.

    An IterableDataset becomes a stream if `max_steps` limits the run. Otherwise it is read to its
    end and prepared.
    """
    args = parts.args
    if args.max_steps > 0 and hasattr(source, "num_shards") and not hasattr(source, "__len__"):
        stream = parts.preparation.stream(source, "train_dataset", packing=args.packing)
        if stream is not None:
            return stream
    return packs_for(parts, source, "train_dataset", packing=args.packing)


def _is_folder_of_packs(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike)) and is_finished_build(source)


class PreparedRows:
    """Packs of one sequence each, as rows for a collator of TRL.

    Example:
        ids [5, 6, 7], of which the last two are trained
            ->  {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    """

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
    """Return the rows for a user's collator.

    They are unchanged with skip_prepare_dataset, else tokenized.

    Args:
        parts: The parts of the trainer.
        source: The dataset.
        name: The name of the argument that has it, for messages.

    Raises:
        ConfigError: Packing is on, whose boundaries the collator does not know, or the rows have no
            indices.
    """
    if parts.args.packing or parts.args.eval_packing:
        raise ConfigError(
            f"data_collator and {setting('packing')} exclude each other: the collator does not know"
            " the boundaries of packed sequences",
            remedy="leave one of them out",
        )
    options = parts.args.dataset_kwargs
    if isinstance(options, dict) and options.get("skip_prepare_dataset"):
        if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
            raise ConfigError(
                f"{name} is a {type(source).__name__}: the rows for a data_collator are accessed by"
                " index",
                remedy="pass a datasets.Dataset or a list",
            )
        return source
    return PreparedRows(packs_for(parts, source, name, packing=False))

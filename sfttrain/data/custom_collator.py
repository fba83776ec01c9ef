"""Batches that a user's own collator makes, such as those of pictures and text: fed to the model as
they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sftprep.errors import ConfigError
from sfttrain.data.batching import PackSource
from sfttrain.losses.fused_cross_entropy import LossSums, LossType, loss_from_logits
from sfttrain.trainer_setup import Parts, packs_for

Collator = Callable[[list[Any]], Mapping[str, Any]]


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


def rows_for_collator(parts: Parts, source: Any, name: str) -> Any:
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


def collated(rows: list[Any], *, collator: Collator, spare: Any) -> dict[str, Any]:
    """The collator's batch, and how many targets it has as `total_weight`.

    A rank that has no rows left in the last step gets `spare`, of which nothing is trained.
    Raises ConfigError where the batch has no labels.
    """
    batch = dict(collator(rows if rows else [spare]))
    if "labels" not in batch:
        raise ConfigError(
            f"the data_collator's batch has no labels, it has {', '.join(batch)}",
            remedy='set batch["labels"]: the token where it is trained, -100 elsewhere',
        )
    if not rows:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["total_weight"] = float((batch["labels"][:, 1:] != -100).sum())
    return batch


def foreign_sums(
    model: nn.Module, batch: Mapping[str, Any], kind: LossType
) -> tuple[LossSums, Tensor]:
    """Run the model on a batch; the sums of its loss, and the logits of all positions: [B, T,
    V]."""
    arguments = {
        name: value for name, value in batch.items() if name not in ("labels", "total_weight")
    }
    logits: Tensor = model(**arguments).logits
    targets = batch["labels"][:, 1:]
    valid = targets != -100
    if not bool(valid.any()):
        valid = torch.zeros_like(valid)
        valid[0, 0] = True
    return loss_from_logits(logits[:, :-1][valid], targets[valid], kind), logits

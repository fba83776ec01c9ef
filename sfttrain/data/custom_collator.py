"""Batches that a user's own collator makes, such as those of pictures and text: fed to the model as
they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sftprep.errors import ConfigError

Collator = Callable[[list[Any]], Mapping[str, Any]]


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

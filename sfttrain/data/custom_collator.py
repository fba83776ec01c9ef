"""Batches of a user-provided collator, such as batches of images and text.

They are passed to the model unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sftprep.errors import ConfigError

Collator = Callable[[list[Any]], Mapping[str, Any]]


def collate_custom(rows: list[Any], *, collator: Collator, spare: Any) -> dict[str, Any]:
    """Call a user's collator, and add the number of targets as `total_weight`.

    Args:
        rows: The rows of a device batch; empty if the last step has no rows left for this rank.
        collator: The function that makes the batch.
        spare: A row for a rank without rows, which must still run the model; its labels are
            set to -100.

    Raises:
        ConfigError: If the batch has no labels.
    """
    batch = dict(collator(rows if rows else [spare]))
    if "labels" not in batch:
        raise ConfigError(
            f"the batch of the data_collator has no labels; it has {', '.join(batch)}",
            remedy='set batch["labels"] to the token where it is trained, and to -100 elsewhere',
        )
    if not rows:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["total_weight"] = float((batch["labels"][:, 1:] != -100).sum())
    return batch

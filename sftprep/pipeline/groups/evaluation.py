"""The evaluation records of all groups, as the parts of one group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from sftprep.pipeline.groups.task import EvaluationPart
from sftprep.pipeline.passes.tokenize_pass import PartitionResult
from sftprep.shards.group import InputInfo


def join_evaluation(
    found: Iterable[EvaluationPart],
) -> tuple[list[PartitionResult], tuple[InputInfo, ...], tuple[str, ...]]:
    """Join the evaluation records of groups; the ranges of one input become one input.

    Args:
        found: The evaluation records of each group, in order.

    Returns:
        The partitions, the entries of the inputs, and the key of the recipe of each input.
    """
    parts: list[PartitionResult] = []
    infos: list[InputInfo] = []
    recipe_keys: list[str] = []
    for each in found:
        new_number: list[int] = []
        for info, recipe_key in zip(each.inputs, each.recipe_keys, strict=True):
            if info.start and infos:
                infos[-1] = infos[-1].followed_by(info)
            else:
                infos.append(info)
                recipe_keys.append(recipe_key)
            new_number.append(len(infos) - 1)
        for part in each.parts:
            partition = dataclasses.replace(
                part.partition, input=new_number[part.partition.input], index=len(parts)
            )
            parts.append(dataclasses.replace(part, partition=partition))
    return parts, tuple(infos), tuple(recipe_keys)

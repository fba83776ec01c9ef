"""Evaluation records of a group in files: their tokens in a spill, and the rest in a receipt.

The evaluation records of all groups are packed together, after the last group. So the spills of a
group can be removed or be on another machine by then: its held-out sequences are copied to a spill
of their own.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.hashing import digest
from sftprep.core.types import Rejected, TokenBatch
from sftprep.pipeline.groups.task import EvaluationPart
from sftprep.pipeline.passes.spill import map_spill, spill_path, write_spill
from sftprep.pipeline.passes.tokenize_pass import PartitionResult
from sftprep.shards.group import InputInfo
from sftprep.shards.json_fields import FieldError, parse_fields
from sftprep.shards.layout import HELD_OUT_PATTERN, SPILL_PATTERN
from sftprep.sources.lanes import LanePositions
from sftprep.sources.partition import Partition

_SPILL_TOKENS = 1 << 26
"""Tokens of a spill of held-out sequences, about: they are copied in memory."""


def copy_held_out(parts: Sequence[PartitionResult], work: Path) -> list[PartitionResult]:
    """Copy the sequences of partitions to spills with nothing else.

    Args:
        parts: The partitions, with some of their sequences.
        work: The folder of the spills.

    Returns:
        The same partitions with the sequences in the new spills.

    Raises:
        StorageError: A spill cannot be written.
    """
    copied: list[PartitionResult] = []
    waiting: list[PartitionResult] = []
    for part in parts:
        waiting.append(part)
        if sum(int(each.lengths.sum()) for each in waiting) >= _SPILL_TOKENS:
            copied += _copy_to_spill(waiting, work)
            waiting = []
    return copied + _copy_to_spill(waiting, work)


def _copy_to_spill(parts: Sequence[PartitionResult], work: Path) -> list[PartitionResult]:
    contents = [(part.key, part.selection, part.lengths.tolist()) for part in parts]
    key = f"held-out-{digest(contents)[:40]}"
    batches = [_copy_sequences(part, work) for part in parts if len(part.lengths)]
    if batches:
        write_spill(spill_path(work, key), _join_batches(batches))
    copied, first = [], 0
    for part in parts:
        rows = np.arange(first, first + len(part.lengths), dtype=np.int32)
        copied.append(dataclasses.replace(part, key=key, rows=rows, starts=None))
        first += len(part.lengths)
    return copied


def _copy_sequences(part: PartitionResult, work: Path) -> TokenBatch:
    """Return the sequences of a partition, cut as the build cuts them."""
    spill = map_spill(spill_path(work, part.key))
    rows = np.arange(len(part.lengths)) if part.rows is None else part.rows
    begins = spill.offsets[rows].astype(np.int64)
    if part.starts is not None:
        begins += part.starts
    offsets = np.concatenate(([0], np.cumsum(part.lengths, dtype=np.int64)))
    tokens = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], part.lengths)
    mask = np.ones(len(tokens), np.bool_)
    if spill.completion_mask is not None:
        mask = spill.completion_mask[tokens].view(np.bool_)
    weights = None if spill.loss_weights is None else spill.loss_weights[tokens]
    return TokenBatch(spill.input_ids[tokens], offsets, mask, spill.line_of[rows], [], {}, weights)


def _join_batches(batches: Sequence[TokenBatch]) -> TokenBatch:
    sizes = np.array([len(batch.input_ids) for batch in batches])
    starts = np.cumsum(sizes) - sizes
    weights = None
    if any(batch.loss_weights is not None for batch in batches):
        weights = np.concatenate(
            [
                batch.completion_mask.astype(np.float32)
                if batch.loss_weights is None
                else batch.loss_weights
                for batch in batches
            ]
        )
    offsets = [batch.offsets[:-1] + start for batch, start in zip(batches, starts, strict=True)]
    return TokenBatch(
        np.concatenate([batch.input_ids for batch in batches]),
        np.concatenate([*offsets, sizes.sum(keepdims=True)]),
        np.concatenate([batch.completion_mask for batch in batches]),
        np.concatenate([batch.line_of for batch in batches]),
        loss_weights=weights,
    )


# --- JSON -----------------------------------------------------------------------------------------

_ARRAYS: dict[str, np.dtype[Any]] = {
    "lengths": np.dtype("<i4"),
    "rows": np.dtype("<i4"),
    "starts": np.dtype("<i4"),
    "flags": np.dtype("u1"),
    "whole_lengths": np.dtype("<i8"),
    "exact_lengths": np.dtype("<i8"),
    "trained_positions": np.dtype("<i8"),
}
_OPTIONAL_ARRAYS = {"rows", "starts", "flags"}
_PLAIN = ("key", "content", "bytes", "counts", "has_weights", "first_lines", "selection")


def evaluation_to_json(part: EvaluationPart) -> dict[str, Any]:
    """Return the evaluation records of a group as JSON values."""
    return {
        "inputs": [dataclasses.asdict(info) for info in part.inputs],
        "parts": [_part_to_json(each) for each in part.parts],
        "recipe_keys": list(part.recipe_keys),
    }


def parse_evaluation(values: dict[str, Any]) -> EvaluationPart:
    """Return the evaluation records that `evaluation_to_json` described.

    Raises:
        KeyError, TypeError, ValueError, FieldError: The values are something else.
    """
    return EvaluationPart(
        inputs=tuple(parse_fields(InputInfo, info, "") for info in values["inputs"]),
        parts=tuple(map(_parse_part, values["parts"])),
        recipe_keys=tuple(values["recipe_keys"]),
    )


def _part_to_json(part: PartitionResult) -> dict[str, Any]:
    positions = part.lane_positions
    lanes = None
    if positions is not None:
        lanes = {"numbers": _encode(positions.numbers, np.dtype("<i8")), "rows": positions.rows}
    return {
        **{name: getattr(part, name) for name in _PLAIN},
        **{name: _encode(getattr(part, name), dtype) for name, dtype in _ARRAYS.items()},
        "index": part.partition.index,
        "input": part.partition.input,
        "rejected": [dataclasses.astuple(record) for record in part.rejected],
        "lane_positions": lanes,
    }


def _parse_part(values: dict[str, Any]) -> PartitionResult:
    lanes = values["lane_positions"]
    arrays: dict[str, Any] = {name: _decode(values[name], dtype) for name, dtype in _ARRAYS.items()}
    if any(arrays[name] is None for name in _ARRAYS.keys() - _OPTIONAL_ARRAYS):
        raise FieldError("an array is missing")
    arrays["whole_lengths"] = arrays["whole_lengths"].reshape(3, -1)
    # It becomes the name of a file.
    if not re.fullmatch(rf"({SPILL_PATTERN}|{HELD_OUT_PATTERN})", f"{values['key']}.arrow"):
        raise FieldError(f"the key of a spill is {values['key']!a:.60}")
    positions = None
    if lanes is not None:
        numbers = _decode(lanes["numbers"], np.dtype("<i8"))
        assert numbers is not None
        positions = LanePositions(numbers, bool(lanes["rows"]))
    return PartitionResult(
        # Its lines are not read again.
        partition=Partition(values["index"], values["input"], "", 0, 0),
        **{name: values[name] for name in _PLAIN},
        **arrays,
        rejected=[Rejected(*record) for record in values["rejected"]],
        reused=True,
        lane_positions=positions,
    )


def _encode(array: NDArray[Any] | None, dtype: np.dtype[Any]) -> str | None:
    return None if array is None else base64.b64encode(array.astype(dtype).tobytes()).decode()


def _decode(text: str | None, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    return None if text is None else np.frombuffer(base64.b64decode(text, validate=True), dtype)

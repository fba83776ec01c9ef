"""A spill is read back exactly as it was written, or not at all if the file is damaged."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from sftprep.core.types import Rejected, TokenBatch
from sftprep.pipeline.passes.spill import Spill, read_spill, write_spill


def batch(*, masked: bool, weighted: bool) -> TokenBatch:
    return TokenBatch(
        input_ids=np.arange(10, dtype=np.int32),
        offsets=np.array([0, 4, 10], np.int64),
        completion_mask=np.array([True, not masked] * 5),
        line_of=np.array([0, 1], np.int64),
        rejected=[Rejected(2, 1, "json", "a message", "an excerpt")],
        counts={"lines": 3},
        loss_weights=np.linspace(0, 1, 10, dtype=np.float32) if weighted else None,
    )


def holds(spill: Spill, made: TokenBatch) -> bool:
    """Whether a spill has the content that was written."""
    mask = np.ones(10, np.uint8) if spill.completion_mask is None else spill.completion_mask
    pairs = [
        (spill.input_ids, made.input_ids),
        (spill.offsets, made.offsets),
        (spill.line_of, made.line_of),
    ]
    pairs += [(mask.astype(bool), made.completion_mask)]
    if made.loss_weights is not None and spill.loss_weights is not None:
        pairs.append((spill.loss_weights, made.loss_weights))
    return (
        all(np.array_equal(got, want) and got.dtype.kind == want.dtype.kind for got, want in pairs)
        and (spill.loss_weights is None) == (made.loss_weights is None)
        and spill.rejected == made.rejected
        and spill.counts == made.counts
    )


@pytest.mark.parametrize(("masked", "weighted"), [(False, False), (True, False), (True, True)])
def test_a_damaged_spill_is_detected(tmp_path: Path, masked: bool, weighted: bool) -> None:
    made = batch(masked=masked, weighted=weighted)
    file = tmp_path / "whole.arrow"
    write_spill(file, made)
    spill = read_spill(file)
    assert spill is not None
    assert holds(spill, made)
    whole = file.read_bytes()
    chance = random.Random(0)
    for position in range(len(whole)):
        # Another name, because the layout of a file is cached by its name, size and time.
        damaged = tmp_path / f"{position}.arrow"
        damaged.write_bytes(
            whole[:position]
            + bytes([whole[position] ^ 1 << chance.randrange(8)])
            + whole[position + 1 :]
        )
        spill = read_spill(damaged)
        assert spill is None or holds(spill, made), position
        damaged.write_bytes(whole[:position])
        assert read_spill(damaged) is None
        damaged.unlink()
    assert read_spill(tmp_path / "absent.arrow") is None

"""The same lines by columns and one by one, compared."""

from __future__ import annotations

from collections import Counter

import numpy as np

from sftprep.batch import TokenBatch
from sftprep.engine.prepare import Preparer
from sftprep.engine.recipe import Recipe
from sftprep.lookup import Letters


def both_ways(
    data: bytes, name: str, recipe: Recipe, *, seed: int = 0, sample: int = 0
) -> tuple[TokenBatch, TokenBatch, list[int]]:
    """What columns give, what the general way gives, and the lines that go by columns. All but the
    counts is compared here."""
    by_columns, one_by_one = Preparer(recipe, threads=False), Preparer(recipe, threads=False)
    one_by_one._columns._idle = True
    got, want = (
        preparer.prepare(data, name, seed=seed, sample=sample)
        for preparer in (by_columns, one_by_one)
    )
    for part in ("offsets", "input_ids", "completion_mask", "origin"):
        assert np.array_equal(getattr(got, part), getattr(want, part)), part
    assert (got.loss_weights is None) == (want.loss_weights is None)
    assert got.rejected == want.rejected
    return got, want, sorted(by_columns._columns.texts(Letters(data), name, Counter()).lines)

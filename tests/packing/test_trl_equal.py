"""On one window, the packs are those of TRL's best-fit decreasing: same bins, same order, same documents in each."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from sftprep.packing import pack_lengths
from sftprep.packing.bestfit import best_fit_decreasing
from tests.support import SHARED, needs_shared

pytestmark = pytest.mark.parity


def assert_packs_of_trl(lengths: NDArray[np.int32], capacity: int) -> None:
    """Pack documents whose tokens are their own index with TRL, in one window, and compare row by row."""
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets")
    import pyarrow as pa

    ids = pa.array(np.repeat(np.arange(lengths.size, dtype=np.int32), lengths))
    starts = pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
    documents = datasets.Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(starts, ids)}))
    datasets.disable_progress_bars()
    rows = data_utils.pack_dataset(documents, capacity, strategy="bfd", map_kwargs={"batch_size": lengths.size})

    plan = pack_lengths(lengths, capacity)
    _, members, offsets = best_fit_decreasing(lengths, capacity)  # the compiled planner, however small the plan
    for in_bins, bounds in ((plan.members, plan.offsets), (members, offsets)):
        ours = [in_bins[a:b] for a, b in itertools.pairwise(bounds)]
        assert [lengths[pack].tolist() for pack in ours] == rows["seq_lengths"][:]
        assert [np.repeat(pack, lengths[pack]).tolist() for pack in ours] == rows["input_ids"][:]


@pytest.mark.parametrize("seed", range(25))
def test_random_lengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(2, 200))
    lengths = rng.integers(0, capacity, int(rng.integers(1, 400)), endpoint=True).astype(np.int32)
    lengths[0] = 1  # TRL cannot pack a window in which all documents are empty
    assert_packs_of_trl(lengths, capacity)


@pytest.mark.parametrize("capacity", [64, 1_000, 1_024])
def test_many_ties(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    assert_packs_of_trl(rng.choice([0, 5, 6, 7, 21, 22, 31, 32, 33], 1_500).astype(np.int32), capacity)


@needs_shared
@pytest.mark.parametrize("capacity", [2_048, 16_384])
def test_real_chats(capacity: int) -> None:
    lengths = np.load(SHARED / "datasets" / "lengths" / "qwen3_chatml_sharegpt_17671.npy")[:2_000]
    assert_packs_of_trl(np.minimum(lengths, capacity).astype(np.int32), capacity)

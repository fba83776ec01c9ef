"""On one window, the packs are those of TRL's best-fit decreasing: same bins, same order, same
documents in each."""

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
    """Pack documents whose tokens are their own index with TRL, in one window, and compare row by
    row."""
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets")
    import pyarrow as pa

    ids = pa.array(np.repeat(np.arange(lengths.size, dtype=np.int32), lengths))
    starts = pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
    documents = datasets.Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(starts, ids)}))
    datasets.disable_progress_bars()
    rows = data_utils.pack_dataset(
        documents, capacity, strategy="bfd", map_kwargs={"batch_size": lengths.size}
    )

    plan = pack_lengths(lengths, capacity)
    _, members, offsets = best_fit_decreasing(
        lengths, capacity
    )  # the compiled planner, however small the plan
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
    assert_packs_of_trl(
        rng.choice([0, 5, 6, 7, 21, 22, 31, 32, 33], 1_500).astype(np.int32), capacity
    )


@needs_shared
@pytest.mark.parametrize("capacity", [2_048, 16_384])
def test_real_chats(capacity: int) -> None:
    lengths = np.load(SHARED / "datasets" / "lengths" / "qwen3_chatml_sharegpt_17671.npy")[:2_000]
    assert_packs_of_trl(np.minimum(lengths, capacity).astype(np.int32), capacity)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
@pytest.mark.parametrize("seed", range(8))
def test_strategies_that_cut_sequences(strategy: str, seed: int) -> None:
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(2, 40))
    lengths = rng.integers(1, 3 * capacity, int(rng.integers(1, 60))).astype(np.int32)
    tokens = np.arange(int(lengths.sum()))
    firsts = np.cumsum(lengths) - lengths
    documents = datasets.Dataset.from_dict(
        {"input_ids": [tokens[a : a + n].tolist() for a, n in zip(firsts, lengths, strict=True)]}
    )
    rows = data_utils.pack_dataset(
        documents, capacity, strategy=strategy, map_kwargs={"batch_size": lengths.size}
    )

    plan = pack_lengths(lengths, capacity, strategy)
    assert plan.starts is not None
    assert plan.sizes is not None
    parts = [
        tokens[firsts[m] + a : firsts[m] + a + n]
        for m, a, n in zip(plan.members, plan.starts, plan.sizes, strict=True)
    ]
    ours = [np.concatenate(parts[a:b]).tolist() for a, b in itertools.pairwise(plan.offsets)]
    assert ours == rows["input_ids"][:]
    if strategy == "bfd_split":
        assert [plan.sizes[a:b].tolist() for a, b in itertools.pairwise(plan.offsets)] == rows[
            "seq_lengths"
        ][:]
    else:
        # A part starts where a row or a document does, and nowhere else.
        begins = [int(part[0]) for part in parts]
        assert begins == sorted({*firsts.tolist(), *range(0, tokens.size, capacity)})
    assert plan.bin_of.tolist() == [
        next(k for k, row in enumerate(ours) if first in row) for first in firsts.tolist()
    ]


def test_the_examples_in_the_documentation_of_trl() -> None:
    # pack_dataset: [1, 2, 3], [4, 5], [6, 7, 8], [9] with 4 tokens a row
    lengths = [3, 2, 3, 1]
    plan = pack_lengths(lengths, 4)
    assert [sorted(plan.members[a:b].tolist()) for a, b in itertools.pairwise(plan.offsets)] == [
        [0, 3],
        [2],
        [1],
    ]
    wrapped = pack_lengths(lengths, 4, "wrapped")
    assert (wrapped.members.tolist(), wrapped.sizes.tolist(), wrapped.offsets.tolist()) == (
        [0, 1, 1, 2, 3],
        [3, 1, 1, 3, 1],
        [0, 2, 4, 5],
    )
    split = pack_lengths([5, 1], 4, "bfd_split")
    assert (split.members.tolist(), split.starts.tolist(), split.sizes.tolist()) == (
        [0, 0, 1],
        [0, 4, 0],
        [4, 1, 1],
    )

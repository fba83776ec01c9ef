"""Batches of packs: contents of a row, and the order in which ranks train on packs."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from sfttrain.data.batching import BatchDataset, PackLoader, StepSampler, collate_packs
from sfttrain.data.packs import longest_sequence
from sfttrain.data.step_plan import StepPlan
from tests.sfttrain.packs import MemoryPacks, make_pack, make_packs

plans = st.builds(
    StepPlan,
    packs=st.integers(1, 60),
    rows=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_a_row_has_the_tokens_and_masks_of_its_packs(lengths: list[list[int]], seed: int) -> None:
    packs = [make_pack(of_pack, seed=seed + number) for number, of_pack in enumerate(lengths)]
    row = collate_packs(packs)
    flat = [n for of_pack in lengths for n in of_pack]
    # The reference: token by token.
    ids, positions, labels, scored, targets = [], [], [], [], []
    for pack in packs:
        offset = 0
        for n in pack.seq_lengths:
            for i in range(n):
                if i > 0 and pack.completion_mask[offset]:
                    scored.append(len(ids) - 1)
                    targets.append(int(pack.input_ids[offset]))
                labels.append(
                    int(pack.input_ids[offset]) if i > 0 and pack.completion_mask[offset] else -100
                )
                ids.append(int(pack.input_ids[offset]))
                positions.append(i)
                offset += 1
    assert row["input_ids"].tolist() == [ids]
    assert row["position_ids"].tolist() == [positions]
    assert row["labels"].tolist() == [labels]
    assert row["cu_seq_lens_q"].tolist() == np.cumsum([0, *flat]).tolist()
    assert row["cu_seq_lens_k"].dtype == torch.int32
    assert (row["max_length_q"], row["max_length_k"], row["seq_lens"]) == (
        max(flat),
        max(flat),
        tuple(flat),
    )
    assert type(row["max_length_q"]) is int
    assert row["scored"].tolist() == (scored or [0])
    assert row["targets"].tolist() == (targets or [-100])
    assert "attention_mask" not in row


def test_without_packs_there_is_a_row_without_a_trained_token() -> None:
    row = collate_packs([])
    assert row["input_ids"].shape == (1, 2)
    assert (row["labels"] == -100).all()


@settings(max_examples=100, deadline=None)
@given(plan=plans, epoch=st.integers(0, 3))
def test_every_pack_is_trained_once_and_ranks_have_equal_numbers_of_batches(
    plan: StepPlan, epoch: int
) -> None:
    seen: list[int] = []
    for rank in range(plan.world):
        sampler = StepSampler(plan, rank)
        sampler.set_epoch(epoch)
        dataset = BatchDataset(MemoryPacks([]), plan, rank)
        batches = [dataset.packs(*name) for name in sampler]
        assert len(batches) == len(sampler) == plan.batches
        assert all(len(batch) <= plan.rows for batch in batches)
        seen += [pack for batch in batches for pack in batch]
    assert sorted(seen) == list(range(plan.packs))


@settings(max_examples=60, deadline=None)
@given(
    packs=st.integers(1, 60),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 2),
    divisions=st.permutations([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2)]),
)
def test_the_packs_of_a_step_do_not_depend_on_the_ranks(
    packs: int, seed: int, epoch: int, divisions: list[tuple[int, int]]
) -> None:
    steps = []
    for world, accumulation in divisions[:2]:
        plan = StepPlan(packs=packs, rows=1, accumulation=accumulation, world=world, seed=seed)
        order = plan.order(epoch)
        steps.append(
            [
                sorted(
                    pack
                    for rank in range(world)
                    for batch in plan.batches_of_rank(order, step, rank)
                    for pack in batch.tolist()
                )
                for step in range(-(-plan.batches // accumulation))
            ]
        )
    assert steps[0] == steps[1]


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {
        tuple(StepPlan(packs=50, rows=1, seed=s).order(e)[:].tolist())
        for s in range(3)
        for e in range(3)
    }
    assert len(orders) == 9
    assert StepPlan(packs=50, rows=1, shuffle=False).order(3)[:].tolist() == list(range(50))


def test_drop_last_drops_only_an_incomplete_last_step() -> None:
    plan = StepPlan(packs=11, rows=2, accumulation=2, drop_last=True)
    assert plan.batches == 4
    assert StepPlan(packs=3, rows=2, accumulation=2, drop_last=True).batches == 2


def test_accelerate_skips_batches_and_sets_the_epoch() -> None:
    source = make_packs(10)
    loader = PackLoader(source, StepSampler(StepPlan(packs=10, rows=2)))
    rows = {epoch: [] for epoch in range(2)}
    for epoch in rows:
        loader.set_epoch(epoch)
        rows[epoch] = [row["input_ids"].tolist() for row in loader]
    assert rows[0] != rows[1]
    skipped = skip_first_batches(loader, 2)
    skipped.batch_sampler.batch_sampler.set_epoch(1)
    assert [row["input_ids"].tolist() for row in skipped] == rows[1][2:]


def test_longest_sequence_reads_no_tokens() -> None:
    class Lengths(MemoryPacks):
        def __getitem__(self, index: int, /) -> None:  # type: ignore[override]
            raise AssertionError("tokens were read")

    assert longest_sequence(Lengths([make_pack([3, 9]), make_pack([4])])) == 9
    assert longest_sequence(MemoryPacks([])) == 0

"""The division of the packs of a build: the same steps for any ranks, few shards, equal costs."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from transformers import LlamaConfig

from sftprep import open_shards
from sfttrain.data.batching import BatchDataset, PackLoader, StepSampler
from sfttrain.data.shard_lanes import ShardLanes
from sfttrain.data.step_balance import PackCosts, assign_packs, attention_cost, exchange_packs
from sfttrain.data.step_plan import BuildOrder, StepPlan
from tests.sfttrain.builds import write_build
from tests.sfttrain.packs import MemoryPacks, make_packs


@dataclass
class KnownSizes:
    """Packs of which only the sizes are known."""

    tokens: NDArray[np.int64]
    sum_of_squares: NDArray[np.int64]

    def sizes(self, packs: ArrayLike) -> KnownSizes:
        return KnownSizes(self.tokens[packs], self.sum_of_squares[packs])


def make_plan(
    shards: list[int], *, lanes: int = 4, machines: int = 1, costs: bool = True, **numbers: Any
) -> StepPlan:
    sizes = np.array(shards, np.int64)
    tokens = np.random.default_rng(0).integers(1, 100, sizes.sum())
    known = PackCosts(KnownSizes(tokens, tokens**2), sizes, 0.1) if costs else None
    build = BuildOrder(ShardLanes(sizes, lanes), machines, known)
    return StepPlan(packs=int(sizes.sum()), build=build, **numbers)


def steps_of(plan: StepPlan, epoch: int = 0) -> list[list[list[list[int]]]]:
    """Return the packs by step, rank and device batch."""
    order = plan.order(epoch)
    return [
        [
            [batch.tolist() for batch in plan.batches_of_rank(order, step, rank)]
            for rank in range(plan.world)
        ]
        for step in range(-(-plan.batches // plan.accumulation))
    ]


def flatten(step: list[list[list[int]]]) -> list[int]:
    return sorted(pack for rank in step for batch in rank for pack in batch)


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    lanes=st.sampled_from([1, 2, 8, 32]),
    rows=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    machines=st.integers(1, 4),
    per_machine=st.integers(1, 3),
    costs=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_each_pack_is_trained_once_and_all_ranks_have_equally_many_batches(
    shards: list[int],
    lanes: int,
    rows: int,
    accumulation: int,
    machines: int,
    per_machine: int,
    costs: bool,
    drop_last: bool,
    epoch: int,
) -> None:
    plan = make_plan(
        shards,
        lanes=lanes,
        machines=machines,
        costs=costs,
        rows=rows,
        accumulation=accumulation,
        world=machines * per_machine,
        drop_last=drop_last,
    )
    datasets = [BatchDataset(MemoryPacks([]), plan, rank) for rank in range(plan.world)]
    seen: list[int] = []
    for rank, dataset in enumerate(datasets):
        sampler = StepSampler(plan, rank)
        sampler.set_epoch(epoch)
        batches = [dataset.packs(*name) for name in sampler]
        assert len(batches) == plan.batches
        assert all(len(batch) <= rows for batch in batches)
        seen += [pack for batch in batches for pack in batch]
    full_steps, rest = divmod(plan.packs, plan.packs_per_step)
    dropped = rest if drop_last and full_steps else 0
    assert len(set(seen)) == len(seen) == plan.packs - dropped


def test_the_packs_of_a_step_do_not_depend_on_ranks_machines_or_costs() -> None:
    shards = [97, 300, 5, 11, 0, 388, 500]
    divisions = [(1, 1, True), (2, 1, True), (8, 2, True), (8, 4, False), (64, 64, True)]
    wanted = None
    for world, machines, costs in [*divisions, (1024, 128, True)]:
        plan = make_plan(
            shards,
            machines=machines,
            costs=costs,
            rows=1,
            accumulation=1024 // world,
            world=world,
            seed=5,
        )
        order = plan.order(2)
        divided = [plan.divide_step(order, step, plan.build) for step in (0, 1)]
        steps = [sorted(packs[packs >= 0].tolist()) for packs in divided]
        wanted = wanted or steps
        assert steps == wanted
    assert wanted is not None
    assert [len(step) for step in wanted] == [1024, 277]


@pytest.mark.parametrize(
    ("machines", "world", "most"), [(8, 16, 1.1 / 8), (16, 64, 1.1 / 16), (3, 6, 1.15 / 3)]
)
def test_a_machine_reads_its_part_of_the_shards(machines: int, world: int, most: float) -> None:
    """For a number of machines that is not a power of two, neighbours share a lane."""
    shards = np.random.default_rng(0).integers(90, 100, 640)
    shards[::9] = 5  # the last shard of each group
    plan = make_plan(
        shards.tolist(),
        lanes=64,
        machines=machines,
        costs=False,
        rows=2,
        accumulation=4,
        world=world,
    )
    number = np.repeat(np.arange(640), shards)
    order = plan.order(0)
    read: list[set[int]] = [set() for _ in range(machines)]
    for step in range(plan.packs // plan.packs_per_step):
        of_machines = plan.divide_step(order, step, plan.build).reshape(machines, -1)
        for shards_read, packs in zip(read, of_machines, strict=True):
            shards_read |= {*number[packs].tolist()}
    for shards_read in read:
        assert 0.9 / machines <= len(shards_read) / 640 <= most + 1 / 640


@settings(max_examples=100, deadline=None)
@given(
    costs=st.lists(st.integers(1, 99), max_size=24),
    ranks=st.integers(1, 6),
    more=st.integers(0, 2),
)
def test_ranks_have_about_equal_costs(costs: list[int], ranks: int, more: int) -> None:
    slots = max(1, -(-len(costs) // ranks) + more)
    table = assign_packs(np.array(costs), ranks, slots)
    assert sorted(table[table >= 0].tolist()) == list(range(len(costs)))
    cost_of = np.append(costs, 0)[table]
    # The most expensive packs of all ranks are in the first slot, and so on.
    assert (np.diff(cost_of, axis=1) <= 0).all()
    sums = cost_of.sum(axis=1)
    assert sums.max() - sums.min() <= max(costs, default=0)


@settings(max_examples=100, deadline=None)
@given(
    costs=st.lists(st.integers(1, 99), min_size=1, max_size=30),
    machines=st.integers(1, 5),
    allowed=st.integers(0, 300),
)
def test_machines_exchange_packs_until_they_are_even(
    costs: list[int], machines: int, allowed: int
) -> None:
    values = np.array(costs, float)
    parts = np.array_split(np.arange(len(costs)), machines)
    before = [part.copy() for part in parts]
    exchange_packs(parts, values, allowed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(costs)))
    assert [len(part) for part in parts] == [len(part) for part in before]
    highest = [max(values[part].sum() for part in divided) for divided in (before, parts)]
    assert highest[1] <= highest[0]
    if highest[0] <= allowed:
        assert all(map(np.array_equal, parts, before))


def test_few_packs_of_long_sequences_are_exchanged() -> None:
    """As in a step of 1,024 packs of up to 131,072 tokens, on 16 machines."""
    rng = np.random.default_rng(0)
    costs = rng.lognormal(0, 0.4, 1024)
    parts = np.array_split(np.arange(1024), 16)
    sums = [costs[part].sum() for part in parts]
    assert max(sums) > 1.07 * np.mean(sums)
    before = [{*part.tolist()} for part in parts]
    exchange_packs(parts, costs, 0.0)
    assert max(costs[part].sum() for part in parts) <= 1.02 * np.mean(sums)
    assert sum(len({*part.tolist()} - own) for part, own in zip(parts, before, strict=True)) < 40


def test_a_step_of_long_packs_is_balanced_over_machines_and_ranks() -> None:
    """The slowest rank has at most 1.08 times the mean work, for 8 packs per rank."""
    shards = np.full(20, 256)
    longest = np.clip(np.random.default_rng(0).lognormal(9.5, 1.2, shards.sum()), 1, 131_072)
    tokens = np.full(shards.sum(), 131_072)
    costs = PackCosts(
        KnownSizes(tokens, (longest * 131_072).astype(np.int64)), shards, 1 / (12 * 4096)
    )
    for machines in (1, 16):
        build = BuildOrder(ShardLanes(shards, 16), machines, costs)
        plan = StepPlan(packs=5120, rows=2, accumulation=4, world=128, build=build)
        order = plan.order(0)
        for step in range(5):
            packs = plan.divide_step(order, step, build).reshape(128, 8)
            work = costs(packs.ravel()).reshape(128, 8).sum(axis=1)
            assert work.max() <= 1.08 * work.mean()
            in_order = costs(order[step * 1024 : step * 1024 + 1024]).reshape(128, 8).sum(axis=1)
            assert in_order.max() > 1.25 * in_order.mean()


def test_the_costs_are_those_of_tokens_and_squares(tmp_path: Path) -> None:
    packs = make_packs(23)
    build = write_build(
        tmp_path / "packs", packs, tokenizer={"name": "", "fingerprint": ""}, shard_packs=5
    )
    config = LlamaConfig(hidden_size=64)
    shards = open_shards(build)
    order = BuildOrder.of(shards, 1, config)
    wanted = np.array(
        [pack.seq_lengths.sum() + (pack.seq_lengths**2).sum() / (12 * 64) for pack in packs.packs]
    )
    costs = pickle.loads(pickle.dumps(order)).costs  # as for a worker that is spawned
    for chosen in ([22, 0, 7, 7, 4, 5], [], [*range(23)]):
        np.testing.assert_allclose(costs(np.array(chosen, np.int64)), wanted[chosen], rtol=1e-6)
    assert order.lanes.packs_per_shard.tolist() == [5, 5, 5, 5, 3]
    assert order.lanes.lanes == 4
    assert order.with_lanes(2).lanes.lanes == 2


def test_costs_of_old_shards_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfttrain.data.step_balance._MOST_SHARDS", 2)
    tokens = np.arange(12)
    costs = PackCosts(KnownSizes(tokens, tokens), np.full(4, 3), 0.0)
    for packs in ([0, 3, 6, 9], [1, 11], [*range(12)]):
        assert costs(np.array(packs)).tolist() == packs
        assert len(costs._known) <= 2


def test_the_cost_of_attention_has_a_default() -> None:
    assert attention_cost(LlamaConfig(hidden_size=64)) == 1 / (12 * 64)
    assert attention_cost(object()) == 1 / (12 * 4096)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_the_packs_of_the_plan_in_every_epoch(tmp_path: Path, workers: int) -> None:
    packs = make_packs(11)
    build = write_build(
        tmp_path / "packs", packs, tokenizer={"name": "", "fingerprint": ""}, shard_packs=3
    )
    shards = open_shards(build)
    order = BuildOrder.of(shards, 1, None)
    plan = StepPlan(packs=11, rows=2, accumulation=2, world=2, build=order)
    loader = PackLoader(shards, StepSampler(plan, 1), workers=workers)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        batches = [row["input_ids"][0].tolist() for row in loader]
        wanted = [
            [token for pack in batch for token in packs[pack].input_ids.tolist()] or [0, 0]
            for step in steps_of(plan, epoch)
            for batch in step[1]
        ]
        assert batches == wanted

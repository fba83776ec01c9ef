"""Order of the packs of a build by shard lanes: its cost, what is read, and the balance of ranks.

python -m benchmarks.lanes                      # a minute
python -m benchmarks.lanes --permute 100000000  # also the permutation of 10^8 packs: 1.6 GB
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.packing import DEFAULT_LENGTHS, machine_line
from sftprep.packing import pack_lengths
from sfttrain.data.shard_lanes import ShardLanes, default_lanes
from sfttrain.data.step_balance import PackCosts
from sfttrain.data.step_plan import BuildOrder, StepPlan

EPILOG = """
first table: the order of an epoch
  open     CPU time and peak memory until the first pack is known
  seek     mean CPU time to find the pack at a random position
  step     mean CPU time to find the packs of a step of 1,024
  The permutation of all packs has the same columns; there, a seek is an access to an array.

second table: what is read
  1,024 ranks on 128 machines with 8 loader workers each; steps of 8 packs per rank. A machine reads
  a shard if one of its ranks uses a pack of it, and a worker reads a block of 64 packs, whose
  digest it checks, if it uses a pack of it.
  machine  shards that a machine reads, in shares of 1/128 of all
  worker   packs in the blocks that a worker reads, for each pack that it uses

third table: the slowest rank over the mean of all ranks
  1,024 ranks, 8 micro-steps of one pack, mean of --steps steps; the cost of a pack is that of a
  model of 8 billion parameters: 6 N per token and 6 * layers * width per token and position.
  attention   its share of the cost
  in order    the packs of a step are divided in the order of the epoch
  balanced    by their costs: on one machine, and on 128 machines with their own shards
  step, micro ranks wait for each other after each step, or after each micro-step
  foreign     packs that a machine has in exchange for packs of its own shards, of 128 machines
"""

PACKS_PER_SHARD = 1000
BLOCK_PACKS = 64
PARAMETERS, LAYERS, WIDTH = 8e9, 32, 4096


@dataclass(frozen=True)
class KnownSizes:
    """Packs of which only the sizes are known."""

    tokens: NDArray[np.int64]
    sum_of_squares: NDArray[np.int64]

    def sizes(self, packs: ArrayLike) -> KnownSizes:
        """Return the sizes of some packs."""
        return KnownSizes(self.tokens[packs], self.sum_of_squares[packs])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packs", type=int, nargs="+", default=[10**6, 10**7, 10**8], help="sizes of builds"
    )
    parser.add_argument(
        "--permute", type=int, default=10**7, help="largest build whose packs are permuted"
    )
    parser.add_argument("--steps", type=int, default=4, help="steps whose balance is measured")
    parser.add_argument(
        "--lengths", type=Path, default=DEFAULT_LENGTHS, help="folder of .npy files of real lengths"
    )
    options = parser.parse_args()
    print(machine_line())
    print(f"\n{'order':<14}{'packs':>13}{'open':>11}{'memory':>11}{'seek':>11}{'step':>11}")
    for packs in options.packs:
        lanes = make_lanes(packs)
        print_order("shard lanes", packs, lambda lanes=lanes: lanes.order(seed=0, epoch=1))
        if packs <= options.permute:
            print_order("permutation", packs, lambda packs=packs: permute_all(packs))
    print(f"\n{'order':<14}{'shards':>10}{'machine':>10}{'worker':>10}")
    for shards in (976, 3904):
        print_reads(shards)
    print(f"\n{'':<34}{'in order':>18}{'balanced, 1':>18}{'balanced, 128':>18}")
    print(
        f"{'lengths':<14}{'T':>9}{'attention':>11}"
        + f"{'step':>9}{'micro':>9}" * 3
        + f"{'foreign':>10}"
    )
    for name, capacity, lengths in make_lengths(options.lengths, 8192 * options.steps):
        print_balance(name, capacity, lengths, options.steps)


def make_lanes(packs: int) -> ShardLanes:
    """Return shards of 1,000 packs; every 40th is smaller, as the last one of a group."""
    shards = np.full(-(-packs // PACKS_PER_SHARD), PACKS_PER_SHARD, np.int64)
    shards[::40] = np.random.default_rng(0).integers(1, PACKS_PER_SHARD, len(shards[::40]))
    return ShardLanes(shards, default_lanes(len(shards)))


def permute_all(packs: int) -> NDArray[np.int64]:
    """Return the order of packs that are not those of a build."""
    return np.random.Generator(np.random.Philox(key=[0, 1])).permutation(packs)


def print_order(name: str, packs: int, make: Callable[[], Any]) -> None:
    tracemalloc.start()
    make()[[0]]
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    begin = time.process_time()
    order = make()
    order[[0]]
    opened = time.process_time() - begin
    positions = np.random.default_rng(1).integers(0, packs // 2, 300)
    begin = time.process_time()
    for position in positions:
        order[[position]]
    sought = (time.process_time() - begin) / len(positions)
    begin = time.process_time()
    for position in positions[:50]:
        order[np.arange(position, position + 1024)]
    step = (time.process_time() - begin) / 50
    print(
        f"{name:<14}{packs:>13,}{1e3 * opened:>8.1f} ms{memory / 1e6:>8.1f} MB"
        f"{1e3 * sought:>8.3f} ms{1e3 * step:>8.3f} ms",
        flush=True,
    )


def print_reads(shards: int) -> None:
    machines, ranks, workers = 128, 8, 8
    lanes = make_lanes(shards * PACKS_PER_SHARD)
    packs = int(lanes.packs_per_shard.sum())
    tokens = np.random.default_rng(0).integers(3500, 4096, packs)
    costs = PackCosts(KnownSizes(tokens, 800 * tokens), lanes.packs_per_shard, 1 / (12 * WIDTH))
    build = BuildOrder(lanes, machines, costs)
    plan = StepPlan(packs=packs, rows=1, accumulation=8, world=machines * ranks, build=build)
    order = plan.order(0)
    steps = packs // plan.packs_per_step
    # The packs of the first machine by worker: batch n of a rank is made by worker n % workers.
    used = np.array(
        [plan.divide_step(order, step, build)[:ranks].reshape(ranks, -1) for step in range(steps)]
    )
    random = np.random.default_rng(0).permutation(packs)[: used.size].reshape(used.shape)
    for name, of_workers in (("shard lanes", used), ("permutation", random)):
        shard = np.searchsorted(lanes.pack_ends, of_workers, side="right")
        row = of_workers - (lanes.pack_ends - lanes.packs_per_shard)[shard]
        block = shard * PACKS_PER_SHARD + row // BLOCK_PACKS
        read = [
            len(np.unique(block[:, rank, worker::workers]))
            for rank in range(ranks)
            for worker in range(workers)
        ]
        share = len(np.unique(shard)) / shards * machines
        for_each = np.mean(read) * BLOCK_PACKS / (steps * 8 / workers)
        print(f"{name:<14}{shards:>10,}{share:>10.2f}{for_each:>10.1f}", flush=True)


def make_lengths(folder: Path, packs: int) -> Iterator[tuple[str, int, NDArray[np.int64]]]:
    """Yield names, capacities and lengths that fill at least a number of packs."""
    rng = np.random.default_rng(0)
    files = sorted(folder.glob("*sharegpt*.npy")) if folder.is_dir() else []
    for capacity in (4096, 32768, 131072):
        kinds = [(file.stem.split("_")[2], np.load(file)) for file in files]
        kinds.append(("log-normal", rng.lognormal(np.log(6000), 1.0, 200_000).astype(np.int64)))
        for name, lengths in kinds:
            cut = np.clip(lengths.astype(np.int64), 1, capacity)
            yield name, capacity, rng.choice(cut, int(1.02 * packs * capacity / cut.mean()))


def print_balance(name: str, capacity: int, lengths: NDArray[np.int64], steps: int) -> None:
    plan = pack_lengths(lengths, capacity)
    # The builder shuffles packs; the last packs of a plan are the least full ones.
    bins = np.random.default_rng(0).permutation(plan.num_bins)[plan.bin_of]
    tokens, squares = (
        np.bincount(bins, weights=values).astype(np.int64) for values in (lengths, lengths**2)
    )
    shards = np.full(plan.num_bins // PACKS_PER_SHARD, PACKS_PER_SHARD)
    count = int(shards.sum())
    attention = 6 * LAYERS * WIDTH * squares[:count].astype(float)
    true_costs = 6 * PARAMETERS * tokens[:count] + attention
    costs = PackCosts(KnownSizes(tokens, squares), shards, 1 / (12 * WIDTH))
    values = []
    for machines in (0, 1, 128):
        build = BuildOrder(ShardLanes(shards, default_lanes(len(shards))), max(1, machines), costs)
        step_plan = StepPlan(packs=count, rows=1, accumulation=8, world=1024, build=build)
        orders = [*divide(step_plan, steps, balanced=machines > 0)]
        values += slowest_over_mean([true_costs[packs] for packs in orders])
    step_plan = replace(step_plan, build=replace(build, costs=None))
    without = divide(step_plan, steps, balanced=True)
    foreign = np.mean([share_of_foreign(*both, 128) for both in zip(orders, without, strict=True)])
    share = attention.sum() / true_costs.sum()
    print(
        f"{name:<14}{capacity:>9,}{share:>11.1%}"
        + "".join(f"{value:>9.3f}" for value in values)
        + f"{foreign:>10.2%}",
        flush=True,
    )


def divide(plan: StepPlan, steps: int, *, balanced: bool) -> Iterator[NDArray[np.int64]]:
    """Yield the packs of steps: int64 [ranks, micro-steps]."""
    order = plan.order(0)
    for step in range(min(steps, plan.packs // plan.packs_per_step)):
        if balanced:
            yield plan.divide_step(order, step, plan.build).reshape(plan.world, -1)
        else:
            begin = step * plan.packs_per_step
            yield order[begin : begin + plan.packs_per_step].reshape(-1, plan.world).T


def slowest_over_mean(work: list[NDArray[np.float64]]) -> tuple[float, float]:
    """Return the time of a step over the mean work of a rank.

    The first value is for ranks that wait at the end of each step, the second for ranks that wait
    after each micro-step.

    Args:
        work: For each step, the work of each rank and micro-step.
    """
    at_steps = [step.sum(axis=1).max() / step.sum(axis=1).mean() for step in work]
    at_micro_steps = [step.max(axis=0).sum() / step.mean(axis=0).sum() for step in work]
    return float(np.mean(at_steps)), float(np.mean(at_micro_steps))


def share_of_foreign(found: NDArray[np.int64], own: NDArray[np.int64], machines: int) -> float:
    """Return the share of the packs of machines that are not from their own shards.

    Args:
        found: int64 [ranks, micro-steps]; the packs of a step.
        own: The same without exchanges between machines.
        machines: The number of machines.
    """
    pairs = zip(np.split(found, machines), np.split(own, machines), strict=True)
    return sum(int((~np.isin(one, other)).sum()) for one, other in pairs) / found.size


if __name__ == "__main__":
    main()

"""The plan of an epoch: the packs of each optimizer step, of each rank and of each device batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sftprep import Shards
from sfttrain.data.shard_lanes import (
    MOST_PLANNED_LANES,
    LaneOrder,
    ShardLanes,
    default_lanes,
)
from sfttrain.data.step_balance import (
    PackCosts,
    assign_packs,
    attention_cost,
    exchange_packs,
)


class PackOrder(Protocol):
    """The indices of packs by their positions in an epoch; an array is one."""

    def __getitem__(self, positions: Any, /) -> NDArray[np.int64]:
        """Return the indices of the packs at positions: a slice, or integers [n]."""
        ...


@dataclass(frozen=True, eq=False)
class BuildOrder:
    """How the packs of a build are shuffled and divided among ranks."""

    lanes: ShardLanes
    """The shard lanes."""
    machines: int = 1
    """Number of machines; the ranks of each are consecutive, and equally many."""
    costs: PackCosts | None = None
    """The costs of the packs; None if they are not known."""

    @classmethod
    def of(cls, shards: Shards, machines: int, config: Any) -> BuildOrder:
        """Return the order of a build.

        Args:
            shards: The build.
            machines: The number of machines that train on it.
            config: The configuration of the model.
        """
        manifest = shards.manifest
        packs = [np.frombuffer(group.packs, np.int64) for group in manifest.groups]
        packs_per_shard = np.concatenate([np.zeros(0, np.int64), *packs])
        lanes = ShardLanes(packs_per_shard, default_lanes(len(packs_per_shard)))
        if manifest.layout == "sequences":  # its packs are read group by group
            groups = min(MOST_PLANNED_LANES, len(packs_per_shard))
            lanes = ShardLanes(packs_per_shard, default_lanes(groups), window=1)
        # Builds before version 2.0 have no index with the sizes of their packs.
        costs = PackCosts(shards, packs_per_shard, attention_cost(config))
        return cls(lanes, machines, costs if manifest.has_slices else None)

    def with_lanes(self, lanes: int) -> BuildOrder:
        """Return this order with another number of shard lanes."""
        return replace(self, lanes=replace(self.lanes, lanes=lanes))


@dataclass(frozen=True)
class StepPlan:
    """Assignment of packs to steps.

    It is a pure function of the seed, the epoch and the step. A step has the packs at the next
    `packs_per_step` positions of the epoch, for any number of ranks that share them. Runs on
    different numbers of ranks are therefore equal if rows * accumulation * world is equal.
    """

    packs: int
    """Packs in an epoch."""
    rows: int
    """Packs in a device batch."""
    accumulation: int = 1
    """Device batches of a rank in an optimizer step."""
    world: int = 1
    """Number of ranks."""
    seed: int = 0
    """Seed of the order."""
    shuffle: bool = True
    """Whether each epoch has an order of its own; else packs keep the order of the source."""
    drop_last: bool = False
    """Whether the last step of an epoch is omitted if it is smaller than the others."""
    build: BuildOrder | None = None
    """The order of the packs of a build; None for other packs, which are shuffled together."""

    @property
    def packs_per_step(self) -> int:
        """Number of packs in a full optimizer step, over all ranks."""
        return self.rows * self.accumulation * self.world

    @property
    def batches(self) -> int:
        """Number of device batches of each rank in an epoch.

        It is equal on all ranks, and each rank computes it without communication.
        """
        full_steps, rest = divmod(self.packs, self.packs_per_step)
        tail = -(-rest // (self.rows * self.world))
        return full_steps * self.accumulation + (0 if self.drop_last and full_steps else tail)

    def state(self, step: int) -> dict[str, Any]:
        """Return the values by which a resume recognizes the packs that a run trained on.

        Args:
            step: The number of steps since the start of the run.

        Returns:
            Fields of `RunState`: the size of a step, the order, and the epoch and the position in
            it at which the next step begins.
        """
        steps = max(1, -(-self.batches // self.accumulation))
        return {
            "packs_per_step": self.packs_per_step,
            "seed": self.seed,
            "lanes": self.build.lanes.lanes if self.build is not None and self.shuffle else 0,
            "epoch": step // steps,
            "position": step % steps * self.packs_per_step,
        }

    def order(self, epoch: int) -> PackOrder:
        """Return the packs in the order of the epoch."""
        if not self.shuffle:
            return np.arange(self.packs, dtype=np.int64)
        if self.build is not None:
            return self.build.lanes.order(self.seed, epoch)
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.packs)

    def batches_of_rank(self, order: PackOrder, step: int, rank: int) -> list[NDArray[np.int64]]:
        """Return the packs of each device batch of a rank in a step.

        Args:
            order: The order of the epoch.
            step: The 0-based number of the step within the epoch.
            rank: The rank.

        Returns:
            For each device batch, int64 with at most `rows` indices of packs; none where the last
            step has no packs left. All ranks have equally many batches.
        """
        if self.build is not None and isinstance(order, LaneOrder) and self.world > 1:
            batches = self.divide_step(order, step, self.build)[rank]
            return [batch[batch >= 0] for batch in batches]
        positions = self._positions(step)
        # Each device batch of all ranks together takes this number of positions.
        taken = self.rows * self.world
        firsts = (begin + rank * self.rows for begin in range(0, len(positions), taken))
        return [order[positions[first : first + self.rows]] for first in firsts]

    def divide_step(self, order: LaneOrder, step: int, build: BuildOrder) -> NDArray[np.int64]:
        """Divide the packs of a step of a build among the ranks.

        Args:
            order: The order of the epoch.
            step: The 0-based number of the step within the epoch.
            build: The machines, and the costs of the packs.

        Returns:
            int64 [ranks, device batches, rows]; -1 for none.
        """
        positions = self._positions(step)
        slots = -(-len(positions) // (self.rows * self.world)) * self.rows
        # 1. Each machine gets the packs of one range of the shard order, so that it reads a part of
        #    the shards.
        packs = order[positions[np.argsort(order.ranges(positions), kind="stable")]]
        parts = np.array_split(np.arange(len(packs)), build.machines)
        # 2. It exchanges some of them with other machines if its part has more work; but not if all
        #    wait longer for the rank with the most expensive pack.
        ranks = self.world // build.machines
        costs = np.ones(len(packs)) if build.costs is None else build.costs(packs)
        longest = float(costs.max() + (slots - 1) * costs.min())
        exchange_packs(parts, costs, ranks * longest)
        # 3. Its ranks share the packs by their costs.
        of_ranks = [
            np.append(packs[part], -1)[assign_packs(costs[part], ranks, slots)] for part in parts
        ]
        return np.concatenate(of_ranks).reshape(self.world, -1, self.rows)

    def _positions(self, step: int) -> NDArray[np.int64]:
        begin = step * self.packs_per_step
        return np.arange(begin, min(begin + self.packs_per_step, self.packs))

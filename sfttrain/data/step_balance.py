"""Division of the packs of an optimizer step among machines and ranks, by their cost.

The cost of a pack is its tokens plus, for attention, a share of the sum of the squares of its
sequence lengths. All ranks wait for the slowest one at the end of a step, and with sharded weights
at each micro-step. The division does not change which packs a step has, so it does not change its
gradient.
"""

from __future__ import annotations

import heapq
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DEFAULT_WIDTH = 4096
_TOLERANCE = 0.02
"""How far the cost of a machine may be above the mean before it exchanges packs with another."""
_MOST_SHARDS = 8192
"""The most shards whose costs are kept: twice as many as the windows of all shard lanes have."""


class SizedPacks(Protocol):
    """Packs whose sizes are known without reading them, such as those of a build."""

    def sizes(self, packs: ArrayLike) -> Any:
        """Return `tokens` and `sum_of_squares` of packs, each as integers [n]."""
        ...


def attention_cost(config: Any) -> float:
    """Return the cost of a squared sequence length, relative to that of a token.

    A token costs 6 N operations for N parameters; attention within a sequence of n tokens costs
    6 * layers * width * n * n. A usual layer has 12 * width * width parameters, so the ratio is
    1 / (12 * width).

    Args:
        config: The configuration of a model; without a `hidden_size`, a width of 4,096 is assumed.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return 1 / (12 * (getattr(config, "hidden_size", None) or _DEFAULT_WIDTH))


class PackCosts:
    """The costs of the packs of a build, in tokens.

    Args:
        packs: The packs.
        packs_per_shard: int64 [shards]; the number of packs in each shard.
        attention: The cost of a squared sequence length; see `attention_cost`.
    """

    def __init__(
        self, packs: SizedPacks, packs_per_shard: NDArray[np.int64], attention: float
    ) -> None:
        self._packs, self._attention = packs, attention
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(packs_per_shard)])
        # By number of the shard: float32 [packs]. An epoch goes through the shards of a window
        # together, and does not come back to them; the oldest are dropped.
        self._known: dict[int, NDArray[np.float32]] = {}

    def __call__(self, packs: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the cost of each pack: float64 [n]."""
        costs = np.empty(len(packs))
        shards = np.searchsorted(self._starts, packs, side="right") - 1
        order = np.argsort(shards, kind="stable")
        numbers, firsts = np.unique(shards[order], return_index=True)
        for number, members in zip(numbers.tolist(), np.split(order, firsts)[1:], strict=True):
            costs[members] = self._of_shard(number)[packs[members] - self._starts[number]]
        return costs

    def _of_shard(self, number: int) -> NDArray[np.float32]:
        found = self._known.get(number)
        if found is None:
            sizes = self._packs.sizes(np.arange(self._starts[number], self._starts[number + 1]))
            found = (sizes.tokens + self._attention * sizes.sum_of_squares).astype(np.float32)
            if len(self._known) == _MOST_SHARDS:
                del self._known[next(iter(self._known))]
            self._known[number] = found
        return found


def exchange_packs(parts: list[NDArray[np.int64]], costs: NDArray[Any], allowed: float) -> None:
    """Exchange packs between machines, in place, until their costs are about equal.

    Machines have shards of their own, so this exchanges as few packs as it can: two at a time,
    between the machines with the highest and the lowest cost. Packs of a few thousand tokens need
    none.

    Args:
        parts: For each machine, int64 [n]; indices of its packs.
        costs: Numbers; the cost of each pack.
        allowed: The cost of a machine up to which nothing is gained by an exchange.
    """
    sums = np.array([costs[part].sum() for part in parts])
    limit = max(allowed, (1 + _TOLERANCE) * sums.mean())
    for _ in costs:  # fewer are needed
        high, low = int(sums.argmax()), int(sums.argmin())
        if sums[high] <= limit or not len(parts[low]):
            return
        # The pair whose exchange makes the two costs as equal as possible.
        gains = costs[parts[high]][:, None] - costs[parts[low]]
        pair = np.abs(gains - (sums[high] - sums[low]) / 2).argmin()
        one, other = np.unravel_index(pair, gains.shape)
        gain = gains[one, other]
        if not 0 < gain < sums[high] - sums[low]:
            return
        parts[high][one], parts[low][other] = parts[low][other], parts[high][one]
        sums[high] -= gain
        sums[low] += gain


def assign_packs(costs: NDArray[Any], ranks: int, slots: int) -> NDArray[np.int64]:
    """Assign packs to ranks, so that the ranks have about equal costs.

    The most expensive pack is assigned first, and each pack to the rank with the lowest cost so far
    that has room. So the packs of a slot have similar costs too.

    Args:
        costs: Numbers [n], with n <= ranks * slots; the cost of each pack.
        ranks: The number of ranks.
        slots: The most packs of a rank.

    Returns:
        int64 [ranks, slots]; the index of a pack, or -1 for none.

    Example:
        costs [1, 5, 4, 2, 3], 2 ranks, 3 slots  ->  [[1, 3, 0], [2, 4, -1]]
    """
    table = np.full((ranks, slots), -1, np.int64)
    # Of each rank with room: its cost, and its packs so far.
    waiting = [(0.0, 0, rank) for rank in range(ranks)]
    for pack in np.argsort(-costs, kind="stable").tolist():
        cost, count, rank = heapq.heappop(waiting)
        table[rank, count] = pack
        if count + 1 < slots:
            heapq.heappush(waiting, (cost + float(costs[pack]), count + 1, rank))
    return table

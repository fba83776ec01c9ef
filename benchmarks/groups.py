"""Packs of a build in groups, compared with one plan for all sequences.

    python -m benchmarks.groups
    python -m benchmarks.groups --group-bytes 67108864 --capacities 4096 32768

A group is planned alone, so a build of several groups may need a few more packs than one plan. The
lengths of each group are drawn from a distribution; the plans are made by counts, so that 20 groups
of 1 GiB take a second. The columns are the packs above the lower bound, ceil(tokens / capacity), in
percent of it, and the packs that the groups need in addition to those of one plan, in percent.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np

from benchmarks.packing import GENERATED, machine_line
from benchmarks.plans import over_bound
from sftprep.packing import plan_counts

BYTES_PER_TOKEN = 4.65
"""The input of a build per token of its packs, measured on chats as JSON."""


@dataclass(frozen=True, slots=True)
class Row:
    """The packs of one distribution and capacity."""

    sequences: int
    groups_over_bound: float  # percent
    plan_over_bound: float  # percent
    groups_over_plan: float  # percent


def measure(name: str, capacity: int, group_bytes: int, groups: int, seed: int = 0) -> Row:
    """Return the packs of groups, and of one plan for all of them.

    Args:
        name: The distribution: a key of GENERATED.
        capacity: The capacity of a pack, in tokens.
        group_bytes: The size of a group.
        groups: The number of groups.
        seed: The seed of the lengths.
    """
    rng = np.random.default_rng(seed)
    sample = np.bincount(GENERATED[name](rng, 1_000_000, capacity), minlength=capacity + 1)
    lengths = np.flatnonzero(sample)
    shares = sample[lengths] / sample.sum()
    size = int(group_bytes / BYTES_PER_TOKEN / (lengths @ shares))
    counts = rng.multinomial(size, shares, size=groups)
    packs = sum(plan_counts((lengths, of_group), capacity).num_bins for of_group in counts)
    plan = plan_counts((lengths, counts.sum(axis=0)), capacity)
    return Row(
        sequences=size * groups,
        groups_over_bound=over_bound(packs, plan.tokens, capacity),
        plan_over_bound=over_bound(plan.num_bins, plan.tokens, capacity),
        groups_over_plan=100 * (packs / plan.num_bins - 1),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--capacities", type=int, nargs="+", default=[2_048, 4_096, 32_768])
    parser.add_argument("--group-bytes", type=int, default=1 << 30)
    parser.add_argument("--groups", type=int, default=20)
    options = parser.parse_args()
    print(machine_line())
    print(f"{'lengths':<12}{'capacity':>9}{'sequences':>13}{'groups':>11}{'plan':>11}{'more':>11}")
    for name in GENERATED:
        for capacity in options.capacities:
            row = measure(name, capacity, options.group_bytes, options.groups)
            print(
                f"{name:<12}{capacity:>9,}{row.sequences:>13,}{row.groups_over_bound:>10.4f}%"
                f"{row.plan_over_bound:>10.4f}%{row.groups_over_plan:>10.4f}%",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Packs above the lower bound of TRL, best-fit decreasing and exact packing, and plans by counts.

All planners get the same lengths in the same run. Real lengths come from a folder of .npy files, if
there is one; the others are generated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.packers import PEERS, Lengths, Packs
from benchmarks.packing import (
    DEFAULT_LENGTHS,
    GENERATED,
    check,
    machine_line,
    time_calls,
)
from sftprep.packing import Moves, pack_lengths, plan_counts

MANY = 10**9
NAMED = 10**6
PARTITIONS = 100

EPILOG = """
first table: the packers
  TRL windows      trl.data_utils.pack_dataset as its trainer calls it: windows of 1,000 rows
  TRL one plan     TRL's segment tree over all sequences: only the plan, as for sftprep
  bfd, exact       pack_lengths with this strategy
  The first number is the packs above the lower bound, ceil(tokens / capacity), in percent of it;
  the second is seconds. Each non-empty sequence is in one pack, and no pack exceeds the capacity;
  TRL with one plan has as many packs as bfd. A peer that is not installed is omitted.

second table: plan_counts of 10^9 sequences with the distribution of each row
  ms, kB, moves    the time, the peak memory and the size of the plan of bfd
  exact s, kB      the same for exact
  bfd, exact       packs above the lower bound, in percent
  bins per second  sequences named by Moves.bins_of, for the sequences of the first table, repeated
                   up to 10^6, in 100 partitions; the bins are compared with those of pack_lengths
                   (both strategies)

examples
  python -m benchmarks.plans
  python -m benchmarks.plans --sizes 10000000 --capacities 4096 --without-trl
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One distribution and capacity in both tables."""

    lengths: str  # name of the distribution
    sequences: int
    capacity: int  # tokens
    over_percent: dict[str, float]  # packs above the lower bound, by packer
    seconds: dict[str, float]  # by packer
    moves: int  # of the plan of bfd for 10^9 sequences
    milliseconds: dict[str, float]  # of `plan_counts` for 10^9 sequences, by strategy
    kilobytes: dict[str, float]  # its peak memory
    over_percent_many: dict[str, float]  # its packs above the lower bound
    named_per_second: float  # sequences


def main() -> int:
    options = parse()
    print(machine_line())
    rows = []
    columns = [
        *(["TRL windows", "TRL one plan"] if not options.without_trl else []),
        "bfd",
        "exact",
    ]
    head = "".join(f"{name:>21}" for name in columns)
    print(f"{'lengths':<24}{'sequences':>11}{'capacity':>9}{head}")
    for name, lengths, capacity in cases(options):
        rows.append(measure(name, lengths, capacity, options))
        print(format_packers(rows[-1], columns), flush=True)
    print(f"\nplan_counts of {MANY:,} sequences")
    print(
        f"{'lengths':<24}{'capacity':>9}{'ms':>9}{'kB':>8}{'moves':>8}{'bfd':>10}"
        f"{'exact s':>10}{'kB':>8}{'exact':>10}{'bins per second':>17}"
    )
    for row in rows:
        print(format_counts(row))
    if options.json:
        document = {"machine": machine_line(), "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", metavar="N", default=[100_000], help="generated sequences")
    add("--capacities", type=int, nargs="+", metavar="C", default=[2_048, 4_096])
    add("--lengths", type=Path, metavar="DIR", default=DEFAULT_LENGTHS, help="real lengths")
    add("--without-trl", action="store_true", help="only sftprep")
    add("--json", metavar="FILE", help="write the rows as JSON")
    return parser.parse_args()


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Lengths, int]]:
    """Yield name, lengths and capacity of each case; lengths are truncated to the capacity."""
    for file in sorted(options.lengths.glob("*.npy")) if options.lengths.is_dir() else []:
        for capacity in options.capacities:
            lengths = np.minimum(np.load(file), capacity).astype(np.int32)
            yield file.stem.removeprefix("qwen3_chatml_"), lengths, capacity
    for name, generate in GENERATED.items():
        for size in options.sizes:
            for capacity in options.capacities:
                yield name, generate(np.random.default_rng(0), size, capacity), capacity


def measure(name: str, lengths: Lengths, capacity: int, options: argparse.Namespace) -> Row:
    """Return the row of a distribution."""
    over, seconds = measure_packers(lengths, capacity, options)
    # The same distribution with 10^9 sequences.
    distinct, counts = np.unique(lengths[lengths > 0], return_counts=True)
    many = (counts * (MANY // counts.sum() + 1)).astype(np.int64)
    milliseconds, kilobytes, over_many, moves = {}, {}, {}, 0
    for strategy in ("bfd", "exact"):
        plan_counts((distinct, many), capacity, strategy)
        spent, plan = time_calls(
            lambda strategy=strategy: plan_counts((distinct, many), capacity, strategy), 3
        )
        tracemalloc.start()
        plan_counts((distinct, many), capacity, strategy)
        kilobytes[strategy] = tracemalloc.get_traced_memory()[1] / 1_000
        tracemalloc.stop()
        milliseconds[strategy] = spent * 1_000
        over_many[strategy] = over_bound(plan.num_bins, plan.tokens, capacity)
        moves = moves or len(plan.moves)
    return Row(
        lengths=name,
        sequences=lengths.size,
        capacity=capacity,
        over_percent=over,
        seconds=seconds,
        moves=moves,
        milliseconds=milliseconds,
        kilobytes=kilobytes,
        over_percent_many=over_many,
        named_per_second=measure_names(lengths, capacity),
    )


def measure_packers(
    lengths: Lengths, capacity: int, options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the packs above the lower bound in percent, and the seconds, of each packer."""
    import sftprep.packing.bestfit  # noqa: F401  # otherwise loaded by the first large plan

    tokens = int(lengths.sum(dtype=np.int64))
    over, seconds = {}, {}
    for name, peer_name in (("TRL windows", "TRL pack_dataset"), ("TRL one plan", "TRL planning")):
        peer = next(peer for peer in PEERS if peer.name == peer_name)
        is_too_large = lengths.size > peer.most_sequences or tokens > peer.most_tokens
        if options.without_trl or not peer.is_installed or is_too_large:
            continue
        seconds[name], result = time_calls(peer.start(lengths, capacity), 1)
        packs = peer.packs(result, lengths)
        check(name, packs, lengths, capacity)
        over[name] = over_bound(packs.offsets.size - 1, tokens, capacity)
    for strategy in ("bfd", "exact"):
        pack_lengths(lengths, capacity, strategy)
        seconds[strategy], plan = time_calls(
            lambda strategy=strategy: pack_lengths(lengths, capacity, strategy), 3
        )
        packs = Packs(lengths[plan.members].astype(np.int64), plan.offsets)
        check(strategy, packs, lengths, capacity)
        over[strategy] = over_bound(plan.num_bins, tokens, capacity)
    if over.get("TRL one plan", over["bfd"]) != over["bfd"]:
        raise SystemExit(f"check failed: TRL and bfd have other numbers of packs at {capacity}")
    return over, seconds


def over_bound(packs: int, tokens: int, capacity: int) -> float:
    """Return the packs above the lower bound, in percent of it."""
    bound = max(1, -(-tokens // capacity))
    return 100 * (packs - bound) / bound


def measure_names(lengths: Lengths, capacity: int) -> float:
    """Return the sequences per second of `Moves.bins_of` in 100 partitions.

    Exits if a bin differs from that of `pack_lengths`.
    """
    lengths = np.tile(lengths, max(1, NAMED // lengths.size))
    distinct, counts = np.unique(lengths, return_counts=True)
    seconds = 0.0
    for strategy in ("bfd", "exact"):
        plan = plan_counts((distinct, counts), capacity, strategy)
        seconds, bins = name_partitions(plan, lengths)
        if not np.array_equal(bins, pack_lengths(lengths, capacity, strategy).bin_of):
            raise SystemExit(f"check failed: bins by counts differ ({strategy}, {capacity})")
    return lengths.size / seconds


def name_partitions(plan: Moves, lengths: Lengths) -> tuple[float, NDArray[np.int64]]:
    """Return the seconds for naming, and the bins; the last partition is named first."""
    parts = np.array_split(lengths, PARTITIONS)
    bins: list[NDArray[np.int64]] = []
    first_ranks, seconds = plan.counts.copy(), 0.0
    for part in reversed(parts):
        classes = np.searchsorted(plan.lengths, part)
        first_ranks -= np.bincount(classes, minlength=plan.lengths.size)
        begin = time.perf_counter()
        bins.append(plan.bins_of(part, first_ranks))
        seconds += time.perf_counter() - begin
    return seconds, np.concatenate(bins[::-1])


def format_packers(row: Row, columns: list[str]) -> str:
    """Return the line of the first table."""
    cells = [
        f"{row.over_percent[name]:>10.4f}%{row.seconds[name]:>8.3f} s"
        if name in row.seconds
        else f"{'-':>21}"
        for name in columns
    ]
    return f"{row.lengths:<24}{row.sequences:>11,}{row.capacity:>9,}" + "".join(cells)


def format_counts(row: Row) -> str:
    """Return the line of the second table."""
    return (
        f"{row.lengths:<24}{row.capacity:>9,}{row.milliseconds['bfd']:>9.2f}"
        f"{row.kilobytes['bfd']:>8,.0f}{row.moves:>8,}{row.over_percent_many['bfd']:>9.4f}%"
        f"{row.milliseconds['exact'] / 1_000:>10.2f}{row.kilobytes['exact']:>8,.0f}"
        f"{row.over_percent_many['exact']:>9.4f}%{row.named_per_second:>17,.0f}"
    )


if __name__ == "__main__":
    sys.exit(main())

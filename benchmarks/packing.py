"""Speed and density of `pack_lengths`, and of the packers of TRL, ms-swift and Grain on the same
lengths in the same run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packers import PEERS, Lengths, Packs, Peer
from sftprep.packing import pack_lengths

DEFAULT_LENGTHS = (
    Path(__file__).resolve().parents[1].parent / "shared" / "data" / "datasets" / "lengths"
)

EPILOG = """
measurements
  sftprep          pack_lengths(strategy="bfd"): one plan over all sequences. The median of --repeat
                   calls after one call to warm up. (A process that has not loaded the compiled
                   kernels plans up to 200,000 sequences without them.)
  TRL planning     TRL's segment tree in the loop of trl.data_utils._pack_bfd: only the plan, as for
                   sftprep. It gets Python integers, with which it is faster than with the NumPy
                   scalars of the original.
  TRL one window   trl.data_utils._pack_bfd on all sequences at once. It also moves the tokens (of
                   one byte here), which is a third of its time at capacity 4,096 and more above.
  TRL pack_dataset as its trainer calls it: windows of 1,000 rows; it moves the tokens and makes a
                   dataset.
  binpacking       binpacking.to_constant_volume, the packer of ms-swift: only the plan.
  Grain            the best-fit and first-fit packers of grain.experimental, with 64 open bins:
                   padded rows of tokens.
  A peer runs once if a call takes more than two seconds, else three times, of which the median
  counts. A peer that is not installed is omitted, and so is each size at which it would take
  minutes (unless --all-sizes is specified).

checks of each row
  Each non-empty sequence is in one pack, and no pack exceeds the capacity. TRL on one window gives
  the packs of sftprep in the same order.

columns
  over    packs above the lower bound, ceil(tokens / capacity), in percent of the bound
  ratio   time of the peer divided by the time of sftprep

examples
  python -m benchmarks.packing --quick
  python -m benchmarks.packing --sizes 1000000 --capacities 4096 --only "TRL planning"
  python -m benchmarks.packing --json packing.json --plot packing.png
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    lengths: str  # name of the distribution
    peer: str
    sequences: int
    capacity: int  # tokens
    seconds: float
    per_second: float  # sequences
    packs: int
    over_percent: float  # packs above the lower bound
    ratio: float  # time relative to sftprep


def main() -> int:
    options = parse()
    rows: list[Row] = []
    print(machine_line())
    for peer in PEERS:
        if is_selected(peer, options) and not peer.is_installed:
            print(f"omitted: {peer.name}, the package {peer.package} is not installed")
    print(
        f"{'lengths':<28}{'packer':<20}{'sequences':>12}{'capacity':>9}{'lengths/s':>14}{'packs':>12}{'over':>8}{'ratio':>10}"
    )
    for name, lengths, capacity in cases(options):
        for row in compare(name, lengths, capacity, options):
            rows.append(row)
            print(
                f"{row.lengths:<28}{row.peer:<20}{row.sequences:>12,}{row.capacity:>9,}{row.per_second:>14,.0f}{row.packs:>12,}"
                f"{row.over_percent:>7.2f}%{row.ratio:>9,.1f}x",
                flush=True,
            )
    if options.json:
        document = {
            "machine": machine_line(),
            "command": sys.argv[1:],
            "rows": [asdict(row) for row in rows],
        }
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, Path(options.plot))
    return 0


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ", ".join(repr(peer.name) for peer in PEERS)
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="10,000 and 100,000 sequences, capacity 4,096, peers up to 10,000: under a minute",
    )
    add(
        "--sizes",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of generated sequences (default 10^4 10^5 10^6 10^7)",
    )
    add("--huge", action="store_true", help="10^8 sequences as well: 6 GB of memory")
    add(
        "--capacities",
        type=int,
        nargs="+",
        metavar="C",
        help="tokens in a pack (default 2048 4096 32768 131072)",
    )
    add(
        "--lengths",
        type=Path,
        metavar="DIR",
        help=f"folder of .npy files of real lengths (default {DEFAULT_LENGTHS})",
    )
    add(
        "--only",
        nargs="+",
        metavar="PACKER",
        help=f"packers to compare with: {names}; sftprep for none",
    )
    add("--all-sizes", action="store_true", help="run peers at every size, regardless of the time")
    add(
        "--repeat",
        type=int,
        default=5,
        metavar="K",
        help="calls of sftprep, of which the median counts (default 5)",
    )
    add("--seed", type=int, default=0, help="seed of the generated lengths (default 0)")
    add("--json", metavar="FILE", help="write the rows as JSON")
    add(
        "--plot",
        metavar="FILE",
        help="plot lengths per second over sequences (.png, .svg, .pdf); needs matplotlib",
    )
    options = parser.parse_args()
    if options.only and (unknown := set(options.only) - {"sftprep", *(p.name for p in PEERS)}):
        parser.error(f"--only: unknown packer {sorted(unknown)[0]!r}; known: {names}")
    if options.lengths and not options.lengths.is_dir():
        parser.error(f"--lengths: {options.lengths} is not a folder")
    if options.repeat < 1:
        parser.error("--repeat: at least one call is needed")
    options.sizes = options.sizes or (
        [10_000, 100_000] if options.quick else [10_000, 100_000, 1_000_000, 10_000_000]
    )
    options.sizes += [100_000_000] if options.huge else []
    options.capacities = options.capacities or (
        [4_096] if options.quick else [2_048, 4_096, 32_768, 131_072]
    )
    return options


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Lengths, int]]:
    """Yield name, lengths and capacity of each case; real lengths come first.

    Lengths above the capacity are reduced to it, as truncation does.
    """
    folder = options.lengths or DEFAULT_LENGTHS
    for file in sorted(folder.glob("*.npy")) if folder.is_dir() else []:
        for capacity in options.capacities:
            yield (
                file.stem.removeprefix("qwen3_chatml_"),
                np.minimum(np.load(file), capacity).astype(np.int32),
                capacity,
            )
    for name, generate in GENERATED.items():
        for size in options.sizes:
            for capacity in options.capacities:
                yield name, generate(np.random.default_rng(options.seed), size, capacity), capacity


def chat_like(rng: np.random.Generator, size: int, capacity: int) -> Lengths:
    """Return log-normal lengths with a mean of about 1,000 and a long tail, as in ShareGPT."""
    return np.clip(rng.lognormal(6.3, 1.1, size).astype(np.int32), 1, capacity)


def short(rng: np.random.Generator, size: int, capacity: int) -> Lengths:
    """Return log-normal lengths around 190 with a short tail, as in GSM8K."""
    return np.clip(rng.lognormal(5.2, 0.34, size).astype(np.int32), 1, capacity)


def uniform(rng: np.random.Generator, size: int, capacity: int) -> Lengths:
    """Return lengths from 1 to the capacity: many distinct lengths, two sequences per pack."""
    return rng.integers(1, capacity, size, dtype=np.int32, endpoint=True)


GENERATED: dict[str, Callable[[np.random.Generator, int, int], Lengths]] = {
    "chat-like": chat_like,
    "short": short,
    "uniform": uniform,
}


def compare(
    name: str, lengths: Lengths, capacity: int, options: argparse.Namespace
) -> Iterator[Row]:
    """Yield the rows of sftprep, and of each installed peer that is fast enough for the size."""
    import sftprep.packing.bestfit  # noqa: F401  # otherwise loaded by the first large plan

    pack_lengths(lengths, capacity)
    ours_seconds, plan = time_calls(lambda: pack_lengths(lengths, capacity), options.repeat)
    ours = Packs(lengths[plan.members].astype(np.int64), plan.offsets)
    check("sftprep", ours, lengths, capacity)
    yield make_row(name, "sftprep", ours, lengths, capacity, ours_seconds, ours_seconds)
    tokens = int(lengths.sum(dtype=np.int64))
    for peer in PEERS:
        if not is_selected(peer, options) or not peer.is_installed:
            continue
        most = min(peer.most_sequences, 10_000) if options.quick else peer.most_sequences
        if lengths.size > most and not options.all_sizes:
            continue
        if tokens > peer.most_tokens:
            print(
                f"{'':<28}{peer.name:<20}omitted: more than {peer.most_tokens:,} tokens to move",
                flush=True,
            )
            continue
        call = peer.start(lengths, capacity)
        seconds, result = time_calls(call, 1)
        if seconds < 2:
            seconds, result = time_calls(call, 3)
        theirs = peer.packs(result, lengths)
        check(peer.name, theirs, lengths, capacity)
        if peer.same_packs and not (
            np.array_equal(ours.lengths, theirs.lengths)
            and np.array_equal(ours.offsets, theirs.offsets)
        ):
            raise SystemExit(
                f"check failed: on {name}, capacity {capacity}, the packs of sftprep differ from"
                f" those of {peer.name}"
            )
        yield make_row(name, peer.name, theirs, lengths, capacity, seconds, ours_seconds)


def time_calls(call: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Return the median seconds of some calls, and the result of the last call."""
    seconds = []
    result = None
    for _ in range(repeat):
        result = None  # releases its memory before the next call
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), result


def check(peer: str, packs: Packs, lengths: Lengths, capacity: int) -> None:
    """Exit unless each non-empty sequence is in one pack, and no pack is empty or too full."""
    sums = (
        np.add.reduceat(packs.lengths, packs.offsets[:-1]) if packs.lengths.size else packs.lengths
    )
    is_valid = (
        np.array_equal(np.sort(packs.lengths), np.sort(lengths[lengths > 0]))
        and packs.offsets[-1] == packs.lengths.size
        and bool(np.all(np.diff(packs.offsets) > 0))
        and int(sums.max(initial=0)) <= capacity
    )
    if not is_valid:
        raise SystemExit(
            f"check failed: {peer} lost or repeated a sequence, or overfilled a pack, at capacity"
            f" {capacity}"
        )


def make_row(
    name: str, peer: str, packs: Packs, lengths: Lengths, capacity: int, seconds: float, ours: float
) -> Row:
    """Return the line of the table for one run."""
    num_packs = packs.offsets.size - 1
    bound = max(1, -(-int(lengths.sum(dtype=np.int64)) // capacity))
    return Row(
        lengths=name,
        peer=peer,
        sequences=lengths.size,
        capacity=capacity,
        seconds=seconds,
        per_second=lengths.size / seconds,
        packs=num_packs,
        over_percent=100 * (num_packs / bound - 1),
        ratio=seconds / ours,
    )


def is_selected(peer: Peer, options: argparse.Namespace) -> bool:
    """Return whether the command line selects a packer."""
    return not options.only or peer.name in options.only


def machine_line() -> str:
    """Return the machine and the versions of the packages, in one line."""
    versions = ", ".join(
        f"{p} {metadata.version(p)}"
        for p in ("numpy", "numba", "trl", "binpacking", "grain")
        if find_spec(p)
    )
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()},"
        f" {versions}"
    )


def plot(rows: list[Row], file: Path) -> None:
    """Plot lengths per second over the number of sequences, at the smallest capacity.

    There is one panel per distribution of lengths, and one line per packer.
    """
    pyplot = import_module("matplotlib.pyplot")
    kinds = [kind for kind in GENERATED if any(row.lengths == kind for row in rows)]
    capacity = min(row.capacity for row in rows)
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(4.5 * len(kinds), 4), sharey=True, squeeze=False
    )
    for panel, kind in zip(panels[0], kinds, strict=True):
        for peer in ("sftprep", *(p.name for p in PEERS)):
            line = [
                (r.sequences, r.per_second)
                for r in rows
                if (r.lengths, r.peer, r.capacity) == (kind, peer, capacity)
            ]
            if line:
                panel.loglog(*zip(*line, strict=True), marker="o", label=peer)
        panel.set(title=f"{kind} lengths, capacity {capacity:,}", xlabel="sequences")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("lengths planned per second")
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())

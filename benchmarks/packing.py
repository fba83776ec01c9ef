"""How fast and how tight is `pack_lengths`, beside the packers of TRL, ms-swift and Grain on the
same lengths in the same run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.packing import pack_lengths

DEFAULT_LENGTHS = (
    Path(__file__).resolve().parents[1].parent / "shared" / "data" / "datasets" / "lengths"
)

EPILOG = """
what is measured
  sftprep          pack_lengths(strategy="bfd"): one plan over all sequences. After one call to warm
                   up, the median of --repeat. In a process that has not loaded the compiled
                   kernels, plans of up to 200,000 sequences are made without them.
  TRL planning     TRL's segment tree, in the loop that trl.data_utils._pack_bfd has around it: the
                   plan alone, like ours. It is given Python integers, with which it is faster than
                   with the NumPy scalars of the original.
  TRL one window   trl.data_utils._pack_bfd on all sequences at once. It moves the tokens too (of
                   one byte here), which is a third of its time at capacity 4,096 and more above.
  TRL pack_dataset as its trainer calls it: windows of 1,000 rows, tokens moved, a data set made.
  binpacking       binpacking.to_constant_volume, which ms-swift packs with: the plan alone.
  Grain            the best-fit and first-fit packers of grain.experimental, with 64 open bins:
                   padded rows of tokens.
  Peers run once where a call takes over two seconds, else the median of three. One that is not
  installed is left out, and each stops at the size from which it would take minutes (--all-sizes
  runs it all the same).

what is checked in each row
  each non-empty sequence is in one pack, no pack is over capacity; TRL on one window gives our
  packs in our order.

columns
  over    packs more than the lower bound, ceil(tokens / capacity), in percent of it
  ratio   how many times as many lengths a second we plan

examples
  python benchmarks/packing.py --quick
  python benchmarks/packing.py --sizes 1000000 --capacities 4096 --only "TRL planning"
  python benchmarks/packing.py --json packing.json --plot packing.png
"""

Lengths = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Packs:
    """What a packer did: lengths of the sequences, pack after pack, and where each pack begins
    (int64 [packs + 1])."""

    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Peer:
    """A packer. `start(lengths, capacity)` prepares its input and returns the call to be timed;
    `packs` reads its result.

    most_sequences, most_tokens: the size up to which it runs in reasonable time and memory;
    same_packs: it has our rule.
    """

    name: str
    package: str
    most_sequences: int
    most_tokens: int
    start: Callable[[Lengths, int], Callable[[], Any]]
    packs: Callable[[Any, Lengths], Packs]
    same_packs: bool = False

    @property
    def is_here(self) -> bool:
        """Is it installed?"""
        return find_spec(self.package) is not None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    lengths: str
    peer: str
    sequences: int
    capacity: int
    seconds: float
    per_second: float
    packs: int
    over_percent: float
    ratio: float


def main() -> int:
    options = parse()
    rows: list[Row] = []
    print(machine_line())
    for peer in PEERS:
        if wanted(peer, options) and not peer.is_here:
            print(f"left out: {peer.name}, the package {peer.package} is not installed")
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
    """The command line."""
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
        help="sequences to generate (default 10^4 10^5 10^6 10^7)",
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
        help=f"packers to run beside us, of: {names}; sftprep for none",
    )
    add("--all-sizes", action="store_true", help="run peers at every size, however long it takes")
    add(
        "--repeat",
        type=int,
        default=5,
        metavar="K",
        help="calls of ours, of which the median counts (default 5)",
    )
    add("--seed", type=int, default=0, help="seed of the generated lengths (default 0)")
    add("--json", metavar="FILE", help="write the rows as JSON")
    add(
        "--plot",
        metavar="FILE",
        help="draw lengths a second over sequences (.png, .svg, .pdf); needs matplotlib",
    )
    options = parser.parse_args()
    if options.only and (unknown := set(options.only) - {"sftprep", *(p.name for p in PEERS)}):
        parser.error(f"--only: unknown packer {sorted(unknown)[0]!r}; known: {names}")
    if options.lengths and not options.lengths.is_dir():
        parser.error(f"--lengths: {options.lengths} is no folder")
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
    """Name, lengths and capacity of each case: real ones first. Lengths over capacity are cut to
    it, as truncation does."""
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
    """Log-normal with a mean of about 1,000 tokens and a long tail, as ShareGPT has."""
    return np.clip(rng.lognormal(6.3, 1.1, size).astype(np.int32), 1, capacity)


def short(rng: np.random.Generator, size: int, capacity: int) -> Lengths:
    """Log-normal around 190 tokens with a short tail, as GSM8K has."""
    return np.clip(rng.lognormal(5.2, 0.34, size).astype(np.int32), 1, capacity)


def uniform(rng: np.random.Generator, size: int, capacity: int) -> Lengths:
    """Every length from 1 to capacity alike: many distinct lengths, two sequences a pack."""
    return rng.integers(1, capacity, size, dtype=np.int32, endpoint=True)


GENERATED: dict[str, Callable[[np.random.Generator, int, int], Lengths]] = {
    "chat-like": chat_like,
    "short": short,
    "uniform": uniform,
}


def compare(
    name: str, lengths: Lengths, capacity: int, options: argparse.Namespace
) -> Iterator[Row]:
    """Run us, then each peer that is here and not too slow for the size, on the same lengths."""
    import sftprep.packing.bestfit  # noqa: F401  # what a large plan loads by itself

    pack_lengths(lengths, capacity)
    ours_seconds, plan = timed(lambda: pack_lengths(lengths, capacity), options.repeat)
    ours = Packs(lengths[plan.members].astype(np.int64), plan.offsets)
    check("sftprep", ours, lengths, capacity)
    yield row_of(name, "sftprep", ours, lengths, capacity, ours_seconds, ours_seconds)
    tokens = int(lengths.sum(dtype=np.int64))
    for peer in PEERS:
        if not wanted(peer, options) or not peer.is_here:
            continue
        most = min(peer.most_sequences, 10_000) if options.quick else peer.most_sequences
        if lengths.size > most and not options.all_sizes:
            continue
        if tokens > peer.most_tokens:
            print(
                f"{'':<28}{peer.name:<20}left out: more than {peer.most_tokens:,} tokens to move",
                flush=True,
            )
            continue
        call = peer.start(lengths, capacity)
        seconds, result = timed(call, 1)
        if seconds < 2:
            seconds, result = timed(call, 3)
        theirs = peer.packs(result, lengths)
        check(peer.name, theirs, lengths, capacity)
        if peer.same_packs and not (
            np.array_equal(ours.lengths, theirs.lengths)
            and np.array_equal(ours.offsets, theirs.offsets)
        ):
            raise SystemExit(
                f"check failed: on {name}, capacity {capacity}, our packs are not those of"
                f" {peer.name}"
            )
        yield row_of(name, peer.name, theirs, lengths, capacity, seconds, ours_seconds)


def timed(call: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Median seconds of some calls, and the result of the last."""
    seconds = []
    result = None
    for _ in range(repeat):
        result = None  # its memory is free again before the next call
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), result


def check(peer: str, packs: Packs, lengths: Lengths, capacity: int) -> None:
    """Stop unless each non-empty sequence is in one pack and no pack is empty or over capacity."""
    sums = (
        np.add.reduceat(packs.lengths, packs.offsets[:-1]) if packs.lengths.size else packs.lengths
    )
    sound = (
        np.array_equal(np.sort(packs.lengths), np.sort(lengths[lengths > 0]))
        and packs.offsets[-1] == packs.lengths.size
        and bool(np.all(np.diff(packs.offsets) > 0))
        and int(sums.max(initial=0)) <= capacity
    )
    if not sound:
        raise SystemExit(
            f"check failed: {peer} lost or repeated a sequence, or overfilled a pack, at capacity"
            f" {capacity}"
        )


def row_of(
    name: str, peer: str, packs: Packs, lengths: Lengths, capacity: int, seconds: float, ours: float
) -> Row:
    """The line of one run."""
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


def wanted(peer: Peer, options: argparse.Namespace) -> bool:
    return not options.only or peer.name in options.only


def start_trl_planning(lengths: Lengths, capacity: int) -> Callable[[], Any]:
    """TRL's segment tree of spaces, and what its kernel does around it: a queue of bins a space,
    bins in the order opened."""
    tree_of = import_module("trl.data_utils")._SegmentTree
    given = lengths.tolist()

    def call() -> list[list[int]]:
        tree = tree_of(capacity)
        tree.add(capacity)
        queues: dict[int, deque[list[int]]] = defaultdict(deque)
        bins: list[list[int]] = []
        for index in sorted(range(len(given)), key=given.__getitem__, reverse=True):
            length = given[index]
            if length == 0:
                break
            space = tree.search(length)
            if space < capacity:
                bin_ = queues[space].popleft()
                if not queues[space]:
                    tree.remove(space)
            else:
                bin_ = []
                bins.append(bin_)
            bin_.append(index)
            queues[space - length].append(bin_)
            if space > length:
                tree.add(space - length)
        return bins

    return call


def packs_of_index_lists(result: Any, lengths: Lengths) -> Packs:
    """Packs are lists of sequence indices."""
    members = np.array([index for pack in result for index in pack], np.int64)
    return Packs(lengths[members].astype(np.int64), np.cumsum([0, *(len(pack) for pack in result)]))


def trl_table(lengths: Lengths) -> Any:
    """The documents as an Arrow table with one-byte tokens."""
    import pyarrow as pa

    starts = np.zeros(lengths.size + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    tokens = pa.array(np.zeros(int(starts[-1]), np.int8))
    return pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(starts), tokens)})


def start_trl_one_window(lengths: Lengths, capacity: int) -> Callable[[], Any]:
    """TRL's kernel on all documents at once."""
    pack_bfd = import_module("trl.data_utils")._pack_bfd
    table = trl_table(lengths)
    return lambda: pack_bfd(table, capacity)


def start_trl_pack_dataset(lengths: Lengths, capacity: int) -> Callable[[], Any]:
    """TRL as its trainer calls it."""
    datasets = import_module("datasets")
    datasets.disable_progress_bars()
    pack_dataset = import_module("trl.data_utils").pack_dataset
    documents = datasets.Dataset(trl_table(lengths))
    return lambda: pack_dataset(documents, capacity, strategy="bfd")


def packs_of_trl(result: Any, lengths: Lengths) -> Packs:
    """Rows carry the lengths of their documents."""
    table = result if hasattr(result, "column") and not hasattr(result, "data") else result.data
    column = table.column("seq_lengths").combine_chunks()
    counts = np.array([len(row) for row in column], np.int64)
    return Packs(
        column.flatten().to_numpy().astype(np.int64), np.concatenate(([0], np.cumsum(counts)))
    )


def start_binpacking(lengths: Lengths, capacity: int) -> Callable[[], Any]:
    """As ms-swift calls it: pairs of index and length, weighed by the length."""
    to_constant_volume = import_module("binpacking").to_constant_volume
    pairs = [(index, int(length)) for index, length in enumerate(lengths) if length]
    return lambda: to_constant_volume(pairs, capacity, weight_pos=1)


def packs_of_binpacking(result: Any, lengths: Lengths) -> Packs:
    """Packs are lists of the pairs."""
    return packs_of_index_lists([[index for index, _ in pack] for pack in result], lengths)


def start_grain(kind: str) -> Callable[[Lengths, int], Callable[[], Any]]:
    """A packer of Grain over documents in memory; its rows number their documents, of which the
    counts are kept."""

    def start(lengths: Lengths, capacity: int) -> Callable[[], Any]:
        packer = getattr(import_module("grain.experimental"), kind)
        documents = [{"tokens": np.zeros(length, np.int32)} for length in lengths if length]
        source = import_module("grain").MapDataset.source(documents).to_iter_dataset()

        def call() -> list[NDArray[np.int64]]:
            rows = packer(
                source, length_struct={"tokens": capacity}, num_packing_bins=64, shuffle_bins=False
            )
            return [np.bincount(row["tokens_segment_ids"])[1:] for row in rows]

        return call

    return start


def packs_of_grain(result: Any, lengths: Lengths) -> Packs:
    """One array of document lengths a row."""
    return Packs(np.concatenate(result), np.cumsum([0, *(row.size for row in result)]))


PEERS: tuple[Peer, ...] = (
    Peer(
        "TRL planning",
        "trl",
        1_000_000,
        10**12,
        start_trl_planning,
        packs_of_index_lists,
        same_packs=True,
    ),
    Peer(
        "TRL one window",
        "trl",
        100_000,
        2 * 10**8,
        start_trl_one_window,
        packs_of_trl,
        same_packs=True,
    ),
    Peer("TRL pack_dataset", "trl", 100_000, 2 * 10**8, start_trl_pack_dataset, packs_of_trl),
    Peer("binpacking", "binpacking", 10_000, 10**12, start_binpacking, packs_of_binpacking),
    Peer(
        "Grain best fit",
        "grain",
        10_000,
        2 * 10**8,
        start_grain("BestFitPackIterDataset"),
        packs_of_grain,
    ),
    Peer(
        "Grain first fit",
        "grain",
        10_000,
        2 * 10**8,
        start_grain("FirstFitPackIterDataset"),
        packs_of_grain,
    ),  # add yours here
)


def machine_line() -> str:
    """Where the figures are from."""
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
    """Lengths a second over the number of sequences: a panel a kind of lengths, a line a packer, at
    the smallest capacity."""
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
    panels[0][0].set_ylabel("lengths planned a second")
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())

"""Packs that are planned while reading (layout `sequences`), compared with stored ones (`packs`).

    python -m benchmarks.layouts                        # generated chats, a tokenizer made of them
    python -m benchmarks.layouts --data short --megabytes 60
    python -m benchmarks.layouts --data FILE.jsonl --tokenizer DIR --max-length 8192

Both layouts are built from the same records; long sequences are split, so that both have the same
tokens. It is checked that all packs are equal, for `--max-length` and for half of it. Then packs
are read and their tokens are summed, in a random order and one after the other. The times are CPU
times, medians of `--rounds` rounds, which alternate between the layouts. `first` is the time to
open a build and read one pack, which plans the packs of its group. The disk space includes the
files of the groups.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpora import (
    add_corpus_arguments,
    make_corpus,
    positive_int,
    tokenizer_folder,
)
from benchmarks.packing import machine_line
from sftprep import Shards, build, open_shards

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "data"
LAYOUTS = ("packs", "sequences")
MOST_RATIO_TIME, MOST_RATIO_DISK = 1.5, 0.7
_COLUMNS = ("input_ids", "position_ids", "completion_mask", "seq_lengths", "origin", "flags")


@dataclass(frozen=True)
class LayoutRow:
    """The figures of one layout."""

    seconds: float  # of the build
    bytes: int  # of the output folder
    first: float  # seconds to open the build and read a pack
    random: float  # seconds of a pack, in random order
    sequential: float  # seconds of a pack, one after the other


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_arguments(parser, megabytes=60)
    parser.add_argument("--tokenizer", help="folder of a tokenizer; default: one made of examples")
    parser.add_argument("--max-length", type=positive_int, default=4096)
    parser.add_argument("--packs", type=positive_int, default=2000, help="packs that are read")
    parser.add_argument("--rounds", type=positive_int, default=7)
    options = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as scratch:
        rows = measure(options, Path(scratch))
    print_rows(rows)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, LayoutRow]:
    """Build both layouts, check that their packs are equal, and return the figures of each."""
    data, renames = make_corpus(options.data, folder, options.megabytes)
    tokenizer = folder / "tokenizer"
    if options.tokenizer is None:
        from examples.tiny_model import train_tokenizer  # loads torch

        train_tokenizer(EXAMPLES).save_pretrained(tokenizer)
    else:
        tokenizer = tokenizer_folder(options.tokenizer)
    settings: dict[str, Any] = {
        "tokenizer": str(tokenizer),
        "map": tuple(renames),
        "max_length": options.max_length,
        "on_bad_record": "quarantine",
        "max_rejected": "100%",
        "overlong": "split",
    }
    seconds = {}
    for layout in LAYOUTS:
        report = build(str(data), output=folder / layout, layout=layout, **settings)
        seconds[layout] = report.seconds
    # Another length needs a build of its own in layout `packs`, and none in layout `sequences`.
    half = settings | {"max_length": options.max_length // 2}
    build(str(data), output=folder / "half", **half)
    for packs, length in (("packs", options.max_length), ("half", options.max_length // 2)):
        opened = open_shards(folder / "sequences", max_length=length)
        print(
            f"max_length {length:,}: {count_equal(open_shards(folder / packs), opened):,} packs"
            " are equal in all columns"
        )
    firsts = {layout: time_first(folder / layout) for layout in LAYOUTS}
    shards = {layout: open_shards(folder / layout) for layout in LAYOUTS}
    random, sequential = time_packs(shards, options.packs, options.rounds)
    return {
        layout: LayoutRow(
            seconds[layout],
            sum(file.stat().st_size for file in (folder / layout).rglob("*") if file.is_file()),
            firsts[layout],
            random[layout],
            sequential[layout],
        )
        for layout in LAYOUTS
    }


def count_equal(packs: Shards, planned: Shards) -> int:
    """Return the number of packs; raise SystemExit if they differ."""
    if len(packs) != len(planned):
        raise SystemExit(f"{len(packs)} packs, and {len(planned)} planned ones")
    for number, (pack, other) in enumerate(zip(packs, planned, strict=True)):
        for name in _COLUMNS:
            if not np.array_equal(getattr(pack, name), getattr(other, name)):
                raise SystemExit(f"pack {number} has another {name}")
    return len(packs)


def time_first(folder: Path) -> float:
    """Return the seconds to open a build and read its first pack."""
    start = time.perf_counter()
    open_shards(folder)[0].input_ids.sum()
    return time.perf_counter() - start


def time_packs(
    shards: dict[str, Shards], count: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of a pack of each layout, in random order and one after the other."""
    size = len(shards["packs"])
    orders = [
        np.random.default_rng(0).integers(0, size, count).tolist(),
        [number % size for number in range(count)],
    ]
    medians = []
    for order in orders:
        times: dict[str, list[float]] = {layout: [] for layout in shards}
        for number in range(rounds + 1):
            for layout, opened in shards.items():
                seconds = read_packs(opened, order)
                if number:  # the first round maps the files and checks their digests
                    times[layout].append(seconds / count)
        medians.append({layout: statistics.median(found) for layout, found in times.items()})
    return medians[0], medians[1]


def read_packs(shards: Shards, order: Sequence[int]) -> float:
    """Return the CPU seconds to read packs, with all of their tokens, masks and position ids."""
    start = time.thread_time()
    for number in order:
        pack = shards[number]
        pack.input_ids.sum()
        pack.position_ids.sum()
        pack.completion_mask.sum()
    return time.thread_time() - start


def print_rows(rows: dict[str, LayoutRow]) -> None:
    """Print the figures of both layouts, and their ratios."""
    print(f"{'layout':<12}{'build':>9}{'disk':>12}{'first':>10}{'random':>12}{'sequential':>12}")
    for layout, row in rows.items():
        print(
            f"{layout:<12}{row.seconds:>7.1f} s{row.bytes / 1e6:>9.1f} MB{row.first * 1e3:>7.1f} ms"
            f"{row.random * 1e6:>9.1f} us{row.sequential * 1e6:>9.1f} us"
        )
    packs, sequences = (rows[layout] for layout in LAYOUTS)
    disk = sequences.bytes / packs.bytes
    times = [sequences.random / packs.random, sequences.sequential / packs.sequential]
    print(
        f"{'ratio':<12}{sequences.seconds / packs.seconds:>9.2f}{disk:>12.3f}"
        f"{sequences.first / packs.first:>10.2f}{times[0]:>12.2f}{times[1]:>12.2f}"
    )
    is_met = disk <= MOST_RATIO_DISK and max(times) <= MOST_RATIO_TIME
    print(
        f"at most {MOST_RATIO_TIME} times the time of a pack, and {MOST_RATIO_DISK} times the disk"
        f" space: {'yes' if is_met else 'NO'}"
    )


if __name__ == "__main__":
    main()

"""How tight and how fast packing in a window is, beside one plan over all and the windows of TRL,
ms-swift and Grain."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.packing import (
    DEFAULT_LENGTHS,
    Packs,
    machine_line,
    packs_of_grain,
    packs_of_trl,
    start_grain,
    start_trl_pack_dataset,
)
from sftprep.packing import pack_lengths
from sftprep.packing.window import CarryingWindow, Emission, plan_lane

EPILOG = """
what is measured
  one plan         pack_lengths over all sequences: what a window is to come near to.
  carry W          sftprep's window: W sequences are held, the fullest half of the packs leaves, the
                   rest is carried.
  cut off W        the same kernel on windows of W that are flushed, for comparison.
  TRL 1,000        trl.data_utils.pack_dataset as its trainer calls it: windows of 1,000 rows; it
                   moves the tokens too.
  ms-swift 128     binpacking.to_constant_volume on windows of 128, with which ms-swift packs
                   streams; what is left of a window (its last pack, where that is not full) goes
                   into the next.
  Grain            grain's best-fit packer with 64 open bins; padded rows of tokens. Peers that are
                   not installed are left out.

columns
  over    packs more than the lower bound, ceil(tokens / capacity), in percent of it
  trend   correlation of the number of sequences in a pack with its place in its window: what makes
          the cost of batches go up and down; 0 is none
  seq/s   sequences a second
"""

Lengths = NDArray[np.int32]
Made = tuple[NDArray[np.int64], NDArray[np.float64], int]
"""Sequences in each pack, the place of each in its window (0 .. 1), packs."""


def main() -> None:
    """Print a table for each distribution of lengths."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=40_000,
        help="sequences of each distribution (default 40,000)",
    )
    parser.add_argument(
        "--lengths", type=Path, default=DEFAULT_LENGTHS, help="folder of .npy files of real lengths"
    )
    parser.add_argument(
        "--skip",
        nargs="*",
        default=[],
        help="packers to leave out, by the first word of their names",
    )
    options = parser.parse_args()
    print(machine_line())
    plan_lane(np.ones(5000, np.int32), 8, 1000, seed=0, lane=0)  # the kernels are loaded
    print(
        f"{'lengths':<24}{'capacity':>9} "
        f" {'packer':<14}{'packs':>8}{'over':>8}{'trend':>8}{'seq/s':>13}"
    )
    for name, capacity, lengths in cases(options):
        bound = -(-int(lengths.sum(dtype=np.int64)) // capacity)
        for packer, call in PACKERS.items():
            if packer.split()[0] in options.skip or (
                packer in NEEDS and find_spec(NEEDS[packer]) is None
            ):
                continue
            start = time.perf_counter()
            sizes, places, packs = call(lengths, capacity)
            seconds = time.perf_counter() - start
            if int(sizes.sum()) != lengths.size:
                raise SystemExit(f"{packer} packed {int(sizes.sum())} of {lengths.size} sequences")
            trend = float(np.corrcoef(places, sizes)[0, 1]) if sizes.std() and places.std() else 0.0
            print(
                f"{name:<24}{capacity:>9,} "
                f" {packer:<14}{packs:>8,}{100 * (packs / bound - 1):>7.2f}%{trend:>8.2f}"
                f"{lengths.size / seconds:>13,.0f}",
                flush=True,
            )


def cases(options: argparse.Namespace) -> list[tuple[str, int, Lengths]]:
    """Name, capacity and lengths: drawn from real ones, and generated."""
    found: list[tuple[str, int, Lengths]] = []
    for file in sorted(options.lengths.glob("*.npy")) if options.lengths.is_dir() else []:
        real = np.load(file)
        drawn = np.random.default_rng(0).choice(real[real > 0], options.sequences).astype(np.int32)
        found += [
            (file.stem.removeprefix("qwen3_chatml_"), size, np.minimum(drawn, size))
            for size in (4096, 16_384)
        ]
    draw = np.random.default_rng(1)
    for mean in (6256, 2799):
        lognormal = np.clip(
            draw.lognormal(np.log(mean) - 0.5, 1.0, options.sequences), 1, 16_384
        ).astype(np.int32)
        found.append((f"log-normal, mean {mean:,}", 16_384, lognormal))
    found.append(
        ("uniform 1..16,384", 16_384, draw.integers(1, 16_385, options.sequences).astype(np.int32))
    )
    return found


def one_plan(lengths: Lengths, capacity: int) -> Made:
    """All sequences at once."""
    sizes = np.diff(pack_lengths(lengths, capacity).offsets)
    return sizes, np.arange(sizes.size) / max(1, sizes.size), sizes.size


def carrying(size: int) -> Callable[[Lengths, int], Made]:
    """Our window."""

    def call(lengths: Lengths, capacity: int) -> Made:
        window, emitted, at = CarryingWindow(capacity, size), [], 0
        while at < lengths.size:
            until = min(at + window.room, lengths.size)
            window.add(np.arange(at, until), lengths[at:until])
            at = until
            emitted.append(window.pack(flush=at == lengths.size))
        return _joined(emitted)

    return call


def cut_off(size: int) -> Callable[[Lengths, int], Made]:
    """Windows that are flushed."""

    def call(lengths: Lengths, capacity: int) -> Made:
        plans = [
            pack_lengths(lengths[at : at + size], capacity) for at in range(0, lengths.size, size)
        ]
        return _joined([Emission(plan.members, plan.offsets) for plan in plans])

    return call


def trl(lengths: Lengths, capacity: int) -> Made:
    """TRL's data set of packs; a window ends with its thousandth sequence."""
    packs = packs_of_trl(start_trl_pack_dataset(lengths, capacity)(), lengths)
    window = (packs.offsets[:-1]) // 1000
    sizes = np.diff(packs.offsets)
    first = np.searchsorted(window, window)
    count = np.searchsorted(window, window, side="right") - first
    return sizes, (np.arange(sizes.size) - first) / count, sizes.size


def swift(lengths: Lengths, capacity: int) -> Made:
    """binpacking on 128 at a time, with the last bin of a window carried."""
    from binpacking import to_constant_volume

    sizes: list[int] = []
    places: list[float] = []
    left: list[tuple[int, int]] = []
    for at in range(0, lengths.size, 128):
        window = [*left, *((k, int(lengths[k])) for k in range(at, min(at + 128, lengths.size)))]
        bins = to_constant_volume(window, capacity, weight_pos=1)
        bins, left = (bins, []) if at + 128 >= lengths.size else (bins[:-1], bins[-1])
        sizes += [len(one) for one in bins]
        places += [k / len(bins) for k in range(len(bins))]
    return np.array(sizes), np.array(places), len(sizes)


def grain(lengths: Lengths, capacity: int) -> Made:
    """Grain's packer; it has no windows, so places are those in the whole."""
    packs: Packs = packs_of_grain(
        start_grain("BestFitPackIterDataset")(lengths, capacity)(), lengths
    )
    sizes = np.diff(packs.offsets)
    return sizes, np.arange(sizes.size) / sizes.size, sizes.size


def _joined(emitted: list[Emission]) -> Made:
    sizes = [np.diff(one.offsets) for one in emitted]
    places = [np.arange(one.size) / max(1, one.size) for one in sizes]
    return np.concatenate(sizes), np.concatenate(places), sum(one.size for one in sizes)


PACKERS: dict[str, Callable[[Lengths, int], Made]] = {
    "one plan": one_plan,
    "carry 256": carrying(256),
    "carry 1,000": carrying(1000),
    "carry 4,096": carrying(4096),
    "cut off 1,000": cut_off(1000),
    "TRL 1,000": trl,
    "ms-swift 128": swift,
    "Grain": grain,
}
NEEDS = {"TRL 1,000": "trl", "ms-swift 128": "binpacking", "Grain": "grain"}


if __name__ == "__main__":
    main()

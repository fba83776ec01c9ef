"""Density and speed of packing in a window, compared with one plan over all sequences and with the
windows of TRL, ms-swift and Grain."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.packers import Packs, from_grain, from_trl, start_grain, start_trl_pack_dataset
from benchmarks.packing import DEFAULT_LENGTHS, machine_line
from sftprep.packing import pack_lengths
from sftprep.packing.window import CarryingWindow, Emission, plan_lane

EPILOG = """
measurements
  one plan         pack_lengths over all sequences: the density that a window should approach.
  carry W          sftprep's window: it holds W sequences, emits the fuller half of the packs, and
                   carries the sequences of the others to the next window.
  cut off W        the same kernel on windows of W sequences that are emitted completely.
  TRL 1,000        trl.data_utils.pack_dataset as its trainer calls it: windows of 1,000 rows; it
                   also moves the tokens.
  ms-swift 128     binpacking.to_constant_volume on windows of 128, as ms-swift packs streams; the
                   last pack of a window is carried to the next window.
  Grain            Grain's best-fit packer with 64 open bins; padded rows of tokens.
  Peers that are not installed are omitted.

columns
  over    packs above the lower bound, ceil(tokens / capacity), in percent of the bound
  trend   correlation of the number of sequences in a pack with its position in its window, which
          makes the cost of batches rise and fall; 0 is best
  seq/s   sequences per second
"""

Lengths = NDArray[np.int32]
WindowPacks = tuple[NDArray[np.int64], NDArray[np.float64], int]
"""Sequences in each pack, position of each pack in its window (0 to 1), and number of packs."""


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
        help="packers to omit, by the first word of their names",
    )
    options = parser.parse_args()
    print(machine_line())
    plan_lane(np.ones(5000, np.int32), 8, 1000, seed=0, lane=0)  # loads the compiled kernels
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
            sizes, positions, packs = call(lengths, capacity)
            seconds = time.perf_counter() - start
            if int(sizes.sum()) != lengths.size:
                raise SystemExit(f"{packer} packed {int(sizes.sum())} of {lengths.size} sequences")
            trend = (
                float(np.corrcoef(positions, sizes)[0, 1])
                if sizes.std() and positions.std()
                else 0.0
            )
            print(
                f"{name:<24}{capacity:>9,} "
                f" {packer:<14}{packs:>8,}{100 * (packs / bound - 1):>7.2f}%{trend:>8.2f}"
                f"{lengths.size / seconds:>13,.0f}",
                flush=True,
            )


def cases(options: argparse.Namespace) -> list[tuple[str, int, Lengths]]:
    """Return name, capacity and lengths of each case: drawn from real lengths, and generated."""
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


def plan_at_once(lengths: Lengths, capacity: int) -> WindowPacks:
    """Pack all sequences with one plan."""
    sizes = np.diff(pack_lengths(lengths, capacity).offsets)
    return sizes, np.arange(sizes.size) / max(1, sizes.size), sizes.size


def carry_over(size: int) -> Callable[[Lengths, int], WindowPacks]:
    """Return the packer with sftprep's window of `size` sequences."""

    def call(lengths: Lengths, capacity: int) -> WindowPacks:
        window, emitted, begin = CarryingWindow(capacity, size), [], 0
        while begin < lengths.size:
            end = min(begin + window.room, lengths.size)
            window.add(np.arange(begin, end), lengths[begin:end])
            begin = end
            emitted.append(window.pack(flush=begin == lengths.size))
        return _join(emitted)

    return call


def flush_all(size: int) -> Callable[[Lengths, int], WindowPacks]:
    """Return the packer with windows of `size` sequences that are emitted completely."""

    def call(lengths: Lengths, capacity: int) -> WindowPacks:
        plans = [
            pack_lengths(lengths[begin : begin + size], capacity)
            for begin in range(0, lengths.size, size)
        ]
        return _join([Emission(plan.members, plan.offsets) for plan in plans])

    return call


def pack_with_trl(lengths: Lengths, capacity: int) -> WindowPacks:
    """Pack with TRL; a window ends after 1,000 sequences."""
    packs = from_trl(start_trl_pack_dataset(lengths, capacity)(), lengths)
    window = (packs.offsets[:-1]) // 1000
    sizes = np.diff(packs.offsets)
    first = np.searchsorted(window, window)
    count = np.searchsorted(window, window, side="right") - first
    return sizes, (np.arange(sizes.size) - first) / count, sizes.size


def pack_with_swift(lengths: Lengths, capacity: int) -> WindowPacks:
    """Pack 128 sequences at a time with binpacking, and carry the last bin of a window."""
    from binpacking import to_constant_volume

    sizes: list[int] = []
    positions: list[float] = []
    carried: list[tuple[int, int]] = []
    for begin in range(0, lengths.size, 128):
        end = min(begin + 128, lengths.size)
        window = [*carried, *((k, int(lengths[k])) for k in range(begin, end))]
        bins = to_constant_volume(window, capacity, weight_pos=1)
        bins, carried = (bins, []) if end == lengths.size else (bins[:-1], bins[-1])
        sizes += [len(members) for members in bins]
        positions += [k / len(bins) for k in range(len(bins))]
    return np.array(sizes), np.array(positions), len(sizes)


def pack_with_grain(lengths: Lengths, capacity: int) -> WindowPacks:
    """Pack with Grain, which has no windows: positions are those among all packs."""
    packs: Packs = from_grain(start_grain("BestFitPackIterDataset")(lengths, capacity)(), lengths)
    sizes = np.diff(packs.offsets)
    return sizes, np.arange(sizes.size) / sizes.size, sizes.size


def _join(emitted: list[Emission]) -> WindowPacks:
    sizes = [np.diff(emission.offsets) for emission in emitted]
    positions = [np.arange(window.size) / max(1, window.size) for window in sizes]
    return np.concatenate(sizes), np.concatenate(positions), sum(map(len, sizes))


PACKERS: dict[str, Callable[[Lengths, int], WindowPacks]] = {
    "one plan": plan_at_once,
    "carry 256": carry_over(256),
    "carry 1,000": carry_over(1000),
    "carry 4,096": carry_over(4096),
    "cut off 1,000": flush_all(1000),
    "TRL 1,000": pack_with_trl,
    "ms-swift 128": pack_with_swift,
    "Grain": pack_with_grain,
}
NEEDS = {"TRL 1,000": "trl", "ms-swift 128": "binpacking", "Grain": "grain"}


if __name__ == "__main__":
    main()

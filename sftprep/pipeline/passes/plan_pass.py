"""Pass 2: the plan, an assignment of sequences to packs by their lengths alone.

A build plans all sequences at once, or (`pack_window`) in windows: then its packs are those of a
stream with the same window.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from sftprep.config.build import BuildConfig
from sftprep.core.hashing import hash64
from sftprep.packing.strategies import PackPlan, pack_lengths
from sftprep.packing.window import Emission, in_global_order, plan_lane
from sftprep.pipeline.passes.tokenize_pass import PartitionResult
from sftprep.sources.lanes import block_bytes, is_plain, lane_of
from sftprep.sources.partition import Source
from sftprep.sources.readers.lines import file_size

_NO_LENGTHS = np.zeros(0, dtype=np.int32)


def lane_block(config: BuildConfig, sources: Iterable[Source]) -> int | None:
    """Return the size of the blocks assigned to lanes.

    Args:
        config: The settings of the build.
        sources: The sources of the build.

    Returns:
        The size in bytes; None if the build plans all sequences at once.
    """
    if config.pack.pack_window is None:
        return None
    files = [source.file for source in sources if source.blocks is None and is_plain(source.file)]
    return block_bytes([file_size(file) for file in files], config.pack.lanes)


def plan_packs(
    parts: list[PartitionResult],
    config: BuildConfig,
    max_length: int,
    take: NDArray[np.int64] | None = None,
) -> PackPlan:
    """Plan the packs of a build.

    Args:
        parts: The partitions, in the order of the input.
        config: The settings of the build.
        max_length: The capacity of a pack, in tokens.
        take: int64 [planned]; the indices of the sequences to plan, among all sequences of `parts`.
            None plans each of them once.

    Returns:
        The plan. Its members are indices into `take`, or into the sequences of `parts`.

    Example:
        lengths = [5, 3, 4], max_length = 8, take = [0, 1, 1]  ->  packs [[0, 1], [2]]
    """
    lengths, pack = np.concatenate([_NO_LENGTHS, *(part.lengths for part in parts)]), config.pack
    lengths = lengths if take is None else lengths[take]
    if pack.pack_window is None:
        return pack_lengths(lengths, max_length, pack.packing)
    lane = lanes_of(parts, pack.lanes)
    lane = lane if take is None else lane[take]
    return plan_in_windows(
        lengths,
        lane,
        capacity=max_length,
        window=pack.pack_window,
        lanes=pack.lanes,
        seed=pack.seed,
    )


def lanes_of(parts: list[PartitionResult], lanes: int) -> NDArray[np.int32]:
    """Return the lane of each sequence: int32 [sequences], in the order of the input."""
    found: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    for number, parts_of_input in groupby(parts, key=lambda part: part.partition.input):
        lines_before = 0
        for part in parts_of_input:
            assert part.lane_positions is not None
            # Blocks are numbered within their file, rows within their partition.
            numbers = part.lane_positions.numbers
            if part.lane_positions.rows:
                numbers = numbers + lines_before
            found.append(lane_of(numbers, number, lanes).astype(np.int32))
            lines_before += part.counts["lines"]
    return np.concatenate(found)


def plan_in_windows(
    lengths: NDArray[np.int32],
    lane: NDArray[np.int32],
    *,
    capacity: int,
    window: int,
    lanes: int,
    seed: int,
) -> PackPlan:
    """Pack the sequences of each lane in a window of its own.

    Args:
        lengths: int32 [sequences]; from 1 to `capacity`, in the order of the input.
        lane: int32 [sequences]; the lane of each sequence.
        capacity: The capacity of a pack, in tokens.
        window: The number of sequences in a window.
        lanes: The number of lanes.
        seed: The seed of the build.

    Returns:
        The plan, with its packs in the order of a stream.
    """
    emissions: list[Emission] = []
    for number in range(lanes):
        sequences = np.flatnonzero(lane == number)
        emission = plan_lane(
            lengths[sequences], capacity, window, seed=hash64(seed, 0), lane=number
        )
        # The lane counts its own sequences; the plan refers to those of the whole input.
        emissions.append(Emission(sequences[emission.members], emission.offsets))
    packs = in_global_order(emissions)
    bin_of = np.full(lengths.size, -1, np.int64)
    bin_of[packs.members] = np.repeat(np.arange(len(packs)), np.diff(packs.offsets))
    return PackPlan(
        bin_of, packs.members, packs.offsets, capacity, tokens=int(lengths.sum(dtype=np.int64))
    )

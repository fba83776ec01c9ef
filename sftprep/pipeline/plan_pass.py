"""The plan of a build that packs in windows: that of a stream with the same window, from lengths
alone."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from sftprep.config.build import BuildConfig
from sftprep.core.hashing import hash64
from sftprep.packing.strategies import PackPlan, pack_lengths
from sftprep.packing.window import Emission, in_global_order, plan_lane
from sftprep.pipeline.tokenize_pass import PartitionResult
from sftprep.sources.lanes import block_bytes, is_plain, lane_of
from sftprep.sources.partition import Source
from sftprep.sources.readers.lines import file_size


def lane_block(config: BuildConfig, sources: Iterable[Source]) -> int | None:
    """Bytes of a block that is dealt to a lane; None where the build packs the whole corpus at
    once."""
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
    """The plan that the settings ask for: over all sequences at once, or in windows.

    take: int64 [planned], the sequences to plan, where it is not each once; the members of the plan
    are places in it.
    """
    lengths, pack = np.concatenate([part.lengths for part in parts]), config.pack
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
    """The lane of every sequence, partition after partition: int32 [sequences]."""
    found: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    for number, own in groupby(parts, key=lambda part: part.partition.input):
        before = 0
        for part in own:
            assert part.places is not None
            numbers = part.places.numbers + before if part.places.rows else part.places.numbers
            found.append(lane_of(numbers, number, lanes).astype(np.int32))
            before += part.counts["lines"]
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
    """Pack each lane's sequences in its own window; the packs are in the order of a stream.

    lengths, lane: [sequences], in the order of the input; lengths: 1 .. capacity.
    """
    emitted: list[Emission] = []
    for number in range(lanes):
        own = np.flatnonzero(lane == number)
        emission = plan_lane(lengths[own], capacity, window, seed=hash64(seed, 0), lane=number)
        emitted.append(Emission(own[emission.members], emission.offsets))
    packs = in_global_order(emitted)
    bin_of = np.full(lengths.size, -1, np.int64)
    bin_of[packs.members] = np.repeat(np.arange(len(packs)), np.diff(packs.offsets))
    return PackPlan(
        bin_of, packs.members, packs.offsets, capacity, tokens=int(lengths.sum(dtype=np.int64))
    )

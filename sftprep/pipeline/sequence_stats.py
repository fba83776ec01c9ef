"""Statistics of sequences that the selection needs in addition to their lengths.

Workers collect them from the spill of a partition; selection.py uses them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftprep.core.hashing import hash64_array
from sftprep.masking import targets_of
from sftprep.pipeline.spill import Spill


@dataclass(frozen=True, slots=True)
class SequenceStats:
    """Statistics of the sequences of one partition.

    The hashes of a sequence are those of its record.

    Attributes:
        origin: int32 [n]; the line of the record of each sequence.
        record: int32 [n]; the number of its record. It is the line, unless a function of the user
            makes several records of a line.
        targets: int32 [n]; the number of targets of each sequence.
        keys: uint64 [n]; hashes with the seed of the evaluation, if records are held out.
        same: uint64 [n]; hashes of the record, if records are compared.
        alike: uint64 [n]; hashes of the record without whitespace, if records are compared.
    """

    origin: NDArray[np.int32]
    record: NDArray[np.int32]
    targets: NDArray[np.int32]
    keys: NDArray[np.uint64] | None = None
    same: NDArray[np.uint64] | None = None
    alike: NDArray[np.uint64] | None = None


@dataclass(frozen=True, slots=True)
class StatsRequest:
    """The optional statistics to collect.

    Attributes:
        key_seed: The seed for `keys`; None if no record is held out.
        compare: Whether records are compared with other records.
        compare_by: The keys by which records are compared and held out; empty for everything that
            their format reads.
    """

    key_seed: int | None = None
    compare: bool = False
    compare_by: tuple[str, ...] = ()

    @property
    def hash_by(self) -> tuple[str, ...] | None:
        """The keys by which records are hashed; None if they are not hashed."""
        return self.compare_by if self.compare or self.key_seed is not None else None


def collect_stats(spill: Spill, request: StatsRequest) -> SequenceStats:
    """Return the statistics of a partition.

    Args:
        spill: The spill of the partition, with hashes if the request needs them.
        request: The optional statistics.
    """
    mask = spill.completion_mask
    if mask is None:
        mask = np.ones(len(spill.input_ids), np.uint8)
    targets = targets_of(mask, spill.offsets)
    record = spill.origin if spill.record is None else spill.record
    keys = None
    if request.key_seed is not None and spill.same is not None:
        keys = hash64_array(spill.same.view(np.int64), request.key_seed)
    return SequenceStats(
        spill.origin.astype(np.int32),
        record.astype(np.int32),
        targets.astype(np.int32),
        keys,
        spill.same if request.compare else None,
        spill.alike if request.compare else None,
    )

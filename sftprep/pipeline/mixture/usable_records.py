"""The usable records of a group, and the order in which a mixture chooses them.

The order is that of a hash of the position of a record in its source, so that the content of other
sources does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.hashing import hash64_array
from sftprep.pipeline.mixture.quotas import Quota
from sftprep.pipeline.mixture.sized_records import SizedRecords


@dataclass(frozen=True, slots=True)
class UsableRecords:
    """The records of a group, and which of them training may use.

    Attributes:
        numbers: int64 [records]; the number of each record, ascending.
        entry: int64 [records]; the index of its source.
        is_usable: bool [records]; whether training may use it.
        record_of: int64 [sequences]; the index of the record of each sequence.
    """

    numbers: NDArray[np.int64]
    entry: NDArray[np.int64]
    is_usable: NDArray[np.bool_]
    record_of: NDArray[np.int64]

    @classmethod
    def of_sequences(
        cls, record: NDArray[np.int64], entry: NDArray[np.int64], excluded: NDArray[np.bool_]
    ) -> UsableRecords:
        """Return the records of some sequences.

        Args:
            record: int64 [sequences]; the number of the record of each sequence.
            entry: int64 [sequences]; the index of its source.
            excluded: bool [sequences]; whether training does not use it, equal for all sequences of
                a record.
        """
        numbers, record_of = np.unique(record, return_inverse=True)
        entry_of_record = np.zeros(len(numbers), np.int64)
        entry_of_record[record_of] = entry
        is_usable = np.ones(len(numbers), np.bool_)
        is_usable[record_of] = ~excluded
        return cls(numbers, entry_of_record, is_usable, record_of)

    def count(self, num_sources: int) -> NDArray[np.int64]:
        """Return the number of usable records of each source: int64 [sources]."""
        return np.bincount(self.entry[self.is_usable], minlength=num_sources).astype(np.int64)

    def measure(self, sizes: NDArray[Any], num_sources: int, seed: int) -> SizedRecords:
        """Return the sizes of the usable records in the order in which they are chosen.

        Args:
            sizes: Integers [sequences]; the size of each sequence.
            num_sources: The number of sources.
            seed: The seed of the choice.
        """
        of_record = np.bincount(self.record_of, sizes, len(self.numbers)).astype(np.int64)
        chosen = [self._choose(source, seed) for source in range(num_sources)]
        return SizedRecords(
            counts=np.array([len(indices) for indices, _ in chosen], np.int64),
            keys=np.concatenate([keys for _, keys in chosen]),
            sizes=np.concatenate([of_record[indices] for indices, _ in chosen]),
        )

    def count_copies(self, quotas: Sequence[Quota], seed: int) -> NDArray[np.int64]:
        """Return the number of copies of each sequence, that of its record: int64 [sequences].

        Args:
            quotas: The quota of each source.
            seed: The seed of the choice of the records with one copy more than others.
        """
        copies = np.zeros(len(self.numbers), np.int64)
        for source, quota in enumerate(quotas):
            indices, _ = self._choose(source, seed)
            copies[indices] = quota.copies
            copies[indices[: quota.extra]] += 1
        return copies[self.record_of]

    def _choose(self, source: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Return the indices of the usable records of a source, and their keys, ascending."""
        indices = np.flatnonzero(self.is_usable & (self.entry == source))
        keys = hash64_array(self.numbers[indices] - self.numbers[indices[:1]], seed)
        order = np.argsort(keys, kind="stable")
        return indices[order], keys[order]

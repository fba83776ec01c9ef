"""The sizes of the usable records of a group, in memory and as a file of the work folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sftprep.core.atomic_write import write_file


@dataclass(frozen=True, slots=True)
class SizedRecords:
    """The usable records of a group, by source, in the order in which a mixture chooses them.

    Attributes:
        counts: int64 [sources]; the number of records of each source.
        keys: uint64 [records]; the keys of the choice, ascending in each source.
        sizes: int64 [records]; the tokens or the trained tokens of each record.
    """

    counts: NDArray[np.int64]
    keys: NDArray[np.uint64]
    sizes: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """The index of the first record of each source: int64 [sources]."""
        return np.cumsum(self.counts) - self.counts

    @property
    def source_of(self) -> NDArray[np.int64]:
        """The index of the source of each record: int64 [records]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def write(self, path: Path) -> None:
        """Write the records to a file.

        Raises:
            StorageError: The file cannot be written.
        """
        # The number of sources, and then the three arrays.
        header = np.array([len(self.counts)], np.int64)
        table = np.concatenate([header, self.counts, self.keys.view(np.int64), self.sizes])
        write_file(path, lambda file: np.save(file, table, allow_pickle=False))

    @classmethod
    def read(cls, path: Path) -> SizedRecords:
        """Read the records from a file that `write` has written."""
        table = np.load(path, allow_pickle=False)
        counts, values = np.split(table[1:], [table[0]])
        keys, sizes = np.split(values, 2)
        return cls(counts, keys.view(np.uint64), sizes)


def is_sizes_file(path: Path, num_sources: int) -> bool:
    """Return whether a file of `SizedRecords` is complete."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
        is_whole = len(table) == 1 + num_sources + 2 * int(table[1 : 1 + num_sources].sum())
        return is_whole and table[0] == num_sources
    except (OSError, ValueError, EOFError, TypeError, IndexError):
        return False

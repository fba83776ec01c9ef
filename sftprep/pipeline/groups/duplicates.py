"""Records of several groups that equal each other: found by their hashes, range by range.

A first round over the groups writes the hashes of each group, sorted, to a file. Then the files are
merged by ranges of the hash, so that no process holds the hashes of all records. The result is a
file for each group with its records that equal an earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sftprep.core.atomic_write import write_file
from sftprep.core.hashing import digest
from sftprep.shards.layout import hash_name

_HASHES_PER_RANGE = 1 << 20
"""The records that are compared at a time. Each takes about 60 bytes of memory."""
_REASONS = ("duplicate", "near_duplicate")
_NO_RECORDS = np.zeros(0, np.int64)


def is_hash_file(path: Path) -> bool:
    """Return whether a file with the hashes of a group is complete."""
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False)) == 2 * len(_REASONS)
    except (OSError, ValueError, EOFError, TypeError):
        return False


def duplicates_files(work: Path, keys: Sequence[str]) -> list[Path]:
    """Return the path of the records of each group that equal an earlier one.

    Args:
        work: The work folder.
        keys: The key of the receipt of each group, in order.
    """
    key = digest(list(keys))[:40]
    return [work / f"duplicates-{key}-{number:05d}.npy" for number in range(len(keys))]


def write_hashes(
    path: Path,
    records: NDArray[np.int64],
    exact: NDArray[np.uint64],
    near: NDArray[np.uint64],
) -> None:
    """Write the hashes of a group, each kind sorted, with the number of its record.

    Args:
        path: The file.
        records: int64 [n]; the number of the record of each sequence.
        exact: uint64 [n]; the hash of the record.
        near: uint64 [n]; its hash without whitespace.

    Raises:
        StorageError: The file cannot be written.
    """
    first = np.unique(records, return_index=True)[1]
    rows = []
    for hashes in (exact[first], near[first]):
        order = np.argsort(hashes, kind="stable")
        rows += [hashes[order], records[first][order].astype(np.uint64)]
    table = np.stack(rows)
    write_file(path, lambda file: np.save(file, table, allow_pickle=False))


def find_duplicates_across(work: Path, keys: Sequence[str]) -> list[Path]:
    """Find the records of all groups that equal an earlier one, and write a file for each group.

    Args:
        work: The folder with the hashes of all groups.
        keys: The key of the receipt of each group, in order.

    Returns:
        The file of each group.

    Raises:
        StorageError: A file cannot be written.
    """
    paths = duplicates_files(work, keys)
    # Another process may have needed the same.
    if all(path.exists() for path in paths):
        return paths
    tables = [_HashTable(work / hash_name(key)) for key in keys]
    num_ranges = 1 + sum(map(len, tables)) // _HASHES_PER_RANGE
    bounds = np.array([k * 2**64 // num_ranges for k in range(1, num_ranges)], np.uint64)
    found: list[list[list[NDArray[np.int64]]]] = [[[], []] for _ in tables]
    for kind in range(len(_REASONS)):
        ends = [table.find_ranges(kind, bounds) for table in tables]
        for number in range(num_ranges):
            ranges = [slice(int(end[number]), int(end[number + 1])) for end in ends]
            groups = _find_later(
                [table.hashes(kind, rows) for table, rows in zip(tables, ranges, strict=True)],
                [table.records(kind, rows) for table, rows in zip(tables, ranges, strict=True)],
            )
            for group, records in groups.items():
                found[group][kind].append(records)
    for path, kinds in zip(paths, found, strict=True):
        _write_duplicates(path, [np.concatenate([_NO_RECORDS, *kind]) for kind in kinds])
    return paths


class _HashTable:
    """The file of `write_hashes` for one group.

    Ranges of it are read, and not mapped: mapped pages would stay in memory, 32 bytes per record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        self._first_byte, self._size = int(mapped.offset), int(mapped.shape[1])

    def __len__(self) -> int:
        return self._size

    def find_ranges(self, kind: int, bounds: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the first row of each range of the hash, and the number of rows at the end."""
        hashes = self.hashes(kind, slice(0, self._size))
        return np.concatenate(([0], np.searchsorted(hashes, bounds), [self._size]))

    def hashes(self, kind: int, rows: slice) -> NDArray[np.uint64]:
        """Return the hashes of a kind in some rows, ascending."""
        return self._read(2 * kind, rows)

    def records(self, kind: int, rows: slice) -> NDArray[np.int64]:
        """Return the records of a kind in some rows."""
        return self._read(2 * kind + 1, rows).view(np.int64)

    def _read(self, column: int, rows: slice) -> NDArray[np.uint64]:
        offset = self._first_byte + 8 * (column * self._size + rows.start)
        return np.fromfile(self._path, np.uint64, rows.stop - rows.start, offset=offset)


def _find_later(
    hashes: Sequence[NDArray[np.uint64]], records: Sequence[NDArray[np.int64]]
) -> dict[int, NDArray[np.int64]]:
    """Return, by the number of the group, the records whose hash an earlier record has.

    Args:
        hashes: uint64 [n of the group]; the hashes of each group, ascending.
        records: int64 [n of the group]; their records, ascending where hashes are equal.

    Example:
        hashes = [[7, 7, 9], [7]], records = [[0, 2, 1], [5]]  ->  {0: [2], 1: [5]}
    """
    joined = np.concatenate(hashes)
    order = np.argsort(joined, kind="stable")  # of equal hashes, by the group and the record
    is_equal = joined[order[1:]] == joined[order[:-1]]
    is_later = np.zeros(len(joined), np.bool_)
    is_later[order[1:][is_equal]] = True
    found, first = {}, 0
    for group, of_group in enumerate(records):
        own = is_later[first : first + len(of_group)]
        first += len(of_group)
        if own.any():
            found[group] = of_group[own]
    return found


def _write_duplicates(path: Path, kinds: list[NDArray[np.int64]]) -> None:
    # The number of records of the first kind, and then the records of both.
    table = np.concatenate([np.array([len(kinds[0])], np.int64), *kinds])
    write_file(path, lambda file: np.save(file, table, allow_pickle=False))


def read_duplicates(path: Path, record: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Return the sequences of records that equal an earlier one, by reason: bool [n].

    Args:
        path: A file that `find_duplicates_across` has written.
        record: int64 [n]; the number of the record of each sequence.
    """
    table = np.load(path, allow_pickle=False)
    exact = np.isin(record, table[1 : 1 + table[0]])
    near = np.isin(record, table[1 + table[0] :])
    return dict(zip(_REASONS, (exact, near & ~exact), strict=True))

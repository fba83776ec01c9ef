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

_HASHES_PER_RANGE = 1 << 22
_REASONS = ("duplicate", "near_duplicate")


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
    tables = [np.load(work / hash_name(key), mmap_mode="r") for key in keys]
    found: list[list[list[NDArray[np.int64]]]] = [[[], []] for _ in tables]
    num_ranges = 1 + sum(table.shape[1] for table in tables) // _HASHES_PER_RANGE
    bounds = [k * 2**64 // num_ranges for k in range(1, num_ranges)]
    for kind in range(len(_REASONS)):
        columns = [(table[2 * kind], table[2 * kind + 1]) for table in tables]
        ends = [
            [0, *np.searchsorted(hashes, np.array(bounds, np.uint64)).tolist(), len(hashes)]
            for hashes, _ in columns
        ]
        for number in range(num_ranges):
            slices = [slice(end[number], end[number + 1]) for end in ends]
            groups = _find_later(
                [hashes[rows] for (hashes, _), rows in zip(columns, slices, strict=True)],
                [records[rows] for (_, records), rows in zip(columns, slices, strict=True)],
            )
            for group, records in enumerate(groups):
                found[group][kind].append(records)
    for group, kinds in enumerate(found):
        _write_duplicates(paths[group], [np.concatenate(kind) for kind in kinds])
    return paths


def _find_later(
    hashes: Sequence[NDArray[np.uint64]], records: Sequence[NDArray[np.uint64]]
) -> list[NDArray[np.int64]]:
    """Return, for each group, the records whose hash an earlier record has.

    Args:
        hashes: uint64 [n of the group]; the hashes of each group.
        records: uint64 [n of the group]; their records.
    """
    sizes = [len(of_group) for of_group in hashes]
    group = np.repeat(np.arange(len(sizes)), sizes)
    joined, record = np.concatenate(hashes), np.concatenate(records).astype(np.int64)
    order = np.lexsort((record, group, joined))
    is_later = np.zeros(len(joined), np.bool_)
    is_later[order[1:]] = joined[order[1:]] == joined[order[:-1]]
    return [record[is_later & (group == number)] for number in range(len(sizes))]


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

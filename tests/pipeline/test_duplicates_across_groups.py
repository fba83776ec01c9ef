"""Records that equal one of an earlier group are found range by range of their hashes."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftprep.pipeline.groups import duplicates
from sftprep.pipeline.groups.duplicates import (
    find_duplicates_across,
    is_hash_file,
    read_duplicates,
    write_hashes,
)
from sftprep.shards.layout import hash_name

# Few values, some of them at the ends of the range.
HASHES = st.sampled_from([0, 1, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1])


@settings(deadline=None)
@given(
    # For each group, of each record: its hash, and its hash without whitespace.
    groups=st.lists(st.lists(st.tuples(HASHES, HASHES), max_size=6), min_size=2, max_size=4),
    per_range=st.sampled_from([1, 3, 1 << 20]),
)
def test_the_later_of_equal_records_are_found(
    tmp_path_factory: pytest.TempPathFactory,
    groups: list[list[tuple[int, int]]],
    per_range: int,
) -> None:
    work = tmp_path_factory.mktemp("work")
    keys = [f"{number:040x}" for number in range(len(groups))]
    for key, records in zip(keys, groups, strict=True):
        hashes = np.array(records, np.uint64).reshape(-1, 2)
        path = work / hash_name(key)
        # Two sequences of each record.
        numbers = np.repeat(np.arange(len(records)), 2)
        write_hashes(path, numbers, *np.repeat(hashes, 2, axis=0).T)
        assert is_hash_file(path)
    with patch.object(duplicates, "_HASHES_PER_RANGE", per_range):
        paths = find_duplicates_across(work, keys)
    assert find_duplicates_across(work, keys) == paths
    seen: tuple[set[int], set[int]] = (set(), set())
    for path, records in zip(paths, groups, strict=True):
        found = read_duplicates(path, np.arange(len(records)))
        for number, (exact, near) in enumerate(records):
            assert found["duplicate"][number] == (exact in seen[0])
            assert found["near_duplicate"][number] == (near in seen[1] and exact not in seen[0])
            seen[0].add(exact)
            seen[1].add(near)


def test_a_damaged_file_of_hashes_is_not_complete(tmp_path: Path) -> None:
    path = tmp_path / "hashes.npy"
    write_hashes(path, np.arange(9), np.arange(9, dtype=np.uint64), np.arange(9, dtype=np.uint64))
    assert is_hash_file(path)
    path.write_bytes(path.read_bytes()[:-8])
    assert not is_hash_file(path)

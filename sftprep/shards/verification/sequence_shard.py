"""The check of all bytes and values of a shard of layout `sequences`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from sftprep.errors import ShardError
from sftprep.shards.group import Group, ShardInfo
from sftprep.shards.manifest import Manifest
from sftprep.shards.schema import numpy_view
from sftprep.shards.sequences.index import SequenceIndex
from sftprep.shards.sequences.sequence_file import SequenceFile
from sftprep.shards.shard_file import check_size
from sftprep.shards.verification.block_values import are_lines, find_token_problems
from sftprep.shards.verification.whole_shard import (
    MOST_PROBLEMS,
    file_digest,
    find_total_problems,
)
from sftprep.shards.writer import ShardRows


def check_sequences(
    path: Path, info: ShardInfo, index: SequenceIndex, group: Group, manifest: Manifest
) -> list[str]:
    """Check a shard, and that its columns are those of the index.

    Args:
        path: The file, or a copy of it.
        info: Its entry in the file of its group.
        index: Its part of the index of the group.
        group: The group.
        manifest: The manifest of the build.

    Returns:
        The problems with its values.

    Raises:
        ShardError: The shard is missing or damaged.
    """
    check_size(path, info)
    # It is read before it is mapped: an error of the disk would kill a process that reads the map.
    if file_digest(path) != info.sha256:
        raise ShardError(f"{path}: its SHA-256 is not that of the manifest", remedy="")
    shard = SequenceFile(path, info, index.tokens, verify=True, checked=set())
    found: list[SequenceIndex] = []

    def find_problems() -> Iterator[str]:
        first = 0
        for number in range(len(shard)):
            batch = shard.read_block(number)
            found.append(_index_of(batch))
            yield from find_token_problems(batch, first, manifest)
            origin = numpy_view(batch.column("origin"))
            if (wrong := np.flatnonzero(~are_lines(origin, group, manifest))).size:
                row = first + int(wrong[0])
                yield f"row {row}: origin {origin[wrong[0]]} is not a line of the inputs"
            first += batch.num_rows

    all_problems = find_problems()
    problems = [*itertools.islice(all_problems, MOST_PROBLEMS)]
    if more := sum(1 for _ in all_problems):  # this also reads the other blocks
        problems.append(f"{more:,} more problems")
    problems += find_total_problems(index, info)
    if not SequenceIndex.concatenate(found).equals(index):
        problems.append("its columns are not those of the index of its group")
    return [f"{path}: {problem}" for problem in problems]


def _index_of(batch: pa.RecordBatch) -> SequenceIndex:
    ids = batch.column("input_ids")
    lengths = np.diff(numpy_view(ids.offsets))
    rows = ShardRows(
        numpy_view(ids.values),
        numpy_view(batch.column("completion_mask").values),
        lengths,
        numpy_view(batch.column("origin")),
        np.arange(len(lengths) + 1),
        numpy_view(batch.column("flags")),
    )
    return SequenceIndex.of(rows, np.ones(len(lengths), np.int32))

"""The check of all bytes and values of a shard of layout `sequences`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from sftprep.shards.group import Group, ShardInfo
from sftprep.shards.manifest import Manifest
from sftprep.shards.schema import numpy_view
from sftprep.shards.sequences.index import SequenceIndex
from sftprep.shards.sequences.sequence_file import SequenceFile
from sftprep.shards.verification.block_values import are_lines, find_token_problems
from sftprep.shards.verification.whole_shard import (
    check_content,
    find_total_problems,
    first_problems,
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
    check_content(path, info)
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

    problems = first_problems(find_problems())
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

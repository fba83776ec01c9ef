"""The check of all bytes and values of a shard."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from sftprep.core.hashing import digest_of_file
from sftprep.errors import ShardError
from sftprep.shards.group import Group, ShardInfo
from sftprep.shards.manifest import Manifest
from sftprep.shards.pack_index import PackIndex
from sftprep.shards.schema import numpy_view
from sftprep.shards.sequences.index import SequenceIndex
from sftprep.shards.shard_file import ShardFile, check_size
from sftprep.shards.verification.block_values import find_value_problems

MOST_PROBLEMS = 5
"""The most problems with the values of one shard that are reported."""


def check_shard(
    path: Path, info: ShardInfo, group: Group, manifest: Manifest
) -> tuple[PackIndex, list[str]]:
    """Check a shard.

    Args:
        path: The file, or a copy of it.
        info: Its entry in the file of its group.
        group: The group.
        manifest: The manifest of the build.

    Returns:
        The sizes of its packs, and the problems with its values.

    Raises:
        ShardError: The shard is missing or damaged.
    """
    check_content(path, info)
    shard = ShardFile(path, info, manifest.max_length, verify=True, checked=set())
    sizes: list[PackIndex] = []

    def find_problems() -> Iterator[str]:
        for number in range(len(shard)):
            batch = shard.read_block(number)
            sizes.append(_sizes_of(batch))
            yield from find_value_problems(batch, number * shard.packs_per_block, group, manifest)

    problems = first_problems(find_problems())
    index = PackIndex.concatenate(sizes)
    problems += find_total_problems(index, info)
    return index, [f"{path}: {problem}" for problem in problems]


def check_content(path: Path, info: ShardInfo) -> None:
    """Check the size and the SHA-256 of a shard, of any layout.

    It is read before it is mapped: an error of the disk would kill a process that reads the map.

    Raises:
        ShardError: The shard is missing or damaged.
    """
    check_size(path, info)
    if file_digest(path) != info.sha256:
        raise ShardError(f"{path}: its SHA-256 is not that of the manifest", remedy="")


def first_problems(found: Iterator[str]) -> list[str]:
    """Return the first problems and the number of the others; all of them are looked for."""
    problems = [*itertools.islice(found, MOST_PROBLEMS)]
    if more := sum(1 for _ in found):
        problems.append(f"{more:,} more problems")
    return problems


def find_total_problems(index: PackIndex | SequenceIndex, info: ShardInfo) -> list[str]:
    """Return the differences between the sizes of the rows of a shard and its entry."""
    totals = {
        "packs" if isinstance(index, PackIndex) else "sequences": (len(index), info.rows),
        "tokens": (int(index.tokens.sum(dtype=np.int64)), info.tokens),
        "trained tokens": (int(index.trained_tokens.sum(dtype=np.int64)), info.trained_tokens),
    }
    return [
        f"it holds {found:,} {name}, the file of its group says {expected:,}"
        for name, (found, expected) in totals.items()
        if found != expected
    ]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex; "" if it does not exist.

    Raises:
        ShardError: It cannot be read.
    """
    try:
        return digest_of_file(path)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}", remedy="") from error


def _sizes_of(batch: pa.RecordBatch) -> PackIndex:
    seq_lengths = batch.column("seq_lengths")
    return PackIndex.of(
        numpy_view(batch.column("completion_mask").values),
        numpy_view(seq_lengths.values),
        numpy_view(seq_lengths.offsets),
    )

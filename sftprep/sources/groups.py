"""Groups: ranges of the inputs of a limited size, cut from the listing of the files alone.

The packs of a group are planned together, and do not depend on other groups. A large file is cut at
fixed positions. Small files are batched in their order, and a batch ends at a file that a hash of
its name selects: so a file added early in the order leaves the later groups unchanged.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import xxhash

from sftprep.sources.partition import PARTITION_BYTES, Source, range_length
from sftprep.sources.readers.lines import compression

_SMALLEST_FILE = 64 * 1024
"""What a file counts for at least, so that a group has at most 16,384 of them."""
_COMPRESSION_RATIO = 4
"""What compressed files are assumed to grow by."""
_SMALLEST_SHARE = 8
"""A batch of small files has at least this fraction (1 / 8) of the bytes of a group."""


@dataclass(frozen=True, slots=True)
class GroupMember:
    """An input that belongs to a group, with all of its records or a range of them."""

    input: int  # the number of the input
    source: Source


def slice_bytes(group_bytes: int) -> int:
    """Return the size of a slice, the part of a group that one task reads."""
    return min(PARTITION_BYTES, group_bytes)


def cut_groups(
    inputs: Sequence[tuple[int, Source, int]], group_bytes: int
) -> Iterator[list[GroupMember]]:
    """Cut inputs into groups.

    Args:
        inputs: The number, the source and the size in bytes of each input, in order.
        group_bytes: The size of a group, in bytes as stored.

    Yields:
        The members of each group. All inputs are one group if they are smaller than one.

    Example:
        sizes = [3 GiB, 10 KiB, 10 KiB], group_bytes = 1 GiB
        ->  [0, 1 GiB), [1 GiB, 2 GiB), [2 GiB, 3 GiB) of the first input, and then both others
    """
    # Cut points are those of slices too.
    group_bytes -= group_bytes % slice_bytes(group_bytes)
    sizes = [_counted_bytes(source, size) for _, source, size in inputs]
    if sum(sizes) <= group_bytes:
        yield [GroupMember(number, source) for number, source, _ in inputs]
        return
    batch: list[GroupMember] = []
    filled = 0
    for (number, source, size), counted in zip(inputs, sizes, strict=True):
        if counted > group_bytes:
            if batch:
                yield batch
            batch, filled = [], 0
            for part in _cut_file(source, size, group_bytes):
                yield [GroupMember(number, part)]
            continue
        if filled + counted > group_bytes:
            yield batch
            batch, filled = [], 0
        batch.append(GroupMember(number, source))
        filled += counted
        if filled * _SMALLEST_SHARE >= group_bytes and _ends_batch(source, counted, group_bytes):
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def _counted_bytes(source: Source, size: int) -> int:
    ratio = _COMPRESSION_RATIO if compression(source.file) else 1
    return max(_SMALLEST_FILE, ratio * size)


def _ends_batch(source: Source, counted: int, group_bytes: int) -> bool:
    """Return whether a batch of small files ends with this one: twice per group on average."""
    name = xxhash.xxh3_64_intdigest(os.path.basename(source.file).encode("utf-8", "replace"))
    return name * group_bytes < counted * 2 * 2**64


def _cut_file(source: Source, size: int, group_bytes: int) -> Iterator[Source]:
    """Yield the ranges of a large file; all of it if it can only be read from its start."""
    length = range_length(source)
    if length is None:
        yield source
        return
    # Lines are cut at bytes, and tables at rows, of which each range has about the same number.
    ends = [length * end // size for end in range(group_bytes, size, group_bytes)]
    for start, end in pairwise([0, *ends, length]):
        yield dataclasses.replace(source, start=start, end=end)

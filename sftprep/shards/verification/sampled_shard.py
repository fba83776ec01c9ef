"""The quick check of a shard: its size, its end, and the digests of a few blocks.

The first, the middle and the last block are read, and the end of the file with its footer. So a
file that is missing, cut, empty or another one is found, and damage elsewhere is not.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import xxhash

from sftprep.core.regular_files import open_regular_file
from sftprep.errors import ShardError
from sftprep.shards.group import Block, ShardInfo
from sftprep.shards.layout import SHARD_FOLDER
from sftprep.shards.shard_file import BUILD_AGAIN, check_size
from sftprep.stores.folder import BuildFolder

_LARGEST_BLOCK = 32 << 20
"""A larger block is not read, in bytes. One of 64 packs with 4,096 tokens has 1.6 MB."""


def sampled_blocks(info: ShardInfo) -> list[int]:
    """Return the numbers of the blocks that the quick check reads, in order."""
    blocks = _blocks_of(info)
    last = len(blocks) - 1
    # Before version 2.0, the whole shard is one block. Since then, the last one has no packs.
    last_of_packs = last - 1 if info.blocks and last else last
    chosen = {0, last_of_packs // 2, last_of_packs, last}
    return sorted(number for number in chosen if blocks[number].bytes <= _LARGEST_BLOCK)


def sample_shard(root: BuildFolder, info: ShardInfo) -> int:
    """Check the size of a shard, and the digests of some of its blocks.

    Args:
        root: The folder of the build.
        info: The entry of the shard in the file of its group.

    Returns:
        The number of blocks that were read.

    Raises:
        ShardError: The shard is missing, or has another size or content.
        StorageError: The store cannot be reached.
    """
    name = f"{SHARD_FOLDER}/{info.name}"
    path = root / name
    blocks = _blocks_of(info)
    ends = [*accumulate(block.bytes for block in blocks)]
    if ends[-1] != info.bytes:
        raise ShardError(f"{path}: its blocks in the manifest do not cover it", remedy=BUILD_AGAIN)
    _check_stored_size(root, name, info)
    chosen = sampled_blocks(info)
    for number in chosen:
        content = _read_bytes(root, name, ends[number] - blocks[number].bytes, ends[number])
        if xxhash.xxh3_128_hexdigest(content) != blocks[number].xxh3:
            raise ShardError(
                f"{path} is damaged: block {number + 1} of {len(blocks)} is not what was written",
                remedy=BUILD_AGAIN,
            )
    return len(chosen)


def _blocks_of(info: ShardInfo) -> tuple[Block, ...]:
    return info.blocks or (Block(info.bytes, info.xxh3),)


def _check_stored_size(root: BuildFolder, name: str, info: ShardInfo) -> None:
    """Raise ShardError if a shard is missing or has another size."""
    if isinstance(root, Path):
        check_size(root / name, info)
        return
    try:
        size = root.mark(name).size
    except FileNotFoundError as error:
        raise ShardError(f"{root / name} is missing", remedy=BUILD_AGAIN) from error
    if size != info.bytes:
        raise ShardError(
            f"{root / name} has {size} bytes, not the {info.bytes} that were written",
            remedy=BUILD_AGAIN,
        )


def _read_bytes(root: BuildFolder, name: str, start: int, end: int) -> bytes:
    """Return the bytes [start, end) of a file of a build, in one request of a store."""
    try:
        if not isinstance(root, Path):
            return root.read_range(name, start, end)
        with open_regular_file(root / name) as file:
            file.seek(start)
            return file.read(end - start)
    except OSError as error:
        raise ShardError(
            f"cannot read {root / name}: {error.strerror or error}", remedy=BUILD_AGAIN
        ) from error

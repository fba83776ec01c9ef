"""The index of a group: the sizes of its packs, without their tokens.

A trainer divides the packs of a step among its ranks by their cost, and must not read the tokens of
all packs for that. The index has 28 bytes per pack. It is an Arrow file, whose name does not end in
`.arrow`, so that programs which read all such files of a folder do not take it for a shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sftprep.core.atomic_write import write_bytes
from sftprep.core.hashing import digest_of_file
from sftprep.core.regular_files import read_regular_file
from sftprep.errors import ShardError, format_count
from sftprep.shards.group import Group
from sftprep.shards.layout import index_path
from sftprep.shards.schema import arrow_array, numpy_view
from sftprep.shards.shard_file import BUILD_AGAIN
from sftprep.stores.cache import local_file
from sftprep.stores.folder import BuildFolder

_WIDE_COLUMNS = {"sum_of_squares"}
"""The columns of int64; the others are int32."""
_BYTES_PER_PACK, _OTHER_BYTES = 64, 1 << 16
"""Bounds for the size of an index, with room for the columns of later versions."""


@dataclass(frozen=True, slots=True, eq=False)
class PackIndex:
    """The sizes of packs, one value per pack.

    Attributes:
        tokens: int32 [packs]; the number of tokens.
        trained_tokens: int32 [packs]; the number of targets of the loss.
        sequences: int32 [packs]; the number of sequences.
        longest: int32 [packs]; the tokens of the longest sequence.
        sum_of_squares: int64 [packs]; the sum of the squares of the lengths of the sequences, to
            which the cost of attention is proportional.
        image_patches: int32 [packs]; the number of patches of images, 0 without images.

    Example:
        A pack of sequences with 2 and 3 tokens, all trained:
        tokens = [5], trained_tokens = [3], sequences = [2], longest = [3], sum_of_squares = [13]
    """

    tokens: NDArray[np.int32]
    trained_tokens: NDArray[np.int32]
    sequences: NDArray[np.int32]
    longest: NDArray[np.int32]
    sum_of_squares: NDArray[np.int64]
    image_patches: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(
        cls,
        completion_mask: NDArray[np.bool_],
        seq_lengths: NDArray[np.int32],
        pack_offsets: NDArray[Any],
    ) -> PackIndex:
        """Return the index of packs.

        Args:
            completion_mask: bool [tokens]; True where a token is trained.
            seq_lengths: int32 [sequences]; at least 1.
            pack_offsets: Integers [packs + 1]; the first sequence of each pack. No pack is empty.
        """
        lengths = seq_lengths.astype(np.int64)
        if not len(lengths):
            return cls.concatenate([])
        firsts = np.cumsum(lengths) - lengths
        # Nothing predicts the first token of a sequence.
        trained = np.add.reduceat(completion_mask, firsts, dtype=np.int64)
        trained -= completion_mask[firsts]
        return cls.of_sequences(lengths, trained, pack_offsets)

    @classmethod
    def of_sequences(
        cls, lengths: NDArray[Any], trained_tokens: NDArray[Any], pack_offsets: NDArray[Any]
    ) -> PackIndex:
        """Return the index of packs from the sizes of their sequences.

        Args:
            lengths: Integers [sequences]; at least 1.
            trained_tokens: Integers [sequences]; the number of targets of each sequence.
            pack_offsets: As for `of`.
        """
        firsts, wide = pack_offsets[:-1], lengths.astype(np.int64)
        if not len(firsts):
            return cls.concatenate([])
        return cls(
            tokens=np.add.reduceat(wide, firsts).astype(np.int32),
            trained_tokens=np.add.reduceat(trained_tokens, firsts, dtype=np.int64).astype(np.int32),
            sequences=np.diff(pack_offsets).astype(np.int32),
            longest=np.maximum.reduceat(lengths, firsts).astype(np.int32),
            sum_of_squares=np.add.reduceat(wide * wide, firsts),
            image_patches=np.zeros(len(firsts), np.int32),
        )

    @classmethod
    def concatenate(cls, parts: Iterable[PackIndex]) -> PackIndex:
        """Return the index of the packs of several shards or groups, in order."""
        found = [*parts]
        return cls(
            **{
                name: np.concatenate([_empty(name), *(getattr(part, name) for part in found)])
                for name in _COLUMNS
            }
        )

    def take(self, packs: NDArray[Any]) -> PackIndex:
        """Return the index of some packs, by their numbers: integers [n]."""
        return PackIndex(**{name: getattr(self, name)[packs] for name in _COLUMNS})

    def equals(self, other: PackIndex) -> bool:
        """Return whether all values are those of another index."""
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _COLUMNS)

    def to_bytes(self) -> bytes:
        """Return the content of its file."""
        columns = {name: arrow_array(getattr(self, name)) for name in _COLUMNS}
        return arrow_bytes([pa.RecordBatch.from_arrays([*columns.values()], names=[*columns])])


_COLUMNS = tuple(field.name for field in dataclasses.fields(PackIndex))


def arrow_bytes(batches: Sequence[pa.RecordBatch]) -> bytes:
    """Return the content of an Arrow file with some batches, at least one."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def write_index(folder: Path, key: str, index: PackIndex) -> str:
    """Write the index of a group, as `write_index_content` does."""
    return write_index_content(folder, key, index.to_bytes())


def write_index_content(folder: Path, key: str, content: bytes) -> str:
    """Write the index of a group of any layout.

    Args:
        folder: The folder of the build.
        key: The key of the group.
        content: The content of the file.

    Returns:
        The xxh3-128 of the file, in hex.

    Raises:
        StorageError: The file cannot be written.
    """
    digest = xxhash.xxh3_128_hexdigest(content)
    write_bytes(folder / index_path(key, digest), content)
    return digest


def read_index(folder: BuildFolder, group: Group) -> PackIndex:
    """Read the index of a group.

    Args:
        folder: The folder of the build.
        group: The group, of format version 2.0 or later.

    Raises:
        ShardError: The file is missing or damaged.
        StorageError: The store cannot be reached.
    """
    name = index_path(group.key, group.index_digest)
    with local_file(folder, name, group.index_digest) as path:
        return read_index_file(path, group)


def read_index_file(path: Path, group: Group) -> PackIndex:
    """Read the index of a group from a local file, as `read_index` does."""
    return _cached_index(path, group.rows, group.index_digest)


# A trainer goes back to the same groups all the time.
@lru_cache(maxsize=64)
def _cached_index(path: Path, packs: int, digest: str) -> PackIndex:
    with opened_index(path, digest, _BYTES_PER_PACK * packs + _OTHER_BYTES) as file:
        batch = file.get_batch(0)
        columns = {name: numpy_view(batch.column(name)) for name in _COLUMNS}
    if any(len(values) != packs for values in columns.values()):
        raise ShardError(f"{path} does not have {format_count(packs, 'pack')}", remedy=BUILD_AGAIN)
    return PackIndex(**columns)


@contextmanager
def opened_index(path: Path, digest: str, most_bytes: int) -> Iterator[pa.RecordBatchFileReader]:
    """Open the index of a group of any layout, whose content may be damaged.

    Args:
        path: The file.
        digest: Its xxh3-128 in hex, which is checked before the content is parsed.
        most_bytes: The largest size of the file.

    Raises:
        ShardError: The file is missing or damaged, or the `with` block cannot read its content.
    """
    try:
        content = read_regular_file(path, most_bytes)
        if xxhash.xxh3_128_hexdigest(content) != digest:
            raise ShardError(f"{path}: its content is not what was written", remedy=BUILD_AGAIN)
        yield pa.ipc.open_file(pa.py_buffer(content))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ShardError(f"cannot read {path}: {error}", remedy=BUILD_AGAIN) from error


def is_index(path: Path, digest: str) -> bool:
    """Return whether a file is the index with a digest."""
    try:
        return digest_of_file(path, xxhash.xxh3_128) == digest
    except OSError:
        return False


def _empty(name: str) -> NDArray[Any]:
    return np.zeros(0, np.int64 if name in _WIDE_COLUMNS else np.int32)

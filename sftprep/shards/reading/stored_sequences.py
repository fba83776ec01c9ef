"""The tokens of the sequences of one group in its mapped shards, gathered in any order."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftprep.shards.group import Group
from sftprep.shards.reading.mapped_shard import file_of
from sftprep.shards.schema import numpy_view
from sftprep.shards.sequences.index import SequenceIndex
from sftprep.shards.sequences.schema import block_offsets
from sftprep.shards.sequences.sequence_file import SequenceFile
from sftprep.stores.cache import local_file
from sftprep.stores.folder import BuildFolder


class StoredSequences:
    """The sequences of a group. Shards are mapped, and blocks checked, when they are first used.

    Args:
        root: The folder of the build.
        group: The group.
        index: Its index.
        verify: Whether to check the digest of each block.
        checked: The numbers of the blocks of each shard that were checked already; blocks are added
            to it.
    """

    def __init__(
        self,
        root: BuildFolder,
        group: Group,
        index: SequenceIndex,
        *,
        verify: bool,
        checked: dict[int, set[int]],
    ) -> None:
        self._root, self._infos, self._verify, self._checked = root, group.shards, verify, checked
        self._tokens = index.tokens
        # Of each shard, its first row; and of each block of all shards, its first row.
        self._shard_rows = [0, *accumulate(info.rows for info in group.shards)]
        offsets = [
            first + block_offsets(index.tokens[first:end])[:-1]
            for first, end in zip(self._shard_rows, self._shard_rows[1:], strict=False)
        ]
        self._first_blocks = [0, *accumulate(map(len, offsets))]
        self._block_rows = np.concatenate([np.zeros(0, np.int64), *offsets])
        self._files: dict[int, SequenceFile] = {}
        self._blocks: dict[int, _Block] = {}

    @property
    def is_mapped(self) -> bool:
        """Whether all shards are mapped."""
        return len(self._files) == len(self._infos)

    def find(
        self,
        rows: NDArray[np.int32],
        starts: NDArray[np.int32],
        lengths: NDArray[np.int32],
        token_offsets: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        """Return the addresses of ranges of sequences, for `gather`.

        Args:
            rows: int32 [n]; the index of each sequence in the group.
            starts: int32 [n]; the first token of each range in its sequence.
            lengths: int32 [n]; its number of tokens.
            token_offsets: int64 [sequences + 1]; the first token of each sequence in the group.

        Returns:
            int32 [3, n]: the number of the block in the group; the first token in the block, and
            the last one + 1.
        """
        block = np.searchsorted(self._block_rows, rows, side="right") - 1
        begin = token_offsets[rows] - token_offsets[self._block_rows[block]] + starts
        return np.stack([block, begin, begin + lengths]).astype(np.int32)

    def gather(
        self, addresses: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
        """Return the tokens of ranges of sequences, of which there is at least one.

        Args:
            addresses: int32 [3, S]; their addresses.

        Returns:
            The ids, int32 [T]; and the weights, float32 [T], or None without weights.

        Raises:
            ShardError: A shard is missing or damaged.
        """
        # For the few sequences of a pack, views of bytes are three times as fast as arrays.
        opened, ids, weights = self._blocks, [], []
        for number, begin, end in zip(*addresses.tolist(), strict=True):
            block = opened.get(number) or self._open_block(number)
            ids.append(block.ids[begin:end])
            if block.weights is not None:
                weights.append(block.weights[begin:end])
        return _join(ids, np.int32), _join(weights, np.float32) if weights else None

    def _open_block(self, number: int) -> _Block:
        shard = int(np.searchsorted(self._first_blocks, number, side="right")) - 1
        file = self._files.get(shard)
        if file is None:
            self._files[shard] = file = self._map(shard)
        block = _Block.of(file.read_block(number - self._first_blocks[shard]))
        self._blocks[number] = block
        return block

    def _map(self, shard: int) -> SequenceFile:
        info = self._infos[shard]
        lengths = self._tokens[self._shard_rows[shard] : self._shard_rows[shard + 1]]
        with local_file(self._root, *file_of(info)) as path:
            return SequenceFile(
                path,
                info,
                lengths,
                verify=self._verify,
                checked=self._checked.setdefault(shard, set()),
            )


class _Block(NamedTuple):
    """The columns of a block, as views of the memory map of its shard."""

    ids: memoryview  # int32 [tokens]
    weights: memoryview | None  # float32 [tokens]

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _Block:
        weights = None
        if "loss_weights" in batch.schema.names:
            weights = numpy_view(batch.column("loss_weights").values).data
        return cls(numpy_view(batch.column("input_ids").values).data, weights)


def _join(parts: list[memoryview], dtype: Any) -> NDArray[Any]:
    """Return values as one array; those of a single part without a copy."""
    return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype)

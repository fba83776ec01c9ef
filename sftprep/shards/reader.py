"""Reading of builds: memory-mapped, in any order, with columns as NumPy views."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from sftprep.errors import ManifestError
from sftprep.shards.group import ShardInfo
from sftprep.shards.layout import MANIFEST_NAME, SHARD_FOLDER
from sftprep.shards.manifest import Manifest
from sftprep.shards.pack_index import PackIndex, read_index
from sftprep.shards.schema import numpy_view, position_dtype
from sftprep.shards.shard_file import BUILD_AGAIN, FileIdentity, ShardFile, check_size
from sftprep.shards.writer import make_position_ids
from sftprep.stores.cache import local_file
from sftprep.stores.folder import BuildFolder, folder_of

_MOST_MAPPED = 256
"""The most shards that stay mapped. Each shard is one map, of which Linux allows a process 65,530.
A pack keeps the map of its own shard."""
_MOST_BLOCKS = 16
"""The most blocks of a shard that stay open. To open one again takes less than to read a pack."""


@dataclass(frozen=True, slots=True)
class Pack:
    """One row of a shard: several sequences, one after the other.

    In a pack of `open_shards`, all arrays are read-only views of the memory-mapped file, except for
    `completion_mask`, which is stored as bits, and for position ids that are not stored.

    Example:
        A pack of the sequences [5, 6] and [7]:
        input_ids = [5, 6, 7], position_ids = [0, 1, 0], seq_lengths = [2, 1]
    """

    input_ids: NDArray[np.int32]  # [T], the tokens of all sequences
    position_ids: NDArray[Any]  # uint16 or int32 [T], restarts at 0 with each sequence
    completion_mask: NDArray[np.bool_]  # [T], True = trained
    seq_lengths: NDArray[np.int32]  # [S], sums to T
    origin: NDArray[np.int64]  # [S], slice and line of the record; see `Manifest.locate`
    # [T], weight of each token in the loss, 0 = not trained; None if every trained one weighs 1
    loss_weights: NDArray[np.float32] | None = None
    flags: NDArray[np.uint8] | None = None  # [S], see `schema.py`; None before version 2.0


class Shards:
    """A build as a sequence of packs: `len(shards)`, `shards[i]`, iteration.

    An object is cheap to create, and can be pickled for another process, which opens the files
    itself.
    """

    def __init__(self, root: BuildFolder, manifest: Manifest, *, verify: bool) -> None:
        self.root, self.manifest, self.verify = root, manifest, verify
        # Index of the first pack of each group, and of the first one after all groups.
        self._group_starts = np.cumsum([0, *(sum(entry.packs) for entry in manifest.groups)])
        # By number of a group: in it, the number of the first pack after each shard.
        self._shard_ends: dict[int, NDArray[np.int64]] = {}
        # By number, the last used last.
        self._mapped: OrderedDict[_ShardNumber, _MappedShard] = OrderedDict()
        self._checked: dict[_ShardNumber, _CheckedFile] = {}

    @property
    def plan_settings(self) -> dict[str, Any]:
        """The settings by which packs are planned while they are read; {} for stored packs."""
        return {}

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: int) -> Pack:
        columns, row = self._find(index)
        seq_lengths = columns.row("seq_lengths", row)
        position_ids = (
            columns.row("position_ids", row)
            if "position_ids" in columns.values
            else make_position_ids(seq_lengths, position_dtype(self.manifest.max_length))
        )
        weights = columns.row("loss_weights", row) if "loss_weights" in columns.values else None
        return Pack(
            columns.row("input_ids", row),
            position_ids,
            columns.mask(row),
            seq_lengths,
            columns.row("origin", row),
            weights,
            columns.row("flags", row) if "flags" in columns.values else None,
        )

    def __iter__(self) -> Iterator[Pack]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (str(self.root), self.manifest, self.verify))

    def seq_lengths(self, index: int) -> NDArray[np.int32]:
        """Return the lengths of the sequences in a pack, without reading its tokens.

        Args:
            index: The index of the pack.

        Returns:
            int32 [S], a view of the file.
        """
        columns, row = self._find(index)
        return columns.row("seq_lengths", row)

    def sizes(self, packs: ArrayLike) -> PackIndex:
        """Return the sizes of packs, without reading their tokens.

        Args:
            packs: Integers [n]; the indices of the packs, from 0.

        Returns:
            The sizes, in the order of `packs`. They are in the files of the groups; in a build
            before version 2.0, they are counted in the shards.

        Raises:
            IndexError: There is no such pack.
            ShardError: A file is missing or damaged.
        """
        wanted = np.asarray(packs, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"packs {wanted.min()} to {wanted.max()} of {len(self)}")
        groups = np.searchsorted(self._group_starts, wanted, side="right") - 1
        order = np.argsort(groups, kind="stable")
        found = PackIndex.concatenate(
            self._sizes_in_group(number, wanted[order[groups[order] == number]])
            for number in np.unique(groups).tolist()
        )
        return found.take(np.argsort(order))

    def _sizes_in_group(self, number: int, packs: NDArray[np.int64]) -> PackIndex:
        if self.manifest.has_slices:
            index = read_index(self.root, self.manifest.read_group(number))
            return index.take(packs - self._group_starts[number])
        found = []
        for pack in map(self.__getitem__, packs.tolist()):
            offsets = np.array([0, len(pack.seq_lengths)])
            found.append(PackIndex.of(pack.completion_mask, pack.seq_lengths, offsets))
        return PackIndex.concatenate(found)

    def locate(self, index: int, sequence: int) -> tuple[str, int]:
        """Return the file and the 1-based line of the record of a sequence.

        Args:
            index: The index of the pack.
            sequence: The index of the sequence in the pack.
        """
        columns, row = self._find(index)
        group = self._find_shard(index)[0].group
        return self.manifest.locate_in_group(int(columns.row("origin", row)[sequence]), group)

    def _find(self, index: int) -> tuple[_Columns, int]:
        """Open the block of a pack, and return it with the row of the pack."""
        shard, pack = self._find_shard(index)
        if shard in self._mapped:
            self._mapped.move_to_end(shard)
        else:
            self._mapped[shard] = self._map(shard)
            if len(self._mapped) > _MOST_MAPPED:
                self._mapped.popitem(last=False)
        return self._mapped[shard].find(pack)

    def _find_shard(self, index: int) -> tuple[_ShardNumber, int]:
        """Return the number of the shard of a pack, and the number of the pack in the shard."""
        pack = index + len(self) if index < 0 else index
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        group = int(np.searchsorted(self._group_starts, pack, side="right")) - 1
        pack -= int(self._group_starts[group])
        ends = self._shard_ends.get(group)
        if ends is None:
            ends = np.cumsum(self.manifest.groups[group].packs, dtype=np.int64)
            self._shard_ends[group] = ends
        shard = int(np.searchsorted(ends, pack, side="right"))
        return _ShardNumber(group, shard), pack - (int(ends[shard - 1]) if shard else 0)

    def _map(self, shard: _ShardNumber) -> _MappedShard:
        """Map a shard; the blocks that this object has checked before are not checked again."""
        info = self._find_info(shard)
        name = f"{SHARD_FOLDER}/{info.name}"
        with local_file(self.root, name, info.sha256, info.bytes) as path:
            identity = check_size(path, info)
            checked = self._checked.get(shard)
            if checked is None or checked.identity != identity:
                self._checked[shard] = checked = _CheckedFile(identity)
            file = ShardFile(
                path, info, self.manifest.max_length, verify=self.verify, checked=checked.blocks
            )
        return _MappedShard(file)

    def _find_info(self, shard: _ShardNumber) -> ShardInfo:
        """Return the entry of a shard, from the file of its group."""
        group, number = shard
        infos = self.manifest.read_group(group).shards
        packs = self.manifest.groups[group].packs
        if len(infos) != len(packs) or infos[number].rows != packs[number]:
            raise ManifestError(
                f"{self.root / MANIFEST_NAME} is damaged: the packs of group"
                f" {self.manifest.groups[group].key} are not those of its shards",
                remedy=BUILD_AGAIN,
            )
        return infos[number]


class _ShardNumber(NamedTuple):
    """The number of a group, and the number of a shard in it."""

    group: int
    shard: int


@dataclass(frozen=True, slots=True)
class _CheckedFile:
    """The blocks of a file that were checked, as long as the file is the same."""

    identity: FileIdentity
    blocks: set[int] = field(default_factory=set)


class _MappedShard:
    """A shard, with the columns of the blocks that were used last."""

    def __init__(self, file: ShardFile) -> None:
        self._file = file
        self._blocks: OrderedDict[int, _Columns] = OrderedDict()  # by number, the last used last

    def find(self, pack: int) -> tuple[_Columns, int]:
        """Return the columns of the block of a pack, and the row of the pack in them."""
        number, row = divmod(pack, self._file.packs_per_block)
        if number in self._blocks:
            self._blocks.move_to_end(number)
        else:
            self._blocks[number] = _Columns(self._file.read_block(number))
            if len(self._blocks) > _MOST_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[number], row


class _Columns:
    """The columns of one block, as views of the memory map of its shard."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.offsets: dict[str, NDArray[np.int32]] = {}  # [rows + 1], by name of the column
        self.values: dict[str, NDArray[Any]] = {}  # of all rows; without the mask
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            self.offsets[name] = numpy_view(column.offsets)
            if pa.types.is_boolean(column.values.type):
                # The mask stays packed: unpacking all of it would take 8 times the memory.
                self._bits = np.frombuffer(column.values.buffers()[1], dtype=np.uint8)
            else:
                self.values[name] = numpy_view(column.values)

    def row(self, name: str, row: int) -> NDArray[Any]:
        """Return the values of a column in one row, a view."""
        offsets = self.offsets[name]
        return self.values[name][offsets[row] : offsets[row + 1]]

    def mask(self, row: int) -> NDArray[np.bool_]:
        """Return the completion mask of one row, bool [T], unpacked from bits."""
        start, end = (
            int(self.offsets["completion_mask"][row]),
            int(self.offsets["completion_mask"][row + 1]),
        )
        first_byte = start // 8
        bits = np.unpackbits(self._bits[first_byte : (end + 7) // 8], bitorder="little")
        return bits[start - 8 * first_byte : end - 8 * first_byte].view(np.bool_)


def _reopen(root: str, manifest: Manifest, verify: bool) -> Shards:
    return Shards(folder_of(root), manifest, verify=verify)

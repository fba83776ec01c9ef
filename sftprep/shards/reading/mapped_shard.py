"""A mapped shard, with the columns of its blocks as NumPy views."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftprep.shards.group import ShardInfo
from sftprep.shards.layout import SHARD_FOLDER
from sftprep.shards.schema import numpy_view
from sftprep.shards.shard_file import ShardFile
from sftprep.stores.fetch_ahead import NeededFile

_MOST_BLOCKS = 16
"""The most blocks of a shard that stay open. To open one again takes less than to read a pack."""


def file_of(info: ShardInfo) -> NeededFile:
    """Return the file of a shard, in the folder of its build."""
    return NeededFile(f"{SHARD_FOLDER}/{info.name}", info.sha256, info.bytes)


class MappedShard:
    """A shard, with the columns of the blocks that were used last."""

    def __init__(self, file: ShardFile) -> None:
        self._file = file
        self._blocks: OrderedDict[int, Columns] = OrderedDict()  # by number, the last used last

    def find(self, pack: int) -> tuple[Columns, int]:
        """Return the columns of the block of a pack, and the row of the pack in them."""
        number, row = divmod(pack, self._file.packs_per_block)
        if number in self._blocks:
            self._blocks.move_to_end(number)
        else:
            self._blocks[number] = Columns(self._file.read_block(number))
            if len(self._blocks) > _MOST_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[number], row


class Columns:
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

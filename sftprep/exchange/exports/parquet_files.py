"""Parquet files of rows, written in row groups of bounded size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sftprep.core.ragged import to_offsets
from sftprep.exchange.exports.rows import Row
from sftprep.shards.schema import arrow_array

_GROUP_ROWS = 500
"""Rows of a row group, which readers load as a whole."""
_GROUP_TOKENS = 1 << 20
"""Tokens of a row group, so that packs of 100,000 tokens do not make huge ones."""
_FILE_TOKENS = 1 << 26
"""Tokens after which a new file is started: about 200 MB."""


class ParquetFiles:
    """A writer of the rows of one split to `FOLDER/00000.parquet` and so on.

    Memory holds one row group.

    Args:
        folder: The folder, which exists.
        columns: The type of the values of each column; each cell is a list of them.
        suffix: The end of the names of the files.
    """

    def __init__(
        self, folder: Path, columns: Mapping[str, pa.DataType], *, suffix: str = ".parquet"
    ) -> None:
        self._folder, self._suffix = folder, suffix
        self._schema = pa.schema([(name, pa.list_(kind)) for name, kind in columns.items()])
        self._rows: list[Row] = []  # of the row group that is not written yet
        self._group_tokens = 0
        self._writer: pq.ParquetWriter | None = None  # of the open file
        self._path = folder
        self._file_tokens = 0
        self._number = 0  # of files started

    def add(self, row: Row) -> None:
        """Add a row, and write the row group if it is full."""
        self._rows.append(row)
        self._group_tokens += len(row["input_ids"])
        if len(self._rows) == _GROUP_ROWS or self._group_tokens >= _GROUP_TOKENS:
            self._write_group()

    def close(self) -> None:
        """Write what is left, and end the last file. Without rows, there is one empty file."""
        if self._rows or not self._number:
            self._write_group()
        self._end_file()

    def abort(self) -> None:
        """Close the file that is being written, which is then incomplete."""
        if self._writer is not None:
            self._writer.close()

    def _write_group(self) -> None:
        if self._writer is None:
            self._path = self._folder / f"{self._number:05}{self._suffix}"
            self._writer = pq.ParquetWriter(self._path, self._schema, compression="zstd")
            self._number += 1
            self._file_tokens = 0
        if self._rows:
            self._writer.write_table(self._to_table(), row_group_size=_GROUP_ROWS)
        self._file_tokens += self._group_tokens
        self._rows, self._group_tokens = [], 0
        if self._file_tokens >= _FILE_TOKENS:
            self._end_file()

    def _to_table(self) -> pa.Table:
        columns = []
        for name, kind in zip(self._schema.names, self._schema.types, strict=True):
            cells = [row[name] for row in self._rows]
            offsets = to_offsets(np.array([len(cell) for cell in cells])).astype(np.int32)
            values = arrow_array(np.concatenate(cells))
            assert values.type == kind.value_type, (name, values.type)
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), values, type=kind))
        return pa.Table.from_arrays(columns, schema=self._schema)

    def _end_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())
        self._writer = None

"""Shards in the format of MosaicML Streaming (MDS, version 2), written without its library.

A shard is

    uint32             number of samples n
    uint32 [n + 1]     offset of each sample in the file, and the end of the last one
    JSON               the columns, the same as in `index.json`
    samples            uint32 size of each column, then the columns, in the order of their names

and a column is an array of one dimension: a byte that says how the length is stored, the length,
and the values. `index.json` lists the shards, and is written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.atomic_write import write_bytes
from sftprep.exchange.exports.rows import Row

_SHARD_BYTES = 1 << 26
"""The size at which a shard ends, as in the library."""


class MdsFiles:
    """A writer of the rows of one split to shards of about 64 MB, one of which is in memory.

    Args:
        folder: The folder, which exists.
        columns: The NumPy name of the type of each column.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str]) -> None:
        self._folder = folder
        self._names = sorted(columns)
        self._columns: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [],
            "size_limit": _SHARD_BYTES,
            "column_names": self._names,
            "column_encodings": [f"ndarray:{columns[name]}" for name in self._names],
            "column_sizes": [None] * len(self._names),
        }
        self._header = json.dumps(self._columns, sort_keys=True).encode()
        self._samples: list[bytes] = []  # of the shard that is not written yet
        self._bytes = 0
        self._shards: list[dict[str, Any]] = []  # the entries of the written ones in the index

    def add(self, row: Row) -> None:
        """Add a row, and write the shard before if the row does not fit."""
        cells = [_encode_array(row[name]) for name in self._names]
        sizes = np.array([len(cell) for cell in cells], np.uint32)
        sample = b"".join([sizes.tobytes(), *cells])
        if self._samples and self._bytes + len(sample) + 4 > _SHARD_BYTES:
            self._write_shard()
        self._samples.append(sample)
        self._bytes += len(sample) + 4

    def close(self) -> None:
        """Write what is left, and the index."""
        if self._samples:
            self._write_shard()
        index = {"version": 2, "shards": self._shards}
        write_bytes(self._folder / "index.json", json.dumps(index, sort_keys=True).encode())

    def abort(self) -> None:
        """Forget the rows that are not written."""
        self._samples = []

    def _write_shard(self) -> None:
        first = 4 + 4 * (len(self._samples) + 1) + len(self._header)
        offsets = first + np.cumsum([0, *map(len, self._samples)], dtype=np.uint64)
        name = f"shard.{len(self._shards):05}.mds"
        parts = [
            np.uint32(len(self._samples)).tobytes(),
            offsets.astype(np.uint32).tobytes(),
            self._header,
            *self._samples,
        ]
        with open(self._folder / name, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        self._shards.append(
            {
                **self._columns,
                "samples": len(self._samples),
                "raw_data": {"basename": name, "bytes": int(offsets[-1]), "hashes": {}},
                "zip_data": None,
            }
        )
        self._samples, self._bytes = [], 0


def _encode_array(values: NDArray[Any]) -> bytes:
    """Return an array of one dimension with at least one value, in the format."""
    # The length has 1, 2 or 4 bytes, the fewest that it needs; the first byte has the exponent.
    exponent = next(n for n in range(3) if len(values) < 1 << (8 << n))
    num_axes = 1
    head = bytes([num_axes << 2 | exponent]) + len(values).to_bytes(1 << exponent, "little")
    return head + values.tobytes()

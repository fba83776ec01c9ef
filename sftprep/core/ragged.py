"""Segments of one flat array, and their selection in another order by one call.

The selection is done by Arrow, which copies about 100 million segments a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value", bound=np.generic)


def to_offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the offsets of consecutive segments.

    Args:
        lengths: int64 [n], the length of each segment.

    Returns:
        int64 [n + 1]; segment k is from offset k to offset k + 1.

    Example:
        to_offsets([2, 0, 3])  ->  [0, 2, 2, 5]
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def replace_segments(
    values: NDArray[Any], offsets: NDArray[np.int64], new: Mapping[int, NDArray[Any]]
) -> NDArray[Any]:
    """Return consecutive segments with some of them replaced.

    Args:
        values: The segments, concatenated along the first axis.
        offsets: int64 [n + 1], the offsets of the segments in `values`.
        new: The replacements by the index of the segment; their lengths may differ.

    Example:
        values = [1, 2, 3, 4], offsets = [0, 2, 3, 4], new = {1: [7, 8]}  ->  [1, 2, 7, 8, 4]
    """
    parts: list[NDArray[Any]] = []
    copied = 0
    for number in sorted(new):
        parts += (values[copied : offsets[number]], new[number])
        copied = int(offsets[number + 1])
    return np.concatenate([*parts, values[copied:]])


@dataclass(frozen=True, slots=True)
class Ragged(Generic[Value]):
    """Segments of different lengths in one flat array.

    Attributes:
        values: The segments, concatenated.
        offsets: int64 [n + 1]; segment k is `values[offsets[k] : offsets[k + 1]]`.
    """

    values: NDArray[Value]
    offsets: NDArray[np.int64]

    def take(self, indices: NDArray[np.int64]) -> Ragged[Value]:
        """Return the segments with the given indices, in their order.

        Args:
            indices: int64 [m]; an index may occur several times.

        Example:
            segments [[1, 2], [3], []], indices = [1, 0, 1]  ->  [[3], [1, 2], [3]]
        """
        # Imported here, since reading a tokenizer does not need Arrow. Not pyarrow.compute: its
        # import wraps 280 functions, which takes as long as this step of a small build.
        import pyarrow as pa
        from pyarrow._compute import TakeOptions, call_function

        # The segments as an Arrow array of byte strings, without a copy.
        width = self.values.itemsize
        buffers = [
            None,
            pa.py_buffer(self.offsets * width),
            pa.py_buffer(np.ascontiguousarray(self.values)),
        ]
        segments = pa.Array.from_buffers(pa.large_binary(), len(self.offsets) - 1, buffers)
        indices = pa.Array.from_buffers(
            pa.int64(), len(indices), [None, pa.py_buffer(np.ascontiguousarray(indices))]
        )
        _, byte_offsets, values = call_function(
            "take", [segments, indices], TakeOptions(boundscheck=False)
        ).buffers()
        # The buffers of the result may be longer than their content.
        offsets = np.frombuffer(byte_offsets, np.int64)[: len(indices) + 1] // width
        return Ragged(np.frombuffer(values or b"", self.values.dtype)[: offsets[-1]], offsets)

"""Pieces of one flat array, taken in another order by one call, however many they are (Arrow copies
100 million a second)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value", bound=np.generic)


def edges(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where pieces of these lengths begin and end, one after the other: int64 [n + 1]."""
    found = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=found[1:])
    return found


def replace_segments(
    values: NDArray[Any], offsets: NDArray[np.int64], new: Mapping[int, NDArray[Any]]
) -> NDArray[Any]:
    """Segments side by side, some of them replaced.

    Args:
        values: the segments, along the first axis.
        offsets: int64 [n + 1], where each begins and the last one ends.
        new: other segments for some numbers, of any length.
    """
    parts: list[NDArray[Any]] = []
    done = 0
    for number in sorted(new):
        parts += (values[done : offsets[number]], new[number])
        done = int(offsets[number + 1])
    return np.concatenate([*parts, values[done:]])


@dataclass(frozen=True, slots=True)
class Ragged(Generic[Value]):
    """Pieces side by side: piece k is values[edges[k]:edges[k + 1]]; edges: int64 [n + 1]."""

    values: NDArray[Value]
    edges: NDArray[np.int64]

    def taken(self, which: NDArray[np.int64]) -> Ragged[Value]:
        """The pieces of these numbers, in this order."""
        # Whoever only reads a tokenizer needs no Arrow; and pyarrow.compute makes a function of
        # each of its 280 when it is imported, which takes as long as gathering the pieces of a
        # small build.
        import pyarrow as pa
        from pyarrow._compute import TakeOptions, call_function

        width = self.values.itemsize
        buffers = [
            None,
            pa.py_buffer(self.edges * width),
            pa.py_buffer(np.ascontiguousarray(self.values)),
        ]
        pieces = pa.Array.from_buffers(pa.large_binary(), len(self.edges) - 1, buffers)
        numbers = pa.Array.from_buffers(
            pa.int64(), len(which), [None, pa.py_buffer(np.ascontiguousarray(which))]
        )
        _, places, values = call_function(
            "take", [pieces, numbers], TakeOptions(boundscheck=False)
        ).buffers()
        made = np.frombuffer(places, np.int64)[: len(which) + 1] // width
        return Ragged(np.frombuffer(values or b"", self.values.dtype)[: made[-1]], made)

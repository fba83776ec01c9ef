"""Sizes of the rows of Arrow arrays when they are text, without making the text.

A few bytes can stand for a lot of text: rows may refer to the same value of a dictionary or the
same bytes of a buffer, and some types need no bytes at all. Whoever makes text of rows takes as
many at a time as these sizes allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_LARGEST = 2.0**40
"""Larger sizes are all the same; sums of smaller ones are exact enough."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the values of an array: `constant` for each, and `variable`, float64 [n], if any.

    An array of values of one size may be longer than what memory could hold sizes for.
    """

    constant: float
    variable: Floats | None = None

    def __add__(self, other: Sizes) -> Sizes:
        if self.variable is None or other.variable is None:
            variable = self.variable if other.variable is None else other.variable
        else:
            variable = np.minimum(self.variable + other.variable, _LARGEST)
        return Sizes(self.constant + other.constant, variable)

    def take(self, indices: NDArray[np.int64]) -> Sizes:
        """Return the sizes of some of the values."""
        if self.variable is None or len(self.variable) == 0:
            return Sizes(self.constant)
        return Sizes(self.constant, self.variable[indices])

    def between(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> Sizes:
        """Return the sizes of runs of the values."""
        sizes = (ends - begins) * self.constant
        if self.variable is not None:
            sums = np.concatenate((np.zeros(1), np.cumsum(self.variable)))
            sizes = sizes + sums[ends] - sums[begins]
        return Sizes(0.0, np.minimum(sizes, _LARGEST))


def row_sizes(columns: dict[str, Any], rows: int, scalar: float) -> Floats:
    """Return about how many bytes each row has as a line of JSON: float64 [rows].

    Args:
        columns: name -> array.
        scalar: bytes of a value that is not text, and of what surrounds each value. With 2, no
            row is shorter than its size.
    """
    total = Sizes(2.0)
    for name, array in columns.items():
        total += sizes_of(array, scalar) + Sizes(len(name) + 2.0)
    variable = np.zeros(rows) if total.variable is None else total.variable
    return variable + total.constant


def runs_of_rows(sizes: Floats, limit: float) -> Iterator[tuple[int, int]]:
    """Yield runs of rows of at most `limit` bytes together, or of one row."""
    sums = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = sums[start - 1] if start else 0.0
        end = max(start + 1, int(np.searchsorted(sums, before + limit, side="right")))
        yield start, end
        start = end


def sizes_of(array: Any, scalar: float) -> Sizes:
    """Return the sizes of the values of an array; see `row_sizes`."""
    import pyarrow as pa

    if isinstance(array, pa.ExtensionArray):
        return sizes_of(array.storage, scalar)
    measure = next((m for test, m in _MEASURES if getattr(pa.types, test)(array.type)), None)
    return Sizes(scalar) if measure is None else measure(array, scalar)


def _of_text(array: Any, scalar: float) -> Sizes:
    import pyarrow as pa

    width = np.int64 if pa.types.is_large_string(array.type) else np.int32
    offsets = np.frombuffer(array.buffers()[1] or b"", width)
    lengths = np.diff(offsets[array.offset : array.offset + len(array) + 1]).astype(np.float64)
    if array.null_count:
        lengths[~_valid(array)] = 0
    return Sizes(scalar, lengths)


def _of_views(array: Any, scalar: float) -> Sizes:
    # A view is 16 bytes, and begins with the length of its value.
    views = np.frombuffer(array.buffers()[1] or b"", np.int32).reshape(-1, 4)
    lengths = views[array.offset : array.offset + len(array), 0].astype(np.float64)
    if array.null_count:
        lengths[~_valid(array)] = 0
    return Sizes(scalar, lengths)


def _of_dictionary(array: Any, scalar: float) -> Sizes:
    indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    sizes = sizes_of(array.dictionary, scalar).take(indices)
    if array.indices.null_count and sizes.variable is not None:
        sizes.variable[~_valid(array.indices)] = 0
    return sizes


def _of_struct(array: Any, scalar: float) -> Sizes:
    fields = Sizes(0.0)
    for k in range(array.type.num_fields):
        name = array.type.field(k).name
        fields += sizes_of(array.field(k), scalar) + Sizes(len(name) + 2.0)
    if array.null_count == 0:
        return fields + Sizes(scalar)
    # Null has no names, but what its fields have is converted nevertheless.
    names = Sizes(0.0, np.where(_valid(array), fields.constant, 0.0))
    return names + Sizes(scalar, fields.variable)


def _of_list(array: Any, scalar: float) -> Sizes:
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    begins = offsets - offsets[0]
    return sizes_of(values, scalar).between(begins[:-1], begins[1:]) + Sizes(scalar)


def _of_map(array: Any, scalar: float) -> Sizes:
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    first, count = offsets[0], offsets[-1] - offsets[0]
    entries = sizes_of(array.keys.slice(first, count), 0) + sizes_of(
        array.items.slice(first, count), scalar
    )
    return entries.between(offsets[:-1] - first, offsets[1:] - first) + Sizes(scalar)


def _of_list_view(array: Any, scalar: float) -> Sizes:
    begins = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    lengths = array.sizes.to_numpy(zero_copy_only=False).astype(np.int64)
    lengths[~_valid(array)] = 0
    begins[lengths == 0] = 0
    return sizes_of(array.values, scalar).between(begins, begins + lengths) + Sizes(scalar)


def _of_fixed_size_list(array: Any, scalar: float) -> Sizes:
    width = array.type.list_size
    begins = np.arange(len(array), dtype=np.int64) * width
    values = array.values.slice(array.offset * width, len(array) * width)
    return sizes_of(values, scalar).between(begins, begins + width) + Sizes(scalar)


def _of_run_ends(array: Any, scalar: float) -> Sizes:
    ends = array.run_ends.to_numpy(zero_copy_only=False)
    rows = np.arange(array.offset, array.offset + len(array))
    return sizes_of(array.values, scalar).take(np.searchsorted(ends, rows, side="right"))


def _of_union(array: Any, scalar: float) -> Sizes:
    kinds = array.type_codes.to_numpy(zero_copy_only=False)
    is_dense = array.type.mode == "dense"
    rows = (
        array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        if is_dense
        else np.arange(len(array))
    )
    total = np.zeros(len(array))
    for k, code in enumerate(array.type.type_codes):
        chosen = kinds == code
        sizes = sizes_of(array.field(k), scalar).take(rows[chosen])
        total[chosen] = sizes.constant + (0 if sizes.variable is None else sizes.variable)
    return Sizes(0.0, total)


def _valid(array: Any) -> NDArray[np.bool_]:
    valid: NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
    return valid


_MEASURES: tuple[tuple[str, Callable[[Any, float], Sizes]], ...] = (
    ("is_string", _of_text),
    ("is_large_string", _of_text),
    ("is_string_view", _of_views),
    ("is_dictionary", _of_dictionary),
    ("is_struct", _of_struct),
    ("is_list", _of_list),
    ("is_large_list", _of_list),
    ("is_map", _of_map),
    ("is_list_view", _of_list_view),
    ("is_large_list_view", _of_list_view),
    ("is_fixed_size_list", _of_fixed_size_list),
    ("is_run_end_encoded", _of_run_ends),
    ("is_union", _of_union),
)


def shares_values(kind: Any) -> bool:
    """Return whether several values of a type may be the same bytes."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return shares_values(kind.storage_type)
    types = pa.types
    if (
        types.is_string_view(kind)
        or types.is_dictionary(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
        or types.is_run_end_encoded(kind)
        or types.is_union(kind)
    ):
        return True
    return any(shares_values(kind.field(k).type) for k in range(kind.num_fields))

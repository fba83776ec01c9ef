"""Sizes of the rows of Arrow arrays as text, estimated without making the text.

A few bytes can represent a lot of text: rows may refer to the same value of a dictionary or to the
same bytes of a buffer, and values of some types need no bytes at all. `table_lines` therefore
limits the rows that it converts together by these sizes.

1. The size of a value is a constant for its type, plus the length of its text if it has one.
2. Sizes of nested values are summed by the offsets of lists, or gathered by the indices of
   dictionaries, with array operations only.
3. The size of a row is the sum over its columns, with their names.

The cost is proportional to the number of values, not to their text. The tests compare the sizes
with the length of the lines, from both sides (`tests/sources/test_expanding_tables.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_LARGEST = 2.0**40
"""Larger sizes are treated as equal, so that sums of sizes stay precise."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the values of an array, in bytes.

    An array whose values have one size may have billions of values, for which an array of sizes
    would not fit into memory; hence the constant.

    Attributes:
        constant: The part of the size that all values have.
        variable: float64 [n]; the rest of the size of each value; None for 0.
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
        """Return the sizes of the values at `indices`, int64 [m]."""
        if self.variable is None or len(self.variable) == 0:
            return Sizes(self.constant)
        return Sizes(self.constant, self.variable[indices])

    def between(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> Sizes:
        """Return the sizes of runs of values: run k has the values [begins[k], ends[k])."""
        sizes = (ends - begins) * self.constant
        if self.variable is not None:
            sums = np.concatenate((np.zeros(1), np.cumsum(self.variable)))
            sizes = sizes + sums[ends] - sums[begins]
        return Sizes(0.0, np.minimum(sizes, _LARGEST))


def row_sizes(columns: dict[str, Any], rows: int, scalar: float) -> Floats:
    """Return the approximate bytes of each row as JSON: float64 [rows].

    Args:
        columns: Name -> array.
        rows: The number of rows.
        scalar: The bytes of a value that is not text, and of the characters around each value.
            With 2, no row is shorter than its size.
    """
    total = Sizes(2.0)
    for name, array in columns.items():
        total += sizes_of(array, scalar) + Sizes(len(name) + 2.0)
    variable = np.zeros(rows) if total.variable is None else total.variable
    return variable + total.constant


def runs_of_rows(sizes: Floats, limit: float) -> Iterator[tuple[int, int]]:
    """Yield runs of rows, (begin, end), of at most `limit` bytes or of a single row.

    Example:
        sizes = [3, 4, 9, 1], limit = 8  ->  (0, 2), (2, 3), (3, 4)
    """
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
    # Values of all other types have the size `scalar`.
    measure = next((m for test, m in _MEASURES if getattr(pa.types, test)(array.type)), None)
    return Sizes(scalar) if measure is None else measure(array, scalar)


def _measure_strings(array: Any, scalar: float) -> Sizes:
    import pyarrow as pa

    width = np.int64 if pa.types.is_large_string(array.type) else np.int32
    # The offsets are read from the buffer without a copy.
    offsets = np.frombuffer(array.buffers()[1] or b"", width)
    lengths = np.diff(offsets[array.offset : array.offset + len(array) + 1]).astype(np.float64)
    if array.null_count:
        lengths[~_to_valid_mask(array)] = 0
    return Sizes(scalar, lengths)


def _measure_string_views(array: Any, scalar: float) -> Sizes:
    # A view has 16 bytes and starts with the length of its value.
    views = np.frombuffer(array.buffers()[1] or b"", np.int32).reshape(-1, 4)
    lengths = views[array.offset : array.offset + len(array), 0].astype(np.float64)
    if array.null_count:
        lengths[~_to_valid_mask(array)] = 0
    return Sizes(scalar, lengths)


def _measure_dictionary(array: Any, scalar: float) -> Sizes:
    indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    sizes = sizes_of(array.dictionary, scalar).take(indices)
    if array.indices.null_count and sizes.variable is not None:
        sizes.variable[~_to_valid_mask(array.indices)] = 0
    return sizes


def _measure_struct(array: Any, scalar: float) -> Sizes:
    fields = Sizes(0.0)
    for k in range(array.type.num_fields):
        name = array.type.field(k).name
        fields += sizes_of(array.field(k), scalar) + Sizes(len(name) + 2.0)
    if array.null_count == 0:
        return fields + Sizes(scalar)
    # A null has no names, but the values of its fields are converted nevertheless.
    names = Sizes(0.0, np.where(_to_valid_mask(array), fields.constant, 0.0))
    return names + Sizes(scalar, fields.variable)


def _measure_list(array: Any, scalar: float) -> Sizes:
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    begins = offsets - offsets[0]
    return sizes_of(values, scalar).between(begins[:-1], begins[1:]) + Sizes(scalar)


def _measure_map(array: Any, scalar: float) -> Sizes:
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    first, count = offsets[0], offsets[-1] - offsets[0]
    entries = sizes_of(array.keys.slice(first, count), 0) + sizes_of(
        array.items.slice(first, count), scalar
    )
    return entries.between(offsets[:-1] - first, offsets[1:] - first) + Sizes(scalar)


def _measure_list_view(array: Any, scalar: float) -> Sizes:
    begins = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    lengths = array.sizes.to_numpy(zero_copy_only=False).astype(np.int64)
    lengths[~_to_valid_mask(array)] = 0
    begins[lengths == 0] = 0  # the offset of an empty list may be arbitrary
    return sizes_of(array.values, scalar).between(begins, begins + lengths) + Sizes(scalar)


def _measure_fixed_size_list(array: Any, scalar: float) -> Sizes:
    width = array.type.list_size
    begins = np.arange(len(array), dtype=np.int64) * width
    values = array.values.slice(array.offset * width, len(array) * width)
    return sizes_of(values, scalar).between(begins, begins + width) + Sizes(scalar)


def _measure_run_end_encoded(array: Any, scalar: float) -> Sizes:
    ends = array.run_ends.to_numpy(zero_copy_only=False)
    rows = np.arange(array.offset, array.offset + len(array))
    return sizes_of(array.values, scalar).take(np.searchsorted(ends, rows, side="right"))


def _measure_union(array: Any, scalar: float) -> Sizes:
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


def _to_valid_mask(array: Any) -> NDArray[np.bool_]:
    valid: NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
    return valid


# A predicate of `pyarrow.types`, and the function that measures arrays of the types that fulfil it.
_MEASURES: tuple[tuple[str, Callable[[Any, float], Sizes]], ...] = (
    ("is_string", _measure_strings),
    ("is_large_string", _measure_strings),
    ("is_string_view", _measure_string_views),
    ("is_dictionary", _measure_dictionary),
    ("is_struct", _measure_struct),
    ("is_list", _measure_list),
    ("is_large_list", _measure_list),
    ("is_map", _measure_map),
    ("is_list_view", _measure_list_view),
    ("is_large_list_view", _measure_list_view),
    ("is_fixed_size_list", _measure_fixed_size_list),
    ("is_run_end_encoded", _measure_run_end_encoded),
    ("is_union", _measure_union),
)


def shares_values(kind: Any) -> bool:
    """Return whether several values of a type may share the same bytes."""
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

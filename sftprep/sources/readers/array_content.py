"""Whether an Arrow array has content, found without making Python objects of its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sftprep.sources.readers.row_sizes import sizes_of


def has_content(array: Any) -> bool:
    """Return whether an array has a value besides null, NaN, "", and empty lists and objects.

    The values of a dictionary count even if no row refers to them.
    """
    import pyarrow as pa

    if len(array) == array.null_count:
        return False
    if isinstance(array, pa.ExtensionArray):
        return has_content(array.storage)
    # A value of any other type, such as a number that is not null, is content.
    find = next((f for test, f in _BY_TYPE if getattr(pa.types, test)(array.type)), None)
    return find is None or find(array)


def _has_text(array: Any) -> bool:
    lengths = sizes_of(array, 0.0).variable
    return lengths is not None and bool(lengths.any())


def _has_bytes(array: Any) -> bool:
    import pyarrow.compute as pc

    return bool(pc.max(pc.binary_length(array)).as_py())


def _has_finite(array: Any) -> bool:
    import pyarrow.compute as pc

    return bool(pc.any(pc.is_finite(array)).as_py())


def _has_content_in_lists(array: Any) -> bool:
    return has_content(array.flatten())


_BY_TYPE: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("is_string", _has_text),
    ("is_large_string", _has_text),
    ("is_string_view", _has_text),
    ("is_binary", _has_bytes),
    ("is_large_binary", _has_bytes),
    ("is_floating", _has_finite),
    ("is_dictionary", lambda array: has_content(array.dictionary)),
    ("is_map", lambda array: has_content(array.items)),
    ("is_struct", lambda array: any(map(has_content, array.flatten()))),
    ("is_list", _has_content_in_lists),
    ("is_large_list", _has_content_in_lists),
    ("is_fixed_size_list", _has_content_in_lists),
    ("is_list_view", _has_content_in_lists),
    ("is_large_list_view", _has_content_in_lists),
)
"""A predicate of `pyarrow.types`, and the search for the types that fulfil it."""

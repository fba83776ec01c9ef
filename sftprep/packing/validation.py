"""Checks of the arguments of plans."""

from __future__ import annotations

import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sftprep.errors import ConfigError

LIMIT = 2**31
"""Lengths, capacities and numbers of named sequences are below this."""


def to_integer_array(values: ArrayLike, name: str, remedy: str) -> NDArray[np.integer]:
    """Return a one-dimensional array of any integer dtype.

    Args:
        values: The argument; an empty one may have any dtype.
        name: What the message calls it, in the plural.
        remedy: The remedy of the error.

    Raises:
        ConfigError: It is not one-dimensional, or not of integers.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ConfigError(
            f"{name} are not a one-dimensional array: {error}", remedy=remedy
        ) from error
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ConfigError(
            f"{name} are an array of {array.ndim} dimensions and dtype {array.dtype}",
            remedy=remedy,
        )
    return array


def to_integers(values: ArrayLike, name: str, remedy: str) -> NDArray[np.int64]:
    """Return a copy as int64, C-contiguous; see `to_integer_array`."""
    array = to_integer_array(values, name, remedy)
    if array.dtype.kind == "u" and array.size and array.max() >= 2**63:
        raise ConfigError(f"{name} contain {array.max()}, above 64 bits", remedy=remedy)
    return np.array(array, np.int64, order="C")


def to_checked_lengths(lengths: ArrayLike) -> NDArray[np.int32]:
    """Return lengths as int32, C-contiguous; raise ConfigError if they are invalid."""
    array = to_integer_array(lengths, "lengths", "pass one integer per sequence")
    if array.size >= LIMIT:
        raise ConfigError(
            f"{array.size} sequences are too many for one plan",
            remedy=f"plan fewer than {LIMIT} at a time, or plan by counts",
        )
    if array.size and array.min() < 0:
        index = int(np.argmax(array < 0))
        raise ConfigError(
            f"the length of sequence {index} is {array[index]}", remedy="pass lengths of 0 or more"
        )
    if array.size and array.max() >= LIMIT:
        index = int(np.argmax(array >= LIMIT))
        raise ConfigError(
            f"sequence {index} has {array[index]} tokens: no pack can hold it, lengths are 32-bit",
            remedy="truncate or split it before packing",
        )
    return np.ascontiguousarray(array, dtype=np.int32)


def to_checked_capacity(capacity: int) -> int:
    """Return the capacity as an integer; raise ConfigError if it is invalid."""
    try:
        checked = operator.index(capacity)
    except TypeError as error:
        raise ConfigError(
            f"capacity is {capacity!r}", remedy="pass a whole number of tokens"
        ) from error
    if not 1 <= checked < LIMIT:
        raise ConfigError(
            f"capacity is {checked}: a pack holds 1 to {LIMIT - 1} tokens",
            remedy="pass a capacity in that range",
        )
    return checked

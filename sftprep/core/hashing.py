"""Digests, and pseudo-random numbers, equal on all machines and versions.

`hash64` and `hash64_array` use the mixing function of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from hashlib import file_digest, sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.regular_files import open_regular_file

# The increment (2**64 divided by the golden ratio) and the two multipliers of SplitMix64.
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIER_1, _MULTIPLIER_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def digest(*parts: object) -> str:
    """Return the SHA-256, in hex, of JSON-compatible values."""
    # surrogatepass: names of files that are not UTF-8 contain lone surrogates.
    return sha256(
        json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str).encode(
            "utf-8", "surrogatepass"
        )
    ).hexdigest()


def digest_of_file(path: str | os.PathLike[str], kind: Callable[[], Any] = sha256) -> str:
    """Return the digest of a regular file, in hex.

    Args:
        path: The file.
        kind: The hash function: `sha256`, or one of xxhash.

    Raises:
        NotRegularError: The path is not a regular file or a link to one.
        OSError: The file cannot be read.
    """
    with open_regular_file(path) as file:
        return file_digest(file, kind).hexdigest()


def hash64(*parts: int) -> int:
    """Return a 64-bit hash of non-negative integers and their order."""
    mask, value = (1 << 64) - 1, 0
    for part in parts:
        value = (value ^ part) + _INCREMENT & mask
        value = (value ^ (value >> 30)) * _MULTIPLIER_1 & mask
        value = (value ^ (value >> 27)) * _MULTIPLIER_2 & mask
        value ^= value >> 31
    return value


def hash64_array(numbers: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each number.

    Args:
        numbers: int64 [n], not negative.
        seed: Any integer; another seed gives independent hashes.

    Returns:
        uint64 [n].
    """
    with np.errstate(over="ignore"):  # products modulo 2**64 are intended
        z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(_INCREMENT)
        z = z + np.uint64(seed % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
        hashes: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return hashes


def seeded_permutation(count: int, seed: int) -> NDArray[np.int64]:
    """Return a permutation of 0 .. count - 1, determined by the seed: int64 [count]."""
    return np.argsort(hash64_array(np.arange(count), seed), kind="stable")

"""Digests of values, and numbers without pattern (SplitMix64, Steele et al. 2014): the same on
every machine, for good."""

from __future__ import annotations

import json
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray


def digest(*parts: object) -> str:
    """SHA-256, in hex, of JSON-able values: the same on every machine and in every version of
    Python."""
    return sha256(
        json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str).encode(
            "utf-8", "surrogatepass"
        )
    ).hexdigest()


def hash64(*parts: int) -> int:
    """A number of 64 bits that depends on non-negative ones and their order."""
    mask, value = (1 << 64) - 1, 0
    for part in parts:
        value = (value ^ part) + 0x9E3779B97F4A7C15 & mask
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
        value ^= value >> 31
    return value


def hash64_array(numbers: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A hash of each non-negative number: uint64 [n]."""
    with np.errstate(over="ignore"):
        z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
            seed % 2**64
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashes: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return hashes


def seeded_permutation(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of 0 .. count - 1 that depends on the seed only: int64 [count]."""
    return np.argsort(hash64_array(np.arange(count), seed), kind="stable")

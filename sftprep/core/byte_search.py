"""Search for any of several short, mostly absent words in a block of bytes.

1. A few words: their first two bytes are compared as one 16-bit number with the whole block, which
   is ten times as fast as `bytes.find`. Words whose first two bytes are absent are dropped.
2. The other words are grouped by their first byte. The positions of a byte are found once and kept,
   since the same block is searched for several lists of words.
3. The positions are narrowed byte by byte, for all words with the same prefix together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, product

import numpy as np
from numpy.typing import NDArray

_FEW_PAIRS = 4
"""The maximum number of byte pairs that step 1 looks for; each costs a pass over the block."""
_STEP = 1 << 17
"""Numbers that are compared at once; the result fits into the cache of a processor."""


class ByteSearcher:
    """A block of bytes to be searched for words.

    Example:
        ByteSearcher(b'{"text": "so it goes"}').contains_any([b"it", b"xyz"])  ->  True
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._bytes = np.frombuffer(data, np.uint8)
        self._positions: dict[int, NDArray[np.int64]] = {}  # by byte, filled on demand

    def contains_any(self, words: Iterable[bytes]) -> bool:
        """Return whether the block contains one of the words; no word may be empty."""
        words = [*words]
        pairs = {word[:2] for word in words if len(word) > 1}
        if len(pairs) <= _FEW_PAIRS:
            absent = pairs - self._find_pairs(pairs)
            words = [word for word in words if word[:2] not in absent]
        for first, group in groupby(sorted(words), key=lambda word: word[0]):
            if _has_any(self._bytes, self._positions_of(first), list(group), 1):
                return True
        return False

    def may_contain(self, words: Iterable[str]) -> bool:
        r"""Return whether strings in these lines of JSON may contain one of the words.

        False is certain, and the usual answer; True may be wrong.

        JSON may escape any character (`<` as `\u003c`), so a word is also possible where one of its
        first two characters occurs as an escape, or where its first two bytes occur and later ones
        may be escaped.
        """
        words = [word for word in words if word]
        first_escapes = {
            escape for word in words for character in word[:2] for escape in _escapes_of(character)
        }
        if self.contains_any(first_escapes):
            return True
        unescaped = [word.encode("utf-8", "surrogatepass") for word in words]
        prefixes = {word[:2].encode("utf-8", "surrogatepass") for word in words}
        short_escapes = {
            _SHORT_ESCAPES[character]
            for word in words
            for character in word
            if character in _SHORT_ESCAPES
        }
        return self.contains_any(prefixes) and self.contains_any(
            {*unescaped, *short_escapes, rb"\u"}
        )

    def may_contain_parts(self, words: Iterable[str]) -> bool:
        r"""Return whether strings in these lines of JSON may end with the start of a word.

        With the next string, such a string may contain the word. Where `may_contain` is False, no
        character is an escape. The strings may be in JSON text, where they end with `\"`.
        """
        starts = {
            word[:end].encode("utf-8", "surrogatepass")
            for word in words
            for end in range(1, len(word))
        }
        return self.contains_any({start + end for start in starts for end in (b'"', b'\\"')})

    def _find_pairs(self, pairs: Iterable[bytes]) -> set[bytes]:
        """Return the byte pairs present in the block."""
        missing = {int.from_bytes(pair, "little"): pair for pair in pairs}
        found: set[bytes] = set()
        # The 16-bit numbers at even positions, then those at odd positions.
        for first in range(min(2, len(self.data))):
            numbers = np.frombuffer(self.data, "<u2", (len(self.data) - first) // 2, first)
            for start in range(0, len(numbers), _STEP):
                step = numbers[start : start + _STEP]
                present = [number for number in missing if (step == number).any()]
                found.update(missing.pop(number) for number in present)
        return found

    def _positions_of(self, byte: int) -> NDArray[np.int64]:
        if byte not in self._positions:
            self._positions[byte] = np.flatnonzero(self._bytes == byte)
        return self._positions[byte]


def _has_any(
    data: NDArray[np.uint8], positions: NDArray[np.int64], words: Sequence[bytes], matched: int
) -> bool:
    """Return whether one of the words occurs at one of the positions.

    Args:
        data: The bytes of the block.
        positions: int64 [n], where the common prefix of the words occurs.
        words: Sorted, with the same first `matched` bytes.
        matched: The length of the common prefix.
    """
    if not len(positions):
        return False
    if len(words[0]) == matched:  # sorted, so the shortest of the words is the first
        return True
    positions = positions[: np.searchsorted(positions, len(data) - matched)]
    next_bytes = data[positions + matched]
    return any(
        _has_any(data, positions[next_bytes == byte], list(group), matched + 1)
        for byte, group in groupby(words, key=lambda word: word[matched])
    )


_SHORT_ESCAPES = {
    "/": rb"\/",
    '"': rb"\"",
    "\\": rb"\\",
    "\b": rb"\b",
    "\f": rb"\f",
    "\n": rb"\n",
    "\r": rb"\r",
    "\t": rb"\t",
}


def _escapes_of(character: str) -> list[bytes]:
    """Return the JSON escapes of a character, or of its first surrogate above U+FFFF."""
    unit = character.encode("utf-16-be", "surrogatepass").hex()[:4]
    spellings = {"".join(digits) for digits in product(*({digit, digit.upper()} for digit in unit))}
    numeric = [rf"\u{digits}".encode() for digits in spellings]
    return [_SHORT_ESCAPES[character], *numeric] if character in _SHORT_ESCAPES else numeric

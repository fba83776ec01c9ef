"""Search for any of several short, mostly absent words in a block of bytes.

1. The words are grouped by their first byte. The positions of a byte are found once and kept, since
   the same block is searched for several lists of words.
2. The positions are narrowed byte by byte, for all words with the same prefix together.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import groupby, product

import numpy as np
from numpy.typing import NDArray


def has_any_byte(text: str, values: bytes) -> bool:
    """Return whether a text has one of some byte values in UTF-8."""
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded.translate(None, values)) < len(encoded)


class ByteSearcher:
    """A block of bytes to be searched for words.

    Its lines are numbered from 0.

    Example:
        ByteSearcher(b'{"text": "so it goes"}').contains_any([b"it", b"xyz"])  ->  True
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._bytes = np.frombuffer(data, np.uint8)
        self._positions: dict[int, NDArray[np.int64]] = {}  # by byte, filled on demand

    def contains_any(self, words: Iterable[bytes]) -> bool:
        """Return whether the block contains one of the words; no word may be empty."""
        for first, group in groupby(sorted(words), key=lambda word: word[0]):
            if _has_any(self._bytes, self._positions_of(first), list(group), 1):
                return True
        return False

    def find_lines(self, words: Sequence[str]) -> Container[int]:
        r"""Return the numbers of the lines of JSON whose strings may contain one of the words.

        The other lines certainly contain none, which usually holds for all of them.

        JSON may escape any character (`<` as `\u003c`), so a word is also possible where one of its
        first two characters occurs as an escape, or where its first two bytes occur and later ones
        may be escaped. A string that ends with the start of a word may contain the word together
        with the next string; such strings may be in JSON text, where they end with `\"`.
        """
        words = [word for word in words if word]
        first_escapes = {
            escape for word in words for character in word[:2] for escape in _escapes_of(character)
        }
        prefixes = {word[:2].encode("utf-8", "surrogatepass") for word in words}
        short_escapes = {
            _SHORT_ESCAPES[character]
            for word in words
            for character in word
            if character in _SHORT_ESCAPES
        }
        whole = {word.encode("utf-8", "surrogatepass") for word in words}
        rest = {*whole, *short_escapes, rb"\u"}
        starts = {
            word[:end].encode("utf-8", "surrogatepass")
            for word in words
            for end in range(1, len(word))
        }
        cut_off = {start + end for start in starts for end in (b'"', b'\\"')}
        found: set[int] = set()
        if self.contains_any(first_escapes):
            found |= self._find_lines_with(first_escapes)
        if self.contains_any(prefixes) and self.contains_any(rest):
            found |= self._find_lines_with(prefixes) & self._find_lines_with(rest)
        if self.contains_any(cut_off):
            found |= self._find_lines_with(cut_off)
        return found

    def _find_lines_with(self, words: Iterable[bytes]) -> set[int]:
        """Return the numbers of the lines that contain one of the words, from 0."""
        breaks = self._positions_of(ord("\n"))
        lines: set[int] = set()
        for first, group in groupby(sorted(words), key=lambda word: word[0]):
            for positions in _find_all(self._bytes, self._positions_of(first), list(group), 1):
                lines.update(np.searchsorted(breaks, positions).tolist())
        return lines

    def _positions_of(self, byte: int) -> NDArray[np.int64]:
        if byte not in self._positions:
            self._positions[byte] = np.flatnonzero(self._bytes == byte)
        return self._positions[byte]


def _has_any(
    data: NDArray[np.uint8], positions: NDArray[np.int64], words: Sequence[bytes], matched: int
) -> bool:
    """Return whether one of the words occurs at one of the positions; see `_find_all`."""
    return next(_find_all(data, positions, words, matched), None) is not None


def _find_all(
    data: NDArray[np.uint8], positions: NDArray[np.int64], words: Sequence[bytes], matched: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the positions at which one of the words occurs, in arrays that are not empty.

    Args:
        data: The bytes of the block.
        positions: int64 [n], where the common prefix of the words occurs.
        words: Sorted, with the same first `matched` bytes.
        matched: The length of the common prefix.
    """
    if not len(positions):
        return
    if len(words[0]) == matched:  # sorted, so the shortest of the words is the first
        yield positions  # the longer words are at some of these positions
        return
    positions = positions[: np.searchsorted(positions, len(data) - matched)]
    next_bytes = data[positions + matched]
    for byte, group in groupby(words, key=lambda word: word[matched]):
        yield from _find_all(data, positions[next_bytes == byte], list(group), matched + 1)


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

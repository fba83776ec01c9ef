"""Whether any of some short texts stands in a long one, which it mostly does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, product

import numpy as np
from numpy.typing import NDArray

_FEW_PAIRS = 4
_STEP = 1 << 17
"""Numbers in one step of a comparison, whose result fits into a processor's cache."""


class Letters:
    """Bytes in which words are looked for.

    Most words are absent, and so are their first two letters, which are compared as one number: ten
    times as fast as looking for the word. Otherwise a word is looked for where its first letter is;
    the places of a letter are found once.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._letters = np.frombuffer(data, np.uint8)
        self._places: dict[int, NDArray[np.int64]] = {}

    def hold_any(self, words: Iterable[bytes]) -> bool:
        """Whether one of the words, none of them empty, is there."""
        words = [*words]
        pairs = {word[:2] for word in words if len(word) > 1}
        if len(pairs) <= _FEW_PAIRS:
            absent = pairs - self._pairs(pairs)
            words = [word for word in words if word[:2] not in absent]
        for first, group in groupby(sorted(words), key=lambda word: word[0]):
            if _go_on(self._letters, self.places(first), list(group), 1):
                return True
        return False

    def may_hold(self, words: Iterable[str]) -> bool:
        """Whether texts in these lines of JSON may hold one of the words; False is sure, and the
        usual answer.

        JSON may write letters as escapes. Those of the first two letters are looked for; the rest
        counts where a word has begun.
        """
        wanted = [word for word in words if word]
        if self.hold_any(
            {sign for word in wanted for letter in word[:2] for sign in _escapes(letter)}
        ):
            return True
        written = [word.encode("utf-8", "surrogatepass") for word in wanted]
        begun = {word[:2].encode("utf-8", "surrogatepass") for word in wanted}
        within = {_SHORT[letter] for word in wanted for letter in word if letter in _SHORT}
        return self.hold_any(begun) and self.hold_any({*written, *within, rb"\u"})

    def _pairs(self, wanted: Iterable[bytes]) -> set[bytes]:
        """Which of these pairs of letters are there."""
        missing = {int.from_bytes(pair, "little"): pair for pair in wanted}
        found: set[bytes] = set()
        for first in range(min(2, len(self.data))):
            numbers = np.frombuffer(self.data, "<u2", (len(self.data) - first) // 2, first)
            for place in range(0, len(numbers), _STEP):
                step = numbers[place : place + _STEP]
                here = [number for number in missing if (step == number).any()]
                found.update(missing.pop(number) for number in here)
        return found

    def places(self, letter: int) -> NDArray[np.int64]:
        """Where a byte stands, which is looked for once."""
        if letter not in self._places:
            self._places[letter] = np.flatnonzero(self._letters == letter)
        return self._places[letter]


def _go_on(
    letters: NDArray[np.uint8], places: NDArray[np.int64], words: Sequence[bytes], known: int
) -> bool:
    """Whether one of the words, sorted and alike in their first `known` letters, which stand at
    these places, is there."""
    if not len(places):
        return False
    if len(words[0]) == known:
        return True
    places = places[: np.searchsorted(places, len(letters) - known)]
    following = letters[places + known]
    return any(
        _go_on(letters, places[following == letter], list(group), known + 1)
        for letter, group in groupby(words, key=lambda word: word[known])
    )


def _escapes(letter: str) -> list[bytes]:
    """How JSON writes a letter that it escapes; of one beyond the first 65,536, the first half."""
    if letter in _SHORT:
        return [_SHORT[letter], *_by_number(letter)]
    return _by_number(letter)


_SHORT = {
    "/": rb"\/",
    '"': rb"\"",
    "\\": rb"\\",
    "\b": rb"\b",
    "\f": rb"\f",
    "\n": rb"\n",
    "\r": rb"\r",
    "\t": rb"\t",
}


def _by_number(letter: str) -> list[bytes]:
    unit = letter.encode("utf-16-be", "surrogatepass").hex()[:4]
    written = {"".join(digits) for digits in product(*({digit, digit.upper()} for digit in unit))}
    return [rf"\u{digits}".encode() for digits in written]

"""Whether any of some short texts stands in a long one, which it mostly does not."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import numpy as np


def holds_any(data: bytes, texts: Iterable[bytes]) -> bool:
    """Whether one of the texts, none of them empty, is in `data`.

    Looking for single letters is several times faster than looking for words, so words are looked for where two letters are.
    """
    letters = np.frombuffer(data, np.uint8)
    for first, words in groupby(sorted(texts), key=lambda word: word[0]):
        places = np.flatnonzero(letters == first)
        following = letters[np.minimum(places + 1, len(letters) - 1)]
        for word in words:
            if (len(word) == 1 and len(places)) or (len(word) > 1 and (following == word[1]).any() and word in data):
                return True
    return False

"""Shapes filled with contents as JSON writes them, so that the texts of many conversations are made
and decoded in one go."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from sftprep.chat.shapes import Shape
from sftprep.ragged import SLOT, Pieces, Ragged

_BEGIN, _END, BETWEEN = 0, 1, 2


class Stripped(NamedTuple):
    """Numbers of the messages whose contents are stripped of blanks at their begin, and at their
    end."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]


def stripped(shape: Shape) -> Stripped | None:
    """None where contents stand in another order, side by side, or stripped of more than blanks."""
    if shape.order is not None or len(shape.literals) < 2 or not all(shape.literals[1:-1]):
        return None
    begins, ends = set(), set()
    for place, (method, arguments) in shape.changes:
        if arguments and not arguments[0].isspace():
            return None
        if method in ("strip", "lstrip"):
            begins.add(place // 2)
        if method in ("strip", "rstrip"):
            ends.add(place // 2)
    return Stripped(tuple(sorted(begins)), tuple(sorted(ends)))


class Writer:
    """Literals as JSON writes them, and JSON of literals and contents. Between two conversations
    stands `between`, as a rule."""

    def __init__(self, begin: bytes, between: bytes, end: bytes) -> None:
        self.number = cache(self._number)
        """The number of a literal, for an order. Raises orjson.JSONEncodeError as `order` does."""
        self._written = [begin, end, between]

    def order(self, literals: Sequence[str], last: str = "") -> NDArray[np.int64]:
        """For `read`: literal, content, ... literal, content, the last literal if there is one, and
        what stands between: int64.

        Raises orjson.JSONEncodeError where JSON cannot write a literal, for half of a surrogate
        pair.
        """
        return order_of([*map(self.number, literals)], [self.number(last)] if last else [])

    def read(self, order: NDArray[np.int64], contents: Pieces[np.uint8]) -> Any:
        """What the JSON says. order: of all conversations; contents: of their messages, one after
        the other, as written; none ends in an escape.

        Raises orjson.JSONDecodeError where a content is no text.
        """
        whole = np.concatenate(([_BEGIN], order[:-1], [_END]))
        fixed: Ragged[np.uint8] = Ragged.of(
            [np.frombuffer(each, np.uint8) for each in self._written], np.uint8
        )
        return orjson.loads(contents.within(whole, fixed).values.data)

    def _number(self, literal: str) -> int:
        self._written.append(orjson.dumps(literal)[1:-1])
        return len(self._written) - 1


def order_of(numbers: Sequence[int], ends: Sequence[int] = ()) -> NDArray[np.int64]:
    """The order of literals with these numbers, each before a content, and of those that come after
    the last one."""
    order = np.full(2 * len(numbers) + len(ends) + 1, SLOT)
    order[: 2 * len(numbers) : 2] = numbers
    order[2 * len(numbers) :] = [*ends, BETWEEN]
    return order

"""Shapes filled with contents as JSON writes them, so that the texts of many conversations are decoded in one go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import orjson

from sftprep.chat.shapes import Shape


class WrittenShape(NamedTuple):
    """The literals of a shape as JSON writes them.

    first stands before the first content, each of `between` between two, last after the last; begins, ends: numbers of the
    messages whose contents are stripped of blanks there, and so must have none.
    """

    first: bytes
    between: tuple[bytes, ...]
    last: bytes
    begins: tuple[int, ...]
    ends: tuple[int, ...]


def written_shape(shape: Shape) -> WrittenShape | None:
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
    try:
        first, *between, last = (orjson.dumps(literal)[1:-1] for literal in shape.literals)
    except orjson.JSONEncodeError:  # half of a surrogate pair
        return None
    return WrittenShape(first, tuple(between), last, tuple(sorted(begins)), tuple(sorted(ends)))


def fill_written(shapes: Iterable[WrittenShape], contents: Sequence[bytes]) -> list[str]:
    """The text of each conversation. contents: of all their messages, one after the other, as written, none ending in an escape.

    Raises orjson.JSONDecodeError where a content is no text.
    """
    literals: list[bytes] = []
    before = b'["'
    for shape in shapes:
        literals.append(before + shape.first)
        literals.extend(shape.between)
        before = shape.last + b'","'
    if not literals:
        return []
    parts = [b""] * (2 * len(contents) + 1)
    parts[:-1:2], parts[1::2], parts[-1] = literals, contents, before[:-2] + b"]"
    texts: list[str] = orjson.loads(b"".join(parts))
    return texts

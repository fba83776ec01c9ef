"""Shapes filled with contents as JSON writes them, so that the texts of many conversations are decoded in one go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import orjson

from sftprep.chat.shapes import Shape


class Literals(NamedTuple):
    """Literal text as JSON writes it: before the first content, before each other one, and after the last."""

    first: bytes
    others: tuple[bytes, ...]
    last: bytes


class Stripped(NamedTuple):
    """Numbers of the messages whose contents are stripped of blanks at their begin, and at their end."""

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


def literals_of(texts: Sequence[str]) -> Literals | None:
    """The literals as JSON writes them; None where it cannot, for half of a surrogate pair."""
    try:
        first, *others, last = (orjson.dumps(text)[1:-1] for text in texts)
    except orjson.JSONEncodeError:
        return None
    return Literals(first, tuple(others), last)


def texts_written(literals: Iterable[Literals], contents: Sequence[bytes]) -> list[str]:
    """The text of each conversation. contents: of all their messages, one after the other, as written; none ends in an escape.

    Raises orjson.JSONDecodeError where a content is no text.
    """
    texts: list[str] = orjson.loads(b'["' + _filled(literals, contents, b'","') + b'"]') if contents else []
    return texts


def joined_written(literals: Iterable[Literals], contents: Sequence[bytes], between: str) -> str:
    """The same as one text, with `between` between conversations."""
    text: str = orjson.loads(b'"' + _filled(literals, contents, orjson.dumps(between)[1:-1]) + b'"')
    return text


def _filled(literals: Iterable[Literals], contents: Sequence[bytes], between: bytes) -> bytes:
    befores: list[bytes] = []
    end = b""
    for first, others, last in literals:
        befores.append(end + first)
        befores.extend(others)
        end = last + between
    parts = [b""] * (2 * len(contents) + 1)
    parts[:-1:2], parts[1::2], parts[-1] = befores, contents, end[: len(end) - len(between)]
    return b"".join(parts)

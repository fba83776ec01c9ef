"""Grouping of strings or lines into chunks of about equal size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item", str, bytes)


def in_groups(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Yield consecutive items in non-empty lists of about `size` characters or bytes.

    A list ends with the item that brings its total to `size`.

    Example:
        in_groups(["ab", "cd", "e"], 3)  ->  ["ab", "cd"], ["e"]
    """
    group: list[_Item] = []
    total = 0
    for item in items:
        group.append(item)
        total += len(item)
        if total >= size:
            yield group
            group, total = [], 0
    if group:
        yield group

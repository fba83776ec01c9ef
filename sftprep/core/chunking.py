"""Texts or lines put together in groups of about a size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item", str, bytes)


def in_groups(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Items, in order, in lists that end with the item that brings them to `size` characters or
    bytes; none is empty."""
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

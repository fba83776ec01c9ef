"""The search for the leaves of a conversation in its rendered text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sftprep.core.omissions import TOOLS
from sftprep.render.omissions.content_leaves import ANYWHERE, Leaf
from sftprep.render.omissions.spellings import (
    cannot_be_in,
    count_missing,
    first_spelling,
    iter_spellings,
    occurs,
)

_SURE_LENGTH = 8
"""Shorter strings may occur in a text by chance."""


def search_leaves(leaves: Sequence[Leaf], text: str, most_misses: int | None = None) -> list[bool]:
    """Return for each leaf whether the text shows it, turn after turn.

    Args:
        leaves: The leaves.
        text: The rendered text.
        most_misses: The number of missing leaves after which the others count as shown.
    """
    found: list[bool] = []
    start = end = misses = 0
    turn = 0
    for leaf in leaves:
        if most_misses is not None and misses >= most_misses:
            found.append(True)
            continue
        if leaf.turn == ANYWHERE:
            found.append(occurs(leaf.value, text))
            continue
        if leaf.turn != turn:
            turn, start = leaf.turn, end
        form = first_spelling(leaf.value)
        position = text.find(form, start)
        if position < 0 and not cannot_be_in(leaf.value, text):
            for form in iter_spellings(leaf.value):
                position = text.find(form, start)
                if position >= 0:
                    break
        found.append(position >= 0)
        misses += position < 0
        if position >= 0 and not _may_be_repeated(leaf):
            end = max(end, position + len(form))
    return found


def remove_missing(
    leaves: Sequence[Leaf],
    found: list[bool],
    in_order: Sequence[bool],
    examined: Sequence[int],
    text: str,
    fixed: str,
) -> None:
    """Set `found` to False for leaves of which the text has fewer than the record.

    Of equal leaves, those that the search in order missed are set first, then the last ones.

    Args:
        leaves: The leaves.
        found: Whether each leaf is in the text; changed.
        in_order: Whether the search in order found it.
        examined: The numbers of the leaves to examine.
        text: The rendered text.
        fixed: What the template writes besides the leaves.
    """
    shown = [leaf.value for leaf, is_found in zip(leaves, found, strict=True) if is_found]
    examined = [number for number in examined if found[number]]
    missing = count_missing(shown, [leaves[number].value for number in examined], text, fixed)
    for number in sorted(examined, key=lambda number: (in_order[number], -number)):
        spelling = first_spelling(leaves[number].value)
        if missing[spelling]:
            missing[spelling] -= 1
            found[number] = False


def find_ambiguous(
    leaves: Sequence[Leaf],
    numbers: Iterable[int],
    structural: Iterable[str],
    fixed: str,
) -> set[int]:
    """Return those of some leaves that may be found in the text by chance, by number.

    They are the short leaves, those of tools, those that occur in another leaf or another string
    of the record in any spelling, and those that the template writes by itself.

    Args:
        leaves: All leaves of the record.
        numbers: The leaves to examine.
        structural: The strings of the record that are not leaves, and that templates may write.
        fixed: What the template writes besides the leaves.
    """
    everything = "\0".join([*(str(leaf.value) for leaf in leaves), *structural])
    return {
        number
        for number in numbers
        if _may_be_repeated(leaf := leaves[number])
        or sum(map(everything.count, {*iter_spellings(leaf.value)})) > 1
        or (not cannot_be_in(leaf.value, fixed) and occurs(leaf.value, fixed))
    }


def may_match_by_chance(value: str | int | float) -> bool:
    """Return whether a text may contain a value without showing it."""
    return not isinstance(value, str) or len(value) < _SURE_LENGTH


def _may_be_repeated(leaf: Leaf) -> bool:
    """Return whether other contents may contain the value of a leaf.

    Calls and their results repeat the names and values of tools.
    """
    return leaf.kind == TOOLS or may_match_by_chance(leaf.value)

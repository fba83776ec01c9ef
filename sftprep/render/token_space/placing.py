"""From boundaries between anchors to a mask over token ids: one scan finds the anchors, and the
checks decide which texts take the reference path (C2 to C5 of the design notes)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftprep.render.token_space.regions import AT, BEFORE, Boundary
from sftprep.tokenize.encoders.base import Tokens

_FEW = 8
"""Ids."""


@dataclass(slots=True)
class AnchoredTexts:
    """Texts of a batch whose regions are known as boundaries between anchors.

    numbers: of the texts in their batch, ascending; anchors: how many the template wrote into each;
    regions: of all texts, the ordinal and the literal of each boundary, starts and ends of regions
    in turn; ends: how long `regions` is after each text; starts: where the completion of a text
    starts, by its index in `numbers`.
    """

    numbers: list[int] = field(default_factory=list)
    anchors: list[int] = field(default_factory=list)
    regions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    starts: dict[int, Boundary] = field(default_factory=dict)

    def add(
        self, number: int, anchors: int, regions: list[int] | None, start: Boundary | None
    ) -> None:
        """Add a text. regions: None if everything from `start` on is trained; start: nothing before
        it is trained."""
        if start is not None:
            self.starts[len(self.numbers)] = start
        self.numbers.append(number)
        self.anchors.append(anchors)
        self.regions += (0, AT, anchors, AT) if regions is None else regions
        self.ends.append(len(self.regions))

    def literals_of(self, index: int) -> set[int]:
        """The literals at the boundaries of a text, by its index in `numbers`."""
        first = self.ends[index - 1] if index else 0
        found = {*self.regions[first + 1 : self.ends[index] : 2]}
        if index in self.starts:
            found.add(self.starts[index].literal)
        return found


@dataclass(slots=True)
class AnchorTable:
    """What the checks need of a tokenizer.

    anchors: their int32 ids; literals: of each literal, with its anchor, the int32 ids at the end
    of a text, and those before other text if they differ; none if it cannot be used; continues:
    bool [ids], tokens that contain no first byte of a character, None if all characters are ASCII.
    """

    anchors: NDArray[np.int32]
    literals: Sequence[Sequence[NDArray[np.int32]]]
    continues: NDArray[np.bool_] | None


class Placed(NamedTuple):
    """Of each text, bool [texts]: failed, whether it failed a check; cut, whether its prompt is not
    a prefix of it."""

    failed: NDArray[np.bool_]
    cut: NDArray[np.bool_]


def place_regions(
    tokens: Tokens, texts: AnchoredTexts, table: AnchorTable, mask: NDArray[np.bool_]
) -> Placed:
    """Set the mask of the texts that pass the checks.

    mask: bool [tokens], False; the tokens of a text that failed stay so.
    """
    ids, offsets = tokens.input_ids, tokens.offsets
    numbers = np.array(texts.numbers, np.int64)
    first_token, last_token = offsets[numbers], offsets[numbers + 1]
    expected = np.array(texts.anchors, np.int64)
    # C1 and C2: as many anchors as the template wrote.
    places = find_ids(ids, table.anchors)
    first_anchor = np.searchsorted(places, first_token)
    failed: NDArray[np.bool_] = np.searchsorted(places, last_token) - first_anchor != expected
    places = np.append(places, len(ids))

    def anchors_at(of: NDArray[np.int64], ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        at = places[np.minimum(first_anchor[of] + ordinals, len(places) - 1)]
        return np.where(ordinals == expected[of], last_token[of], at)

    def matching(
        at: NDArray[np.int64], ends: NDArray[np.int64], literal: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """How many ids of a literal the ids from `at` on begin with."""
        length = np.zeros(len(at), np.int64)
        for place, token in enumerate(literal.tolist()):
            position = at + place
            same = (length == place) & (position < ends)
            same &= ids[np.minimum(position, len(ids) - 1)] == token
            length += same
        return length

    boundaries = np.array(texts.regions, np.int64).reshape(-1, 2)
    of = np.repeat(np.arange(len(numbers)), np.diff(texts.ends, prepend=0) // 2)
    literals = boundaries[:, 1]
    at = anchors_at(of, boundaries[:, 0])
    for literal in np.unique(literals).tolist():
        which = np.flatnonzero((literals == literal) & ~failed[of])
        if literal == BEFORE:
            at[which] = _without_last_character(ids, at[which], table.continues)  # C5
        if literal < 0:
            continue
        for known in table.literals[literal]:
            length = matching(at[which], last_token[of[which]], known)
            whole = length == len(known)
            at[which[whole]] += len(known)
            which = which[~whole]
        failed[of[which]] = True  # C3
    least, cut = first_token.copy(), np.zeros(len(numbers), np.bool_)
    for literal in {boundary.literal for boundary in texts.starts.values()}:
        which = np.array([k for k, b in texts.starts.items() if b.literal == literal], np.int64)
        if not table.literals[literal]:
            failed[which] = True
            continue
        known = table.literals[literal][0]
        which = which[~failed[which]]
        ordinals = np.array([texts.starts[k].ordinal for k in which.tolist()], np.int64)
        begins = anchors_at(which, ordinals)
        # A completion starts where its ids differ from those of the prompt alone.
        length = matching(begins, last_token[which], known)
        least[which] = begins + length
        cut[which] = length < len(known)
    at = np.maximum(at, least[of])
    opens, closes, of = at[::2], at[1::2], of[::2]
    failed[of[opens > closes]] = True  # C4
    kept = ~failed[of]
    for first, last in zip(opens[kept].tolist(), closes[kept].tolist(), strict=True):
        mask[first:last] = True
    return Placed(failed, cut)


def find_ids(ids: NDArray[np.int32], wanted: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where any of some ids are. For few of them, comparisons are faster than a table."""
    if len(wanted) > _FEW:
        return np.flatnonzero(np.isin(ids, wanted))
    found = np.zeros(len(ids), np.bool_)
    for each in wanted.tolist():
        found |= ids == each
    return np.flatnonzero(found)


def _without_last_character(
    ids: NDArray[np.int32], ends: NDArray[np.int64], continues: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """The ends of regions, moved to after the first token of their last character, which may span
    up to four: as transformers has it."""
    if continues is None:
        return ends
    for _ in range(3):
        ends = ends - ((ends > 0) & continues[ids[np.maximum(ends - 1, 0)]])
    return ends

"""From boundaries between anchors to a mask over token ids.

Idea: the template knows how many anchors it wrote before each boundary. So the k-th anchor in the
ids of a text gives the position of the boundary, and no character positions are needed.

1. Find all anchors in the ids. A text whose ids do not contain as many anchors as its template
   wrote is rejected: its content spells a special token, or a token merged with one.
2. Resolve each boundary to a token. The ids after the anchor must be those of the literal.
3. Resolve the starts of completions likewise.
4. A region that ends before it starts rejects its text.
5. Fill the mask.

A rejected text takes the reference path (`mask_arrays.mask_spans`), and so gets the same mask as
without this module; tests/render/test_token_space.py compares the two paths.

Cost: one comparison of all ids with each anchor, and array operations over the boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftprep.render.token_space.regions import AT, BEFORE, Boundary
from sftprep.tokenize.encoders.base import Tokens

_FEW_IDS = 8
"""Up to this number of ids, comparing with each of them is faster than a table."""


@dataclass(slots=True)
class AnchoredTexts:
    """Texts of a batch, with regions bounded by anchors."""

    numbers: list[int] = field(default_factory=list)  # indices in the batch, ascending
    anchors: list[int] = field(default_factory=list)  # anchors that the template wrote, per text
    # For all texts one after the other, the index of the anchor and the literal of each boundary
    # (see `Boundary`); a region is two boundaries, its start and its end.
    regions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # length of `regions` after each text
    # Where the completion of a text starts, by the text's index in `numbers`.
    starts: dict[int, Boundary] = field(default_factory=dict)

    def add(
        self, number: int, anchors: int, regions: list[int] | None, start: Boundary | None
    ) -> None:
        """Add a text.

        Args:
            number: Its index in the batch.
            anchors: The number of anchors that the template wrote into it.
            regions: Its regions; None: everything from `start` on.
            start: Nothing before it is trained.
        """
        if start is not None:
            self.starts[len(self.numbers)] = start
        self.numbers.append(number)
        self.anchors.append(anchors)
        self.regions += (0, AT, anchors, AT) if regions is None else regions
        self.ends.append(len(self.regions))

    def literals_of(self, index: int) -> set[int]:
        """Return the literals at the boundaries of a text, by its index in `numbers`."""
        first = self.ends[index - 1] if index else 0
        found = {*self.regions[first + 1 : self.ends[index] : 2]}
        if index in self.starts:
            found.add(self.starts[index].literal)
        return found


@dataclass(slots=True)
class AnchorTable:
    """The properties of a tokenizer for the checks."""

    anchors: NDArray[np.int32]  # ids of the anchors
    # For each literal, with its anchor: its ids at the end of a text, and its ids before other text
    # if they differ. Empty: the literal cannot be used.
    literals: Sequence[Sequence[NDArray[np.int32]]]
    # bool [ids]: tokens without the first byte of any character; None: all characters are ASCII.
    continues: NDArray[np.bool_] | None


class PlacedRegions(NamedTuple):
    """The result for each text: bool [texts]."""

    failed: NDArray[np.bool_]  # whether it failed a check
    cut: NDArray[np.bool_]  # whether its prompt is not a prefix of it


@dataclass(slots=True)
class _TextTokens:
    """The tokens of the anchored texts, with positions in the whole batch."""

    ids: NDArray[np.int32]  # of the whole batch
    first: NDArray[np.int64]  # first token of each text
    end: NDArray[np.int64]  # end of each text
    num_anchors: NDArray[np.int64]  # anchors that each text should contain
    anchor_positions: NDArray[np.int64]  # of the whole batch, and the end of the batch
    first_anchor: NDArray[np.int64]  # index in `anchor_positions` of the first anchor of each text

    def positions_of(
        self, texts: NDArray[np.int64], anchor_indices: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the position of an anchor of each text.

        For the anchor index after the last anchor of a text, it is the end of the text.
        """
        index = np.minimum(
            self.first_anchor[texts] + anchor_indices, len(self.anchor_positions) - 1
        )
        at_end = anchor_indices == self.num_anchors[texts]
        return np.where(at_end, self.end[texts], self.anchor_positions[index])

    def count_matching(
        self, texts: NDArray[np.int64], starts: NDArray[np.int64], literal: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """Return the number of leading ids of a literal in each text, from `starts` on."""
        ends = self.end[texts]
        length = np.zeros(len(starts), np.int64)
        for index, token in enumerate(literal.tolist()):
            position = starts + index
            matches = (length == index) & (position < ends)
            matches &= self.ids[np.minimum(position, len(self.ids) - 1)] == token
            length += matches
        return length


def place_regions(
    tokens: Tokens, texts: AnchoredTexts, table: AnchorTable, mask: NDArray[np.bool_]
) -> PlacedRegions:
    """Set the mask of the texts without a failed check.

    Args:
        tokens: The tokens of the whole batch.
        texts: The anchored texts of the batch.
        table: The properties of the tokenizer.
        mask: bool [tokens], False; the tokens of a text that fails remain False.

    Example:
        ids = [S, 7, 8, E, S, 9, 5, 6, E] with the anchors S and E, and one region from after the
        literal [S, 9] of anchor 2 to after anchor 3  ->  mask = [0, 0, 0, 0, 0, 0, 1, 1, 1]
    """
    ids, offsets = tokens.input_ids, tokens.offsets
    numbers = np.array(texts.numbers, np.int64)
    # 1. Find the anchors, and reject texts with an unexpected number of them.
    anchor_positions = find_ids(ids, table.anchors)
    first, end = offsets[numbers], offsets[numbers + 1]
    first_anchor = np.searchsorted(anchor_positions, first)
    num_anchors = np.array(texts.anchors, np.int64)
    failed: NDArray[np.bool_] = np.searchsorted(anchor_positions, end) - first_anchor != num_anchors
    anchor_positions = np.append(anchor_positions, len(ids))
    view = _TextTokens(ids, first, end, num_anchors, anchor_positions, first_anchor)
    # 2. and 3. Resolve boundaries and starts of completions to tokens.
    text_of = np.repeat(np.arange(len(numbers)), np.diff(texts.ends, prepend=0) // 2)
    bounds = _resolve_boundaries(view, texts, text_of, table, failed)
    starts, cut = _resolve_starts(view, texts, table, failed)
    bounds = np.maximum(bounds, starts[text_of])
    # 4. Reject texts with a region that ends before it starts.
    begins, ends, text_of = bounds[::2], bounds[1::2], text_of[::2]
    failed[text_of[begins > ends]] = True
    # 5. Fill the mask.
    kept = ~failed[text_of]
    for begin, last in zip(begins[kept].tolist(), ends[kept].tolist(), strict=True):
        mask[begin:last] = True
    return PlacedRegions(failed, cut)


def _resolve_boundaries(
    view: _TextTokens,
    texts: AnchoredTexts,
    text_of: NDArray[np.int64],
    table: AnchorTable,
    failed: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Return the token of each boundary: int64 [boundaries].

    Args:
        text_of: int64 [boundaries], the text of each boundary.
        failed: bool [texts], is set for texts whose ids do not contain a literal.
    """
    boundaries = np.array(texts.regions, np.int64).reshape(-1, 2)
    literals = boundaries[:, 1]
    positions = view.positions_of(text_of, boundaries[:, 0])
    for literal in np.unique(literals).tolist():
        selected = np.flatnonzero((literals == literal) & ~failed[text_of])
        if literal == BEFORE:
            positions[selected] = _without_last_character(
                view.ids, positions[selected], table.continues
            )
        if literal < 0:
            continue
        for literal_ids in table.literals[literal]:
            length = view.count_matching(text_of[selected], positions[selected], literal_ids)
            is_whole = length == len(literal_ids)
            positions[selected[is_whole]] += len(literal_ids)
            selected = selected[~is_whole]
        failed[text_of[selected]] = True
    return positions


def _resolve_starts(
    view: _TextTokens, texts: AnchoredTexts, table: AnchorTable, failed: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the earliest position for training in each text.

    Args:
        failed: bool [texts], is set for texts whose literal cannot be used.

    Returns:
        int64 [texts], the first token that may be trained; and bool [texts], whether the prompt is
        not a prefix of the text.
    """
    starts, cut = view.first.copy(), np.zeros(len(failed), np.bool_)
    for literal in {boundary.literal for boundary in texts.starts.values()}:
        selected = np.array([k for k, b in texts.starts.items() if b.literal == literal], np.int64)
        if not table.literals[literal]:
            failed[selected] = True
            continue
        literal_ids = table.literals[literal][0]
        selected = selected[~failed[selected]]
        anchor_indices = np.array(
            [texts.starts[k].anchor_index for k in selected.tolist()], np.int64
        )
        positions = view.positions_of(selected, anchor_indices)
        # A completion starts where its ids differ from those of the prompt alone.
        length = view.count_matching(selected, positions, literal_ids)
        starts[selected] = positions + length
        cut[selected] = length < len(literal_ids)
    return starts, cut


def find_ids(ids: NDArray[np.int32], token_ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the positions in `ids` of any of the ids in `token_ids`."""
    if len(token_ids) > _FEW_IDS:
        return np.flatnonzero(np.isin(ids, token_ids))
    found = np.zeros(len(ids), np.bool_)
    for token in token_ids.tolist():
        found |= ids == token
    return np.flatnonzero(found)


def _without_last_character(
    ids: NDArray[np.int32], ends: NDArray[np.int64], continues: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """Move the ends of regions to after the first token of their last character.

    A character may span up to four tokens; transformers includes only the first one.
    """
    if continues is None:
        return ends
    for _ in range(3):
        ends = ends - ((ends > 0) & continues[ids[np.maximum(ends - 1, 0)]])
    return ends

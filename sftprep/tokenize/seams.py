"""Texts of which much is the same, cut so that what is the same is encoded once: conversations in
the frame of their template.

An added token divides a text before anything else looks at it (between.py), so the text around it
gives the ids that it gives alone. Of a template's literal text between two contents, everything up
to its last added token is encoded by itself; what follows is encoded together with the content
after it, so that nothing need be known of how words are found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from sftprep.ragged import SLOT, Ragged, edges
from sftprep.tokenize.between import COMMA, Between, between_texts, takes_commas
from sftprep.tokenize.fast import FastEncoder
from sftprep.tokenize.spec import TokenizerSpec, takes_only_itself
from sftprep.tokenize.tokens import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Literal text of which one piece more than there are contents stands around them, cut.

    heads: of each literal up to its last added token, the last one whole; tails: what is left of
    each but the last.
    """

    heads: tuple[str, ...]
    tails: tuple[str, ...]


class Seams:
    """Where the texts of a tokenizer can be cut. between: stands between contents that are encoded
    at once; commas may too."""

    def __init__(self, between: Between, added: Sequence[str], *, commas: bool) -> None:
        """added: the tokens of `between`'s tokenizer that divide texts, all of them."""
        self.between, self.commas = between, commas
        self._added = [*added]
        # Templates write the same few literals again and again.
        self._first, self._middle, self._last = (
            cache(partial(self._cut, first=first, last=last))
            for first, last in ((True, False), (False, False), (False, True))
        )
        self._find = re.compile(
            "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
        ).finditer

    def frame(self, literals: Sequence[str]) -> Frame | None:
        """The literals of a shape, cut; None where they cannot be."""
        if len(literals) < 2:
            return None
        first, *middle, last = literals
        cuts = [self._first(first), *map(self._middle, middle), self._last(last)]
        if None in cuts:
            return None
        heads, tails = zip(*(cut for cut in cuts if cut), strict=True)
        return Frame(heads, tails[:-1])

    def _cut(self, literal: str, *, first: bool, last: bool) -> tuple[str, str] | None:
        """The head and the tail of a literal; None where a token may stand across its ends, or none
        cuts it."""
        found = [*self._find(literal)]
        apart = first or (bool(found) and found[0].start() == 0) or (last and not literal)
        if (
            not apart
            or (not first and self._may_end_in(literal))
            or (not last and self._may_begin_in(literal))
        ):
            return None
        if self.between.text in literal or COMMA[1] in literal:
            return None
        end = len(literal) if last else found[-1].end() if found else 0
        return literal[:end], literal[end:]

    def _may_end_in(self, literal: str) -> bool:
        rests = (token[cut:] for token in self._added for cut in range(1, len(token)))
        return bool(literal) and any(
            literal.startswith(rest) or rest.startswith(literal) for rest in rests
        )

    def _may_begin_in(self, literal: str) -> bool:
        return any(
            literal.endswith(token[:cut]) for token in self._added for cut in range(1, len(token))
        )


def seams_of(spec: TokenizerSpec) -> Seams | None:
    """None where it is not known that added tokens divide texts, whatever stands beside them."""
    between = between_texts(spec)
    entries = spec.part("added_tokens") or []
    if between is None or not all(map(takes_only_itself, entries)):
        return None
    return Seams(between, [entry["content"] for entry in entries], commas=takes_commas(spec))


class Heads:
    """Ids of the heads of frames, each encoded once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._orders: dict[Frame, NDArray[np.int64]] = {}
        self.ids: Ragged[np.int32] = Ragged.of([], np.int32)

    def orders(self, encoder: FastEncoder, frames: Sequence[Frame]) -> list[NDArray[np.int64]]:
        """Of each frame: the number of a head, SLOT for what is between it and the next, ... the
        number of the last head."""
        new = [frame for frame in dict.fromkeys(frames) if frame not in self._orders]
        heads = [
            head
            for head in dict.fromkeys(chain.from_iterable(frame.heads for frame in new))
            if head not in self._numbers
        ]
        if heads:
            found = encoder.encode(heads)
            self._numbers.update(
                zip(heads, range(len(self._numbers), len(self._numbers) + len(heads)), strict=True)
            )
            known = (
                [self.ids.values, found.input_ids],
                [self.ids.edges, self.ids.edges[-1] + found.offsets[1:]],
            )
            self.ids = Ragged(*map(np.concatenate, known))
        for frame in new:
            order = self._orders[frame] = np.full(2 * len(frame.heads) - 1, SLOT)
            order[::2] = [*map(self._numbers.__getitem__, frame.heads)]
        return [self._orders[frame] for frame in frames]


def encode_framed(
    encoder: FastEncoder, frames: Sequence[Frame], joined: str, commas: int, heads: Heads
) -> Tokens | None:
    """Ids of texts, each of a frame and its contents; None where the parts have to be encoded one
    by one.

    joined: tail and content, and so on, with the encoder's `between` or, so often, a comma between
    each two; heads: those that were encoded before.
    """
    orders = heads.orders(encoder, frames)
    parts = encoder.encode_parts(
        joined, sum(len(frame.tails) for frame in frames) - 1 - commas, commas
    )
    if parts is None:
        return None
    made = parts.within(np.concatenate(orders), heads.ids)
    texts = edges(np.fromiter(map(len, orders), np.int64, len(orders)))
    return Tokens(made.values, made.edges[texts])

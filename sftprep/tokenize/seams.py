"""Texts of which much is the same, cut so that what is the same is encoded once: conversations in the frame of their template.

An added token divides a text before anything else looks at it (between.py), so the text around it gives the ids that it gives
alone. Of a template's literal text between two contents, everything up to its last added token is encoded by itself; what
follows is encoded together with the content after it, so that nothing need be known of how words are found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sftprep.tokenize.between import Between, between_texts
from sftprep.tokenize.fast import FastEncoder
from sftprep.tokenize.spec import TokenizerSpec, takes_only_itself
from sftprep.tokenize.tokens import Tokens, edges


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Literal text of which one piece more than there are contents stands around them, cut.

    heads: of each literal up to its last added token, the last one whole; tails: what is left of each but the last.
    """

    heads: tuple[str, ...]
    tails: tuple[str, ...]


class Seams:
    """Where the texts of a tokenizer can be cut. between: stands between contents that are encoded at once."""

    def __init__(self, between: Between, added: Sequence[str]) -> None:
        """added: the tokens of `between`'s tokenizer that divide texts, all of them."""
        self.between = between
        self._added = [*added]
        # Templates write the same few literals again and again.
        self._cut = lru_cache(maxsize=10_000)(self._new_cut)
        self._find = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))).finditer

    def frame(self, literals: Sequence[str]) -> Frame | None:
        """The literals of a shape, cut; None where they cannot be."""
        last = len(literals) - 1
        cuts = [self._cut(literal, first=number == 0, last=number == last) for number, literal in enumerate(literals)]
        if None in cuts:
            return None
        heads, tails = zip(*(cut for cut in cuts if cut), strict=True)
        return Frame(heads, tails[:-1])

    def _new_cut(self, literal: str, first: bool, last: bool) -> tuple[str, str] | None:
        """The head and the tail of a literal; None where a token may stand across its ends, or none cuts it."""
        found = [*self._find(literal)]
        apart = first or (bool(found) and found[0].start() == 0) or (last and not literal)
        if not apart or (not first and self._may_end_in(literal)) or (not last and self._may_begin_in(literal)):
            return None
        if self.between.text in literal:
            return None
        end = len(literal) if last else found[-1].end() if found else 0
        return literal[:end], literal[end:]

    def _may_end_in(self, literal: str) -> bool:
        rests = (token[cut:] for token in self._added for cut in range(1, len(token)))
        return bool(literal) and any(literal.startswith(rest) or rest.startswith(literal) for rest in rests)

    def _may_begin_in(self, literal: str) -> bool:
        return any(literal.endswith(token[:cut]) for token in self._added for cut in range(1, len(token)))


def seams_of(spec: TokenizerSpec) -> Seams | None:
    """None where it is not known that added tokens divide texts, whatever stands beside them."""
    between = between_texts(spec)
    entries = spec.part("added_tokens") or []
    if between is None or not all(map(takes_only_itself, entries)):
        return None
    return Seams(between, [entry["content"] for entry in entries])


@dataclass(slots=True)
class FramedIds:
    """The ids of a frame's heads: flat int32, and how many of each, int64 [heads]."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]


def encode_framed(
    encoder: FastEncoder, frames: Sequence[Frame], joined: str, seams: Seams, known: dict[Frame, FramedIds]
) -> Tokens | None:
    """Ids of texts, each of a frame and its contents; None where the parts have to be encoded one by one.

    joined: tail and content, and so on, with `seams.between` between each two; known: what the frames were encoded to before.
    """
    new = [frame for frame in dict.fromkeys(frames) if frame not in known]
    if new:
        heads = encoder.encode([head for frame in new for head in frame.heads])
        lengths, at = np.diff(heads.offsets), 0
        for frame in new:
            until = at + len(frame.heads)
            known[frame] = FramedIds(heads.input_ids[heads.offsets[at] : heads.offsets[until]], lengths[at:until])
            at = until
    counts = np.fromiter((len(frame.tails) for frame in frames), np.int64, len(frames))
    total = int(counts.sum())
    parts = encoder.encode_parts(joined, seams.between, total)
    if parts is None:
        return None
    framed = [known[frame] for frame in frames]
    # head, part, head, part, ..., head of each text.
    is_head = np.ones(2 * total + len(frames), np.bool_)
    is_head[2 * np.arange(total) + 1 + np.repeat(np.arange(len(frames)), counts)] = False
    sizes = np.empty(len(is_head), np.int64)
    sizes[is_head] = np.concatenate([each.lengths for each in framed])
    sizes[~is_head] = np.diff(parts.offsets)
    from_head = np.repeat(is_head, sizes)
    made = np.empty(len(from_head), np.int32)
    made[from_head] = np.concatenate([each.ids for each in framed])
    made[~from_head] = parts.input_ids
    return Tokens(made, edges(np.add.reduceat(sizes, edges(2 * counts + 1)[:-1])))

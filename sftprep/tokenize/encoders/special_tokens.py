"""Special tokens that a text spells out: found in it, and encoded as plain text where that is asked
for.

A mark is put into each of them (`<` mark `|im_end|>`) before a template sees the text, so that what
the template itself writes can be told from it afterwards. A marked text is encoded as it is, which
finds the template's own tokens; each stretch between those that has a mark in it is then encoded
again, without the mark, by a tokenizer that recognises no special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.byte_search import ByteSearcher
from sftprep.core.ragged import replace_segments
from sftprep.tokenize.encoders.base import Tokens, flat_tokens
from sftprep.tokenize.loading.spec import TokenizerSpec

MARKS = ("\U0010fffd", "\U0010fffc", "\U0010fffb")
"""Characters that mean nothing, the first of which that is not in a record is its mark."""


class SpecialTokenScanner:
    """The special tokens of a tokenizer, looked for in texts."""

    def __init__(self, spec: TokenizerSpec) -> None:
        entries = spec.part("added_tokens") or []
        # One of a single letter cannot be broken, nor is it something that a text spells by
        # mistake.
        tokens = sorted(
            {e["content"] for e in entries if e.get("special") and len(e["content"]) > 1},
            key=len,
            reverse=True,
        )
        if spec.split_special_tokens:
            tokens = []  # then they are plain text anyway
        self._search = re.compile("|".join(map(re.escape, tokens)) or r"(?!)").search
        self._sub = re.compile(
            "|".join(f"(?<={re.escape(t[0])}){re.escape(t[1:])}" for t in tokens) or r"(?!)"
        ).sub
        pairs = {token[:2] for token in tokens}
        self._tokens = tokens
        # A look for a short text is some forty times faster than one by an expression; with many of
        # them, one letter each does.
        self._starts = tuple(sorted(pairs if len(pairs) <= 3 else {pair[:1] for pair in pairs}))

    def may_be_in(self, data: ByteSearcher) -> bool:
        """Whether lines of JSON may hold one; most do not, and then no text of theirs needs a
        look."""
        return data.may_contain(self._tokens)

    def is_in(self, text: str) -> bool:
        """Whether a text spells one."""
        return any(start in text for start in self._starts) and self._search(text) is not None

    def any_in(self, value: Any) -> bool:
        """Whether any text in plain JSON data spells one."""
        if isinstance(value, str):
            return self.is_in(value)
        if isinstance(value, dict):
            return any(map(self.any_in, value.values()))
        return isinstance(value, list) and any(map(self.any_in, value))

    def marked(self, value: Any, mark: str) -> Any:
        """The same plain JSON data with `mark` after the first character of each special token in
        its texts."""
        if isinstance(value, str):
            return (
                self._sub(lambda found: mark + found.group(), value) if self.is_in(value) else value
            )
        if isinstance(value, dict):
            return {key: self.marked(item, mark) for key, item in value.items()}
        return [self.marked(item, mark) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class EscapedText:
    """A text with marks in it. `clean` is the text that is meant, `place` a place in it."""

    text: str
    mark: str

    @property
    def clean(self) -> str:
        """The text without its marks."""
        return self.text.replace(self.mark, "")

    def place(self, position: int) -> int:
        """Where a position of the marked text is in the clean one."""
        return position - self.text.count(self.mark, 0, position)


class EscapedEncoder:
    """Encodes marked texts. Slow, for the few that need it."""

    _ANCHOR = "\U0010fffa\U0010fff9"

    def __init__(self, spec: TokenizerSpec) -> None:
        self._spec = spec

    @cached_property
    def _whole(self) -> Any:
        import tokenizers

        return tokenizers.Tokenizer.from_buffer(self._spec.json)

    @cached_property
    def _plain(self) -> Any:
        """Recognises no special token but a new one, after which a stretch is not the first of its
        text."""
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_buffer(self._spec.json)
        tokenizer.add_tokens([tokenizers.AddedToken(self._ANCHOR, normalized=False, special=False)])
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(
            entry["id"] for entry in self._spec.part("added_tokens") or [] if entry.get("special")
        )

    def encode(self, marked: EscapedText) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a marked text, and the characters of the clean text that each stands for."""
        whole = self._whole.encode(marked.text, add_special_tokens=False)
        ids: list[int] = []
        chars: list[tuple[int, int]] = []
        stretch: list[int] = []
        begin = 0
        for number, token in enumerate([*whole.ids, -1]):
            if token != -1 and token not in self._special:
                stretch.append(number)
                continue
            first, last = (len(marked.text),) * 2 if token == -1 else whole.offsets[number]
            found = self._stretch(marked, begin, first, whole, stretch)
            ids += found[0]
            chars += found[1]
            if token != -1:
                ids.append(token)
                chars.append((marked.place(first), marked.place(last)))
            stretch, begin = [], last
        return ids, chars

    def _stretch(
        self, marked: EscapedText, first: int, last: int, whole: Any, numbers: list[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of one stretch between special tokens: those of the whole, or where there is a
        mark in it, its own."""
        text = marked.text[first:last]
        if marked.mark not in text:
            places = [whole.offsets[number] for number in numbers]
            return [whole.ids[number] for number in numbers], [
                (marked.place(a), marked.place(b)) for a, b in places
            ]
        anchor = self._ANCHOR if first else ""
        own = self._plain.encode(anchor + text.replace(marked.mark, ""), add_special_tokens=False)
        skip, shift = (1 if anchor else 0), marked.place(first) - len(anchor)
        return own.ids[skip:], [(a + shift, b + shift) for a, b in own.offsets[skip:]]


def with_replaced(
    tokens: Tokens,
    chars: NDArray[np.int64] | None,
    new: dict[int, tuple[Sequence[int], Sequence[tuple[int, int]]]],
) -> tuple[Tokens, NDArray[np.int64] | None]:
    """Tokens, and their characters if given, in which the texts of `new` have those ids and
    characters."""
    own = sorted(new)
    replaced = flat_tokens([np.array(new[number][0], np.int32) for number in own])
    if chars is not None:
        places = {k: np.array(new[k][1], np.int64).reshape(-1, 2) for k in own}
        chars = replace_segments(chars, tokens.offsets, places)
    return tokens.replace(own, replaced), chars

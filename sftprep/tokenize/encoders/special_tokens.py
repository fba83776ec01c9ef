"""Special tokens in the text of a record, and their encoding as plain text.

A record may contain the string `<|im_end|>`, which must not end a turn. The algorithm:

1. `SpecialTokenScanner.insert_marks` puts a mark after the first character of each such string
   (`<` mark `|im_end|>`), before a chat template sees it. After rendering, the special tokens that
   the template wrote can thus be distinguished from those in the text of the record.
2. `EscapedEncoder` encodes the marked string as it is, which finds the tokens of the template.
3. Each stretch between those tokens that contains a mark is encoded again, without the mark, by a
   tokenizer that recognizes no special token.

Cost: two encodings of the strings that contain special tokens, which are few. Reference:
`tokenizers` with `encode_special_tokens`, on strings without a template
(tests/semantics/test_special.py).
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
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
"""Private-use characters; the first one that a record does not contain is its mark."""


class SpecialTokenScanner:
    """A search for the special tokens of a tokenizer in strings.

    Args:
        spec: The tokenizer.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        entries = spec.part("added_tokens") or []
        # A token of a single character cannot be broken by a mark, nor is it likely that a text
        # contains it by mistake. Longer tokens come first, so that the longest match wins.
        tokens = sorted(
            {e["content"] for e in entries if e.get("special") and len(e["content"]) > 1},
            key=len,
            reverse=True,
        )
        if spec.split_special_tokens:
            tokens = []  # the tokenizer encodes them as plain text anyway
        self._search = re.compile("|".join(map(re.escape, tokens)) or r"(?!)").search
        # Matches a token without its first character, so that a substitution inserts the mark.
        self._sub = re.compile(
            "|".join(f"(?<={re.escape(t[0])}){re.escape(t[1:])}" for t in tokens) or r"(?!)"
        ).sub
        self._tokens = tokens
        # Searching a short string is about forty times as fast as a regular expression. More than
        # three pairs of characters are replaced by the few characters that they start with.
        pairs = {token[:2] for token in tokens}
        self._starts = tuple(sorted(pairs if len(pairs) <= 3 else {pair[:1] for pair in pairs}))

    def find_lines(self, data: ByteSearcher) -> Container[int]:
        """Return the numbers of the lines of JSON that may contain a special token.

        Strings of other lines need not be searched. Parts of a content, which are joined, may
        contain a token together.
        """
        return data.find_lines(self._tokens)

    def is_in(self, text: str) -> bool:
        """Return whether a string contains a special token."""
        return any(start in text for start in self._starts) and self._search(text) is not None

    def any_in(self, value: Any) -> bool:
        """Return whether any string or key in JSON values contains a special token."""
        if isinstance(value, str):
            return self.is_in(value)
        if isinstance(value, dict):
            return any(map(self.any_in, value)) or any(map(self.any_in, value.values()))
        return isinstance(value, list) and any(map(self.any_in, value))

    def insert_marks(self, value: Any, mark: str) -> Any:
        """Return JSON values with a mark after the first character of each special token."""
        if isinstance(value, str):
            return (
                self._sub(lambda match: mark + match.group(), value) if self.is_in(value) else value
            )
        if isinstance(value, dict):
            return {
                self.insert_marks(key, mark): self.insert_marks(item, mark)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.insert_marks(item, mark) for item in value]
        return value


@dataclass(frozen=True, slots=True)
class EscapedText:
    """A string with marks.

    Example:
        EscapedText("a<^|im_end|>", mark="^"):  clean = "a<|im_end|>", clean_offset(3) = 2
    """

    text: str
    mark: str

    @property
    def clean(self) -> str:
        """Return the string without its marks."""
        return self.text.replace(self.mark, "")

    def clean_offset(self, offset: int) -> int:
        """Return the offset in `clean` for an offset in the marked string."""
        return offset - self.text.count(self.mark, 0, offset)


class EscapedEncoder:
    """The encoder of marked strings.

    It is slow, and meant for the few that need it.

    Args:
        spec: The tokenizer.
    """

    _ANCHOR = "\U0010fffa\U0010fff9"  # an added token of `_plain`, see there

    def __init__(self, spec: TokenizerSpec) -> None:
        self._spec = spec

    @cached_property
    def _whole(self) -> Any:
        """Return the unmodified tokenizer, with recognition of special tokens."""
        import tokenizers

        return tokenizers.Tokenizer.from_buffer(self._spec.json)

    @cached_property
    def _plain(self) -> Any:
        """Return the tokenizer without special tokens, except for the anchor.

        A tokenizer may treat the start of a string differently, for example by adding a space. With
        the anchor before it, a stretch is encoded like one that follows another token.
        """
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_buffer(self._spec.json)
        tokenizer.add_tokens([tokenizers.AddedToken(self._ANCHOR, normalized=False, special=False)])
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(
            entry["id"] for entry in self._spec.part("added_tokens") or [] if entry.get("special")
        )

    def encode(self, escaped_text: EscapedText) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a marked string, and their characters in `clean`."""
        whole = self._whole.encode(escaped_text.text, add_special_tokens=False)
        ids: list[int] = []
        chars: list[tuple[int, int]] = []
        stretch: list[int] = []  # indices of tokens since the last special token
        begin = 0  # offset of the stretch in the marked string
        # The -1 at the end closes the last stretch.
        for index, token in enumerate([*whole.ids, -1]):
            if token != -1 and token not in self._special_ids:
                stretch.append(index)
                continue
            first, last = (len(escaped_text.text),) * 2 if token == -1 else whole.offsets[index]
            stretch_ids, stretch_chars = self._encode_stretch(
                escaped_text, begin, first, whole, stretch
            )
            ids += stretch_ids
            chars += stretch_chars
            if token != -1:
                ids.append(token)
                chars.append((escaped_text.clean_offset(first), escaped_text.clean_offset(last)))
            stretch, begin = [], last
        return ids, chars

    def _encode_stretch(
        self, escaped_text: EscapedText, first: int, last: int, whole: Any, indices: list[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids and characters of a stretch between special tokens.

        Args:
            escaped_text: The marked string.
            first: Offset of the stretch in it.
            last: Offset of its end.
            whole: The encoding of the marked string.
            indices: Indices of the tokens of the stretch in `whole`, used if it has no mark.
        """
        text = escaped_text.text[first:last]
        if escaped_text.mark not in text:
            offsets = [whole.offsets[index] for index in indices]
            return [whole.ids[index] for index in indices], [
                (escaped_text.clean_offset(a), escaped_text.clean_offset(b)) for a, b in offsets
            ]
        anchor = self._ANCHOR if first else ""
        plain = self._plain.encode(
            anchor + text.replace(escaped_text.mark, ""), add_special_tokens=False
        )
        # Without the token of the anchor, and with offsets relative to `clean`.
        skip, shift = (1 if anchor else 0), escaped_text.clean_offset(first) - len(anchor)
        return plain.ids[skip:], [(a + shift, b + shift) for a, b in plain.offsets[skip:]]


def replace_texts(
    tokens: Tokens,
    chars: NDArray[np.int64] | None,
    new: dict[int, tuple[Sequence[int], Sequence[tuple[int, int]]]],
) -> tuple[Tokens, NDArray[np.int64] | None]:
    """Replace the tokens of some strings, and their ranges of characters.

    Args:
        tokens: The tokens of all strings.
        chars: int64 [tokens, 2], or None if the ranges are not needed.
        new: Index of a string -> its new ids, and their ranges of characters.
    """
    indices = sorted(new)
    replaced = flat_tokens([np.array(new[index][0], np.int32) for index in indices])
    if chars is not None:
        ranges = {k: np.array(new[k][1], np.int64).reshape(-1, 2) for k in indices}
        chars = replace_segments(chars, tokens.offsets, ranges)
    return tokens.replace(indices, replaced), chars

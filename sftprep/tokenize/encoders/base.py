"""Ids of many texts in flat arrays (`Tokens`), what makes them (`Encoder`), and where two of those
do not agree (`Mismatch`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import replace_segments, to_offsets


@dataclass(slots=True)
class Tokens:
    """Ids of several texts, flat.

    input_ids: int32 [tokens]; offsets: int64 [texts + 1], text k is input_ids[offsets[k]:offsets[k
    + 1]]; altered: numbers of the texts that the tokenizer's normalizer changed.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    altered: Sequence[int] = ()

    def of(self, text: int) -> NDArray[np.int32]:
        """The ids of one text: a view."""
        return self.input_ids[self.offsets[text] : self.offsets[text + 1]]

    def take(self, numbers: Sequence[int]) -> Tokens:
        """The texts of these numbers."""
        return flat_tokens([self.of(number) for number in numbers])

    def replace(self, numbers: Sequence[int], new: Tokens) -> Tokens:
        """The same texts, but for some of them, in order, those of `new`."""
        lengths = np.diff(self.offsets)
        lengths[list(numbers)] = np.diff(new.offsets)
        own = {number: new.of(index) for index, number in enumerate(numbers)}
        return Tokens(replace_segments(self.input_ids, self.offsets, own), to_offsets(lengths))


class Encoder(Protocol):
    """Texts to ids. Nothing is put around a text; tokens that it spells out are recognised, as
    transformers does by default.

    All raise TokenizerError for a text that is no Unicode (half of a surrogate pair), and
    EncoderFault where the encoder is found to be wrong or breaks down: then the caller goes over to
    `tokenizers`.
    """

    name: str

    @property
    def version(self) -> str:
        """Of the library."""

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Ids of each text."""

    def token_chars(self, texts: Sequence[str], tokens: Tokens) -> NDArray[np.int64]:
        """First and last+1 character of each token in its text: int64 [tokens, 2]. `tokens` is what
        `encode(texts)` gave.

        Exactly the offsets of `tokenizers`: a token that holds a part of a character covers the
        whole of it.
        """

    def encode_with_chars(self, texts: Sequence[str]) -> tuple[Tokens, NDArray[np.int64]]:
        """`encode` and `token_chars` at once, which with `tokenizers` takes half the time."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A text that two encoders do not agree on.

    text: the text, or 200 characters of it around the first difference; token: number of the first
    differing token; expected, got: up to 8 ids from there, of `tokenizers` and of the other one.
    """

    text: str
    token: int
    expected: tuple[int, ...]
    got: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.text!r}: from token {self.token} on {list(self.got)}, not {list(self.expected)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "text": self.text,
            "token": self.token,
            "expected": list(self.expected),
            "got": list(self.got),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Mismatch:
        """The inverse of `to_dict`."""
        return cls(values["text"], values["token"], tuple(values["expected"]), tuple(values["got"]))


class EncoderFault(Exception):
    """The fast encoder gave other ids than `tokenizers`, or broke down. No user sees it: the build
    goes on with `tokenizers`."""

    def __init__(self, reason: str, mismatch: Mismatch | None = None) -> None:
        super().__init__(reason, mismatch)
        self.reason, self.mismatch = reason, mismatch

    def __str__(self) -> str:
        return f"{self.reason}: {self.mismatch}" if self.mismatch else self.reason


def flat_tokens(parts: Sequence[NDArray[Any]]) -> Tokens:
    """One array of ids a text (4-byte integers), as Tokens."""
    flat = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return Tokens(
        flat.view(np.int32), to_offsets(np.fromiter(map(len, parts), np.int64, len(parts)))
    )


def first_mismatch(texts: Sequence[str], expected: Tokens, got: Tokens) -> Mismatch | None:
    """The first text whose ids differ."""
    if np.array_equal(expected.offsets, got.offsets) and np.array_equal(
        expected.input_ids, got.input_ids
    ):
        return None
    for number, text in enumerate(texts):
        want, have = expected.of(number), got.of(number)
        if not np.array_equal(want, have):
            shared = min(len(want), len(have))
            differing = np.flatnonzero(want[:shared] != have[:shared])
            token = int(differing[0]) if len(differing) else shared
            # Where in the text that is nobody knows exactly; a token's share of the characters is
            # near enough for an excerpt.
            near = int(len(text) * token / max(len(want), 1))
            excerpt = text if len(text) <= 200 else text[max(near - 100, 0) : near + 100]
            return Mismatch(
                excerpt,
                token,
                tuple(want[token : token + 8].tolist()),
                tuple(have[token : token + 8].tolist()),
            )
    return None

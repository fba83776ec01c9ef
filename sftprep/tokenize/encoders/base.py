"""The interface of encoders, and the types of their results and failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import replace_segments, to_offsets


@dataclass(slots=True)
class Tokens:
    """The token ids of several strings in one flat array.

    Example:
        The strings "ab" and "c" with the ids [5, 6] and [7]:
        input_ids = [5, 6, 7], offsets = [0, 2, 3]
    """

    input_ids: NDArray[np.int32]  # [tokens]
    # [strings + 1]; string k has input_ids[offsets[k] : offsets[k + 1]]
    offsets: NDArray[np.int64]
    altered_texts: Sequence[int] = ()  # indices of strings that the normalizer may have changed

    def ids_of_text(self, index: int) -> NDArray[np.int32]:
        """Return the ids of one string, a view."""
        return self.input_ids[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: Sequence[int]) -> Tokens:
        """Return the tokens of the strings with these indices, in this order."""
        return flat_tokens([self.ids_of_text(index) for index in indices])

    def replace(self, indices: Sequence[int], new: Tokens) -> Tokens:
        """Return the same tokens with those of some strings replaced.

        Args:
            indices: Indices of strings of `self`, ascending.
            new: Their new tokens, in the same order.
        """
        lengths = np.diff(self.offsets)
        lengths[list(indices)] = np.diff(new.offsets)
        segments = {index: new.ids_of_text(k) for k, index in enumerate(indices)}
        return Tokens(replace_segments(self.input_ids, self.offsets, segments), to_offsets(lengths))


class Encoder(Protocol):
    """An encoder from strings to token ids.

    No special tokens are added around a string. Special tokens that a string spells out are
    recognized, as transformers does by default.

    Every method raises TokenizerError for a string that is not valid Unicode (half of a surrogate
    pair), and EncoderFault if the encoder is found to be wrong or fails; the caller then falls back
    to the reference encoder.
    """

    name: str

    @property
    def version(self) -> str:
        """Return the version of the library."""

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Return the ids of each string."""

    def token_chars(self, texts: Sequence[str], tokens: Tokens) -> NDArray[np.int64]:
        """Return the range of characters of each token.

        These are exactly the offsets of `tokenizers`: a token with a part of a character covers the
        whole character.

        Args:
            texts: The strings.
            tokens: The result of `encode(texts)`.

        Returns:
            int64 [tokens, 2]: the first character in its string, and the one after the last.
        """

    def encode_with_chars(self, texts: Sequence[str]) -> tuple[Tokens, NDArray[np.int64]]:
        """Return the results of `encode` and `token_chars`.

        With `tokenizers` this takes half the time of two calls.
        """


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A string with different tokens from two encoders."""

    text: str  # the string, or 200 characters of it around the first difference
    token: int  # index of the first token that differs
    expected: tuple[int, ...]  # up to 8 ids of the reference encoder from there
    got: tuple[int, ...]  # up to 8 ids of the other encoder from there

    def __str__(self) -> str:
        return (
            f"{self.text!r}: from token {self.token} on {list(self.got)}, not {list(self.expected)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "text": self.text,
            "token": self.token,
            "expected": list(self.expected),
            "got": list(self.got),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Mismatch:
        """Return the object for these JSON values; inverse of `to_dict`."""
        return cls(values["text"], values["token"], tuple(values["expected"]), tuple(values["got"]))


class EncoderFault(Exception):
    """A failure of the fast encoder, or ids other than the reference encoder's.

    It is caught before it reaches a user: the build continues with the reference encoder.
    """

    def __init__(self, reason: str, mismatch: Mismatch | None = None) -> None:
        super().__init__(reason, mismatch)
        self.reason, self.mismatch = reason, mismatch

    def __str__(self) -> str:
        return f"{self.reason}: {self.mismatch}" if self.mismatch else self.reason


def flat_tokens(parts: Sequence[NDArray[Any]]) -> Tokens:
    """Return arrays of ids, one per string, as Tokens.

    Args:
        parts: int32 or uint32 arrays; the bits are reinterpreted and not converted.
    """
    flat = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return Tokens(
        flat.view(np.int32), to_offsets(np.fromiter(map(len, parts), np.int64, len(parts)))
    )


def first_mismatch(texts: Sequence[str], expected: Tokens, got: Tokens) -> Mismatch | None:
    """Return the first string with different ids, or None if all are equal."""
    if np.array_equal(expected.offsets, got.offsets) and np.array_equal(
        expected.input_ids, got.input_ids
    ):
        return None
    for index, text in enumerate(texts):
        want, have = expected.ids_of_text(index), got.ids_of_text(index)
        if not np.array_equal(want, have):
            shared = min(len(want), len(have))
            differing = np.flatnonzero(want[:shared] != have[:shared])
            token = int(differing[0]) if len(differing) else shared
            # The character offset of the token is not known here; assuming that all tokens have
            # equal lengths is accurate enough for an excerpt.
            middle = int(len(text) * token / max(len(want), 1))
            excerpt = text if len(text) <= 200 else text[max(middle - 100, 0) : middle + 100]
            return Mismatch(
                excerpt,
                token,
                tuple(want[token : token + 8].tolist()),
                tuple(have[token : token + 8].tolist()),
            )
    return None

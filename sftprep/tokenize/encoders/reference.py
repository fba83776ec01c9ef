"""The reference encoder: `tokenizers`, as used in training and serving."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.chunking import in_groups
from sftprep.core.ragged import to_offsets
from sftprep.errors import TokenizerError
from sftprep.tokenize.encoders.base import EncoderFault, Tokens, first_mismatch
from sftprep.tokenize.encoders.unicode_safe import changed_texts
from sftprep.tokenize.loading.spec import TokenizerSpec

# Strings are passed to the library in groups of about this many characters, because it holds about
# 100 bytes per token until they are copied out.
_BATCH_CHARACTERS = 1 << 20


class HfEncoder:
    """The `tokenizers` encoder.

    The environment variable TOKENIZERS_PARALLELISM keeps its meaning, and is neither read nor set
    here.

    Args:
        spec: The tokenizer.
        threads: Whether to use the thread pool of the library; otherwise strings are encoded one
            after the other on the calling thread.

    Raises:
        TokenizerError: The library does not load the tokenizer.
    """

    name = "tokenizers"

    def __init__(self, spec: TokenizerSpec, *, threads: bool) -> None:
        import tokenizers

        self.version = str(tokenizers.__version__)
        self._threads = threads
        self._normalizes = bool(spec.part("normalizer"))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(spec.json)
        except Exception as error:  # the Rust bindings raise Exception itself
            raise TokenizerError(
                f"tokenizers {self.version} cannot load {spec.name}: {error}",
                remedy=(
                    "install the version of tokenizers that wrote its tokenizer.json, or a"
                    " later one"
                ),
            ) from error
        self._tokenizer.encode_special_tokens = spec.split_special_tokens

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Return the ids of each string."""
        lengths: list[int] = []
        ids: list[NDArray[np.int32]] = []
        for group in in_groups(texts, _BATCH_CHARACTERS):
            encodings = self._encode_group(group, offsets=False)
            lengths.extend(map(len, encodings))
            ids.append(_to_array((e.ids for e in encodings), np.int32, sum(map(len, encodings))))
        altered_texts: list[int] = []
        if self._normalizes:
            unsafe, denormalized = changed_texts(texts, [text.encode() for text in texts])
            altered_texts = sorted({*unsafe, *denormalized})
        return Tokens(
            _concatenate(ids, np.int32), to_offsets(np.array(lengths, np.int64)), altered_texts
        )

    def token_chars(self, texts: Sequence[str], tokens: Tokens) -> NDArray[np.int64]:
        """Return the range of characters of each token, int64 [tokens, 2].

        The strings are encoded again; `encode_with_chars` avoids that.

        Raises:
            EncoderFault: `tokens` differ from what this encoder gives.
        """
        own_tokens, chars = self.encode_with_chars(texts)
        mismatch = first_mismatch(texts, own_tokens, tokens)
        if mismatch:
            raise EncoderFault("ids that tokenizers does not give", mismatch)
        return chars

    def encode_with_chars(self, texts: Sequence[str]) -> tuple[Tokens, NDArray[np.int64]]:
        """Return the ids and the ranges of characters with a single encoding."""
        lengths: list[int] = []
        ids: list[NDArray[np.int32]] = []
        chars: list[NDArray[np.int64]] = []
        for group in in_groups(texts, _BATCH_CHARACTERS):
            encodings = self._encode_group(group, offsets=True)
            total = sum(map(len, encodings))
            lengths.extend(map(len, encodings))
            ids.append(_to_array((e.ids for e in encodings), np.int32, total))
            chars.append(
                _to_array((chain.from_iterable(e.offsets) for e in encodings), np.int64, 2 * total)
            )
        tokens = Tokens(_concatenate(ids, np.int32), to_offsets(np.array(lengths, np.int64)))
        return tokens, _concatenate(chars, np.int64).reshape(-1, 2)

    def _encode_group(self, texts: list[str], *, offsets: bool) -> list[Any]:
        try:
            if not self._threads:
                return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
            # encode_batch_fast does not compute offsets.
            encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
            return list(encode(texts, add_special_tokens=False))
        except (TypeError, UnicodeEncodeError) as error:
            raise not_unicode(texts, error) from error


def not_unicode(texts: Sequence[str], error: Exception) -> TokenizerError:
    """Return the error for strings rejected by an encoder.

    Args:
        texts: The strings, one of which may contain half of a surrogate pair.
        error: What the encoder raised, shown if no string explains it.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as cause:
            excerpt = text[max(cause.start - 20, 0) : cause.start + 20]
            return TokenizerError(
                f"a text holds half of a surrogate pair at character {cause.start}: {excerpt!r}",
                remedy=(
                    "such a text is not valid Unicode: repair the escapes (\\ud83d without its"
                    " second half) in the input"
                ),
            )
    return TokenizerError(f"the texts cannot be encoded: {error}", remedy="pass a list of str")


def _to_array(parts: Iterable[Iterable[int]], dtype: Any, count: int) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(parts), dtype, count)


def _concatenate(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)

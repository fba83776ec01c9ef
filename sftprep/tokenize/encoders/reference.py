"""The reference encoder: `tokenizers`, the library whose ids people train with."""

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

_BATCH_CHARACTERS = 1 << 20
"""Texts are given to the library in groups of about this size: it keeps some 100 bytes a token
until they are copied out."""


class HfEncoder:
    """`tokenizers` on a spec. threads: whether its thread pool is used; without, texts are encoded
    one by one on this thread.

    The library's own variable TOKENIZERS_PARALLELISM keeps its meaning and is neither read nor set
    here. Raises TokenizerError where the library does not accept the spec's JSON.
    """

    name = "tokenizers"

    def __init__(self, spec: TokenizerSpec, *, threads: bool) -> None:
        import tokenizers

        self.version = str(tokenizers.__version__)
        self._threads = threads
        self._normalizes = bool(spec.part("normalizer"))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(spec.json)
        except Exception as error:  # the bindings raise the bare class
            raise TokenizerError(
                f"tokenizers {self.version} cannot load {spec.name}: {error}",
                remedy=(
                    "install the version of tokenizers that wrote its tokenizer.json, or a"
                    " later one"
                ),
            ) from error
        self._tokenizer.encode_special_tokens = spec.split_special_tokens

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Ids of each text."""
        lengths: list[int] = []
        ids: list[NDArray[np.int32]] = []
        for group in in_groups(texts, _BATCH_CHARACTERS):
            encodings = self._encodings(group, offsets=False)
            lengths.extend(map(len, encodings))
            ids.append(_integers((e.ids for e in encodings), np.int32, sum(map(len, encodings))))
        changed: list[int] = []
        if self._normalizes:
            unsettled, altered = changed_texts(texts, [text.encode() for text in texts])
            changed = sorted({*unsettled, *altered})
        return Tokens(_joined(ids, np.int32), to_offsets(np.array(lengths, np.int64)), changed)

    def token_chars(self, texts: Sequence[str], tokens: Tokens) -> NDArray[np.int64]:
        """First and last+1 character of each token: int64 [tokens, 2]. Encodes again; see
        `encode_with_chars`."""
        again, chars = self.encode_with_chars(texts)
        mismatch = first_mismatch(texts, again, tokens)
        if mismatch:
            raise EncoderFault("ids that tokenizers does not give", mismatch)
        return chars

    def encode_with_chars(self, texts: Sequence[str]) -> tuple[Tokens, NDArray[np.int64]]:
        """Ids and character ranges, in one go."""
        lengths: list[int] = []
        ids: list[NDArray[np.int32]] = []
        chars: list[NDArray[np.int64]] = []
        for group in in_groups(texts, _BATCH_CHARACTERS):
            encodings = self._encodings(group, offsets=True)
            total = sum(map(len, encodings))
            lengths.extend(map(len, encodings))
            ids.append(_integers((e.ids for e in encodings), np.int32, total))
            chars.append(
                _integers((chain.from_iterable(e.offsets) for e in encodings), np.int64, 2 * total)
            )
        return Tokens(_joined(ids, np.int32), to_offsets(np.array(lengths, np.int64))), _joined(
            chars, np.int64
        ).reshape(-1, 2)

    def _encodings(self, texts: list[str], *, offsets: bool) -> list[Any]:
        try:
            if not self._threads:
                return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
            encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
            return list(encode(texts, add_special_tokens=False))
        except (TypeError, UnicodeEncodeError) as error:
            raise not_unicode(texts, error) from error


def not_unicode(texts: Sequence[str], error: Exception) -> TokenizerError:
    """The error for texts that an encoder refuses; `error` itself where the texts are not to
    blame."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as cause:
            excerpt = text[max(cause.start - 20, 0) : cause.start + 20]
            return TokenizerError(
                f"a text holds half of a surrogate pair at character {cause.start}: {excerpt!r}",
                remedy=(
                    "such a text is no Unicode: repair the escapes (\\ud83d without its second"
                    " half) in the input"
                ),
            )
    return TokenizerError(f"the texts cannot be encoded: {error}", remedy="give a list of str")


def _integers(parts: Iterable[Iterable[int]], dtype: Any, count: int) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(parts), dtype, count)


def _joined(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)

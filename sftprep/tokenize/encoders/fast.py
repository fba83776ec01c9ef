"""The common part of the fast encoders.

A library that is faster than `tokenizers` encodes all strings, with two exceptions that the
reference encoder takes over:

- strings with characters on which the Unicode tables of the libraries may differ (unicode_safe.py);
- ranges of characters that the bytes of the tokens do not determine (char_offsets.py).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sftprep.core.versions import version_of
from sftprep.errors import first_line
from sftprep.tokenize.encoders.base import Encoder, EncoderFault, Tokens
from sftprep.tokenize.encoders.char_offsets import (
    Family,
    TokenBytes,
    byte_family,
    char_ranges,
    token_bytes,
)
from sftprep.tokenize.encoders.reference import not_unicode
from sftprep.tokenize.encoders.unicode_safe import changed_texts
from sftprep.tokenize.loading.spec import TokenizerSpec

T = TypeVar("T")

_FEW_TOKENS = 1 << 16  # up to this many tokens are decoded one by one


class FastEncoder(ABC):
    """An encoder that a library faster than `tokenizers` provides.

    Args:
        spec: The tokenizer.
        reference: Returns the reference encoder; called when it is needed.
    """

    name: str
    """A key of `ENCODERS`, which is also the name of the package."""

    def __init__(self, spec: TokenizerSpec, *, reference: Callable[[], Encoder]) -> None:
        self._spec, self._reference = spec, reference
        self._table: TokenBytes | None = None  # the bytes of all tokens, made when needed
        self._is_table_made = False  # also True if no table is possible
        self._is_first_call_done = False

    @abstractmethod
    def _encode_all(
        self, texts: Sequence[str], encoded: list[bytes], denormalized: Sequence[int]
    ) -> Tokens:
        """Return the ids of strings, all of them from the library.

        Args:
            texts: The strings.
            encoded: The same strings in UTF-8; may be modified.
            denormalized: Indices of strings that the normalizer changes.
        """

    @abstractmethod
    def _bytes_of(self, ids: Iterable[int] | None) -> dict[int, bytes]:
        """Return the bytes of tokens by id, or those of the whole vocabulary."""

    @cached_property
    def version(self) -> str:
        """Return the version of the library."""
        return version_of(self.name)

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Return the ids of each string."""
        try:
            encoded = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise not_unicode(texts, error) from error
        unsafe, denormalized = changed_texts(texts, encoded)
        denormalized = denormalized if self._normalizes else []
        tokens = self._encode_all(texts, encoded, denormalized)
        if unsafe:  # the Unicode table of the library may differ for these strings
            reference_tokens = self._reference().encode([texts[index] for index in unsafe])
            tokens = tokens.replace(unsafe, reference_tokens)
        altered_texts = sorted({*unsafe, *denormalized}) if self._normalizes else ()
        return Tokens(tokens.input_ids, tokens.offsets, altered_texts)

    def token_chars(self, texts: Sequence[str], tokens: Tokens) -> NDArray[np.int64]:
        """Return the range of characters of each token, int64 [tokens, 2]."""
        table = self._find_token_bytes(tokens.input_ids)
        if table is None:
            return self._reference().token_chars(texts, tokens)
        chars, unknown = char_ranges(texts, tokens, table)
        if unknown:
            is_unknown = np.zeros(len(texts), np.bool_)
            is_unknown[unknown] = True
            chars[np.repeat(is_unknown, np.diff(tokens.offsets))] = self._reference().token_chars(
                [texts[k] for k in unknown], tokens.take(unknown)
            )
        return chars

    def encode_with_chars(self, texts: Sequence[str]) -> tuple[Tokens, NDArray[np.int64]]:
        """Return the results of `encode` and `token_chars`."""
        tokens = self.encode(texts)
        return tokens, self.token_chars(texts, tokens)

    @cached_property
    def _normalizes(self) -> bool:
        return bool(self._spec.part("normalizer"))

    @cached_property
    def _family(self) -> Family | None:
        return byte_family(self._spec)

    def _find_token_bytes(self, ids: NDArray[np.int32]) -> TokenBytes | None:
        """Return a table with at least these tokens, or None.

        None means that the bytes do not determine ranges. The table of all tokens takes 0.1 s. For
        the first call, which may be the only one, few tokens are decoded one by one.
        """
        family = self._family
        if family is None:
            return None
        # Not for SentencePiece, whose decoder drops the first space of a token.
        if not self._is_first_call_done and not family.metaspace and len(ids) <= _FEW_TOKENS:
            self._is_first_call_done = True
            return token_bytes(self._spec, self._bytes_of(np.unique(ids).tolist()))
        if not self._is_table_made:
            self._is_table_made = True
            self._table = token_bytes(self._spec, self._bytes_of(None))
        return self._table


def guard(call: Callable[[], T], action: str = "encode these texts") -> T:
    """Run `call`, and raise EncoderFault if a library fails.

    A panic of Rust code arrives as PanicException, which is a BaseException but not an Exception,
    and which cannot be imported.
    """
    try:
        return call()
    except Exception as error:
        raise EncoderFault(f"it cannot {action}: {first_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise EncoderFault(f"it broke down when asked to {action}: {first_line(error)}") from error


def explain_refusal(spec: TokenizerSpec, refusal: EncoderFault) -> EncoderFault:
    """Return why a library does not load a tokenizer, in words that need no knowledge of it.

    Args:
        spec: The tokenizer.
        refusal: The failure, with the message of the library, which is kept if nothing better is
            known.

    Example:
        it cannot load this tokenizer: unsupported normalizer type: Precompiled
        ->  it does not support the normalizer of this tokenizer (Precompiled)
    """
    unsupported = re.search(r"[Uu]nsupported ([\w-]+) type: (\w+)", refusal.reason)
    model = re.search(rb'"type":\s*"(\w+)"', spec.json[spec.json.index(b'"model":') :])
    kind = model[1].decode() if model else "BPE"
    if kind != "BPE":
        return EncoderFault(f"it encodes only with BPE, and this tokenizer is of the kind {kind}")
    if "byte" in refusal.reason and spec.missing_bytes:
        return EncoderFault(
            "it needs a token for each of the 256 bytes, and the vocabulary lacks"
            f" {len(spec.missing_bytes)} of them"
        )
    if unsupported:
        step = unsupported[1].replace("_", "-")
        return EncoderFault(f"it does not support the {step} of this tokenizer ({unsupported[2]})")
    return refusal

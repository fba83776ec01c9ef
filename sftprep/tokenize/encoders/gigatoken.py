"""The fast encoder: gigatoken, with a fallback where `tokenizers` differs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from sftprep.core.versions import version_of
from sftprep.errors import first_line
from sftprep.tokenize.encoders.base import Encoder, EncoderFault, Tokens, flat_tokens
from sftprep.tokenize.encoders.bpe_ranks import Ranks
from sftprep.tokenize.encoders.char_offsets import (
    Family,
    TokenBytes,
    byte_family,
    char_ranges,
    token_bytes,
)
from sftprep.tokenize.encoders.reference import not_unicode
from sftprep.tokenize.encoders.separators import find_separator
from sftprep.tokenize.encoders.unicode_safe import changed_texts
from sftprep.tokenize.loading.spec import TokenizerSpec

T = TypeVar("T")

# gigatoken 0.10 caches every distinct word without a limit: about 5 bytes per byte of text in which
# all words are new. When the process has grown by this many bytes since the tokenizer was loaded,
# it is loaded again (0.1 to 0.4 s).
_CACHE_BYTES = 256 << 20
# The size of the process is read once per this many bytes of text, in which the cache can grow by
# at most about 300 MB.
_MEMORY_CHECK_BYTES = 64 << 20

_FEW_TOKENS = 1 << 16  # up to this many tokens are decoded one by one


class GigatokenEncoder:
    """The gigatoken encoder.

    The reference encoder encodes strings with characters on which the Unicode tables of the two
    libraries may differ (unicode_safe.py), and computes the ranges of characters that the bytes of
    the tokens do not determine (char_offsets.py).

    Args:
        spec: The tokenizer.
        reference: Returns the reference encoder; called when it is needed.
        ranks: The tokenizer as ranks, which load faster (bpe_ranks.py).

    Raises:
        EncoderFault: gigatoken cannot load the tokenizer.
    """

    name = "gigatoken"

    def __init__(
        self,
        spec: TokenizerSpec,
        *,
        reference: Callable[[], Encoder],
        ranks: Ranks | None = None,
    ) -> None:
        self._spec, self._ranks = spec, ranks
        self._reference = reference
        self._table: TokenBytes | None = None  # the bytes of all tokens, made when needed
        self._is_table_made = False  # also True if no table is possible
        self._is_first_call_done = False
        if spec.split_special_tokens:
            raise EncoderFault(
                "gigatoken always recognises special tokens, and this tokenizer is set not to"
            )
        self._separator = find_separator(spec)
        self._backend: Any = None  # the tokenizer object of gigatoken
        self._bytes_at_load = 0  # memory of the process when the backend was loaded
        self._bytes_since_check = 0  # text encoded since memory was last checked
        self._load()

    @cached_property
    def version(self) -> str:
        """Return the version of gigatoken."""
        return version_of("gigatoken")

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Return the ids of each string."""
        try:
            encoded = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise not_unicode(texts, error) from error
        unsafe, denormalized = changed_texts(texts, encoded)
        denormalized = denormalized if self._normalizes else []
        if self._ranks is not None:  # ranks do not include the normalizer
            for index in denormalized:
                encoded[index] = self._normalize(texts[index]).encode()
        tokens = self._encode_utf8(encoded)
        if unsafe:  # the Unicode table of gigatoken may differ for these strings
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

    def _limit_memory(self, size: int) -> None:
        """Load the backend again if its cache takes too much memory.

        Args:
            size: Bytes of text that are about to be encoded.
        """
        self._bytes_since_check += size
        if self._bytes_since_check > _MEMORY_CHECK_BYTES:
            self._bytes_since_check = 0
            if process_bytes() - self._bytes_at_load > _CACHE_BYTES:
                self._load()

    def _encode_utf8(self, encoded: Sequence[bytes]) -> Tokens:
        """Return the ids of strings in UTF-8, all of them from gigatoken."""
        self._limit_memory(sum(map(len, encoded)))
        encode, separator = self._backend.encode, self._separator
        if separator is None or len(encoded) < 2:
            # Each call costs about a microsecond, which the separator saves.
            return flat_tokens(_guard(lambda: [encode(text) for text in encoded]))

        # Encode all strings in one call, and split the ids at the separators.
        separator_bytes = separator.text.encode()
        ids = _guard(lambda: encode(separator_bytes.join(encoded)))
        is_separator = ids == separator.id
        indices = np.flatnonzero(is_separator)
        if len(indices) == len(encoded) - 1:
            ends = np.append(indices - np.arange(len(indices)), len(ids) - len(indices))
            return Tokens(ids[~is_separator].view(np.int32), np.concatenate(([0], ends)))

        # Strings that contain the separator are encoded one by one, the others again together.
        containing = [index for index, text in enumerate(encoded) if separator_bytes in text]
        if not containing:
            raise EncoderFault(f"gigatoken does not find each {separator.text!r} between texts")
        single = flat_tokens(_guard(lambda: [encode(encoded[index]) for index in containing]))
        others = self._encode_utf8([b"" if separator_bytes in text else text for text in encoded])
        return others.replace(containing, single)

    def _decode(self, ids: NDArray[np.uint32]) -> bytes:
        return bytes(self._backend.decode(ids))

    def _load(self) -> None:
        self._backend = None  # frees the old backend first, so that memory never holds two
        try:
            self._backend = load_gigatoken(self._spec, self._ranks)
        except EncoderFault:
            if self._ranks is None:
                raise
            self._ranks = None
            self._backend = load_gigatoken(self._spec)
        self._bytes_at_load = process_bytes()
        self._bytes_since_check = 0

    @cached_property
    def _split_at_added_tokens(self) -> Callable[[str], list[str]]:
        tokens = sorted(self._spec.added_tokens(), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, tokens)) or '(?!)'})").split

    def _normalize(self, text: str) -> str:
        """Return a string with NFC applied between its added tokens.

        Added tokens are matched before NFC.
        """
        return "".join(normalize("NFC", part) for part in self._split_at_added_tokens(text))

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
            vocabulary = {
                int(token): self._decode(np.array([token], np.uint32)) for token in np.unique(ids)
            }
            return token_bytes(self._spec, vocabulary, self._decode)
        if not self._is_table_made:
            self._is_table_made = True
            self._table = token_bytes(self._spec, self._backend.vocab, self._decode)
        return self._table


def load_gigatoken(spec: TokenizerSpec, ranks: Ranks | None = None) -> Any:
    """Load a tokenizer with gigatoken, and return its tokenizer object.

    Args:
        spec: The tokenizer.
        ranks: The tokenizer as ranks, if it has some.

    Raises:
        EncoderFault: gigatoken is not installed, or does not accept the tokenizer.
    """
    try:
        from gigatoken.gigatoken_rs import BPETokenizer, load_hf_json
    except ImportError as error:
        raise EncoderFault(f"gigatoken is not installed here: {error}") from error
    if ranks is not None:
        return _guard(
            lambda: BPETokenizer.from_tiktoken(str(ranks.path), ranks.scheme, ranks.specials),
            action="load this tokenizer's ranks",
        )
    return _guard(lambda: load_hf_json(spec.json), action="load this tokenizer")


def process_bytes() -> int:
    """Return the memory of this process in bytes.

    It is the resident memory on Linux, the peak on other systems, and 0 on Windows.
    """
    if sys.platform == "win32":
        return 0  # not implemented: the cache of gigatoken is not limited there
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _guard(call: Callable[[], T], action: str = "encode these texts") -> T:
    """Run `call`, and raise EncoderFault if gigatoken fails.

    A panic of its Rust code arrives as PanicException, which is a BaseException but not an
    Exception, and which cannot be imported.
    """
    try:
        return call()
    except Exception as error:
        raise EncoderFault(f"gigatoken cannot {action}: {first_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise EncoderFault(
            f"gigatoken broke down when asked to {action}: {first_line(error)}"
        ) from error

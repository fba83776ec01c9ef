"""The fast encoder: gigatoken, guarded. What it is not known to do like `tokenizers` is given to
`tokenizers`."""

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
from sftprep.tokenize.encoders.separators import between_texts
from sftprep.tokenize.encoders.unicode_safe import changed_texts
from sftprep.tokenize.loading.spec import TokenizerSpec

T = TypeVar("T")

_CACHE_BYTES = 256 << 20
"""gigatoken 0.10 keeps every word it has met, some 5 bytes for each byte of a text of nothing but
new words, without end. Once the process has grown by this much, the tokenizer is loaded anew (0.1
to 0.4 s)."""
_LOOK_EVERY = 64 << 20
"""Bytes of text, about, between two looks at the size of the process: the words in so many take no
more than some 300 MB."""


_FEW_TOKENS = 1 << 16


class FastEncoder:
    """gigatoken on a spec. reference: makes the `tokenizers` encoder, when needed; ranks: the spec
    as ranks, which load faster (bpe_ranks.py).

    Texts with characters newer than the Unicode tables of either library (unicode_safe.py) are
    encoded by the reference, and so are the character ranges that the bytes of the tokens do not
    tell (char_offsets.py). Raises EncoderFault where gigatoken cannot load the spec.
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
        self._table: TokenBytes | None = None
        self._table_tried = self._asked_for_bytes = False
        if spec.split_special_tokens:
            raise EncoderFault(
                "gigatoken always recognises special tokens, and this tokenizer is set not to"
            )
        self._between = between_texts(spec)
        self._backend: Any = None
        self._bytes_at_load = self._since_look = 0
        self._load()

    @cached_property
    def version(self) -> str:
        """Of gigatoken."""
        return version_of("gigatoken")

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Ids of each text."""
        try:
            encoded = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise not_unicode(texts, error) from error
        unsettled, altered = changed_texts(texts, encoded)
        altered = altered if self._normalizes else []
        if self._ranks is not None:  # which do not normalize
            for number in altered:
                encoded[number] = self._normalized(texts[number]).encode()
        tokens = self._encode_utf8(encoded)
        if unsettled:  # gigatoken has another table for them
            own = self._reference().encode([texts[number] for number in unsettled])
            tokens = tokens.replace(unsettled, own)
        changed = sorted({*unsettled, *altered}) if self._normalizes else ()
        return Tokens(tokens.input_ids, tokens.offsets, changed)

    def token_chars(self, texts: Sequence[str], tokens: Tokens) -> NDArray[np.int64]:
        """First and last+1 character of each token: int64 [tokens, 2]."""
        table = self._token_bytes(tokens.input_ids)
        if table is None:
            return self._reference().token_chars(texts, tokens)
        chars, unknown = char_ranges(texts, tokens, table)
        if unknown:
            rows = np.zeros(len(texts), np.bool_)
            rows[unknown] = True
            chars[np.repeat(rows, np.diff(tokens.offsets))] = self._reference().token_chars(
                [texts[k] for k in unknown], tokens.take(unknown)
            )
        return chars

    def encode_with_chars(self, texts: Sequence[str]) -> tuple[Tokens, NDArray[np.int64]]:
        """`encode`, then `token_chars`."""
        tokens = self.encode(texts)
        return tokens, self.token_chars(texts, tokens)

    @cached_property
    def _normalizes(self) -> bool:
        return bool(self._spec.part("normalizer"))

    def _make_room(self, size: int) -> None:
        """Load anew before so many more bytes, where what was met so far takes too much memory."""
        self._since_look += size
        if self._since_look > _LOOK_EVERY:
            self._since_look = 0
            if process_bytes() - self._bytes_at_load > _CACHE_BYTES:
                self._load()

    def _encode_utf8(self, encoded: Sequence[bytes]) -> Tokens:
        """Ids of texts that contain nothing to be encoded by somebody else."""
        self._make_room(sum(map(len, encoded)))
        encode, between = self._backend.encode, self._between
        if between is None or len(encoded) < 2:
            # One call for each text costs a microsecond.
            return flat_tokens(_guarded(lambda: [encode(text) for text in encoded]))
        separator = between.text.encode()
        ids = _guarded(lambda: encode(separator.join(encoded)))
        apart = ids == between.id
        places = np.flatnonzero(apart)
        if len(places) == len(encoded) - 1:
            ends = np.append(places - np.arange(len(places)), len(ids) - len(places))
            return Tokens(ids[~apart].view(np.int32), np.concatenate(([0], ends)))
        spelled = [number for number, text in enumerate(encoded) if separator in text]
        if not spelled:
            raise EncoderFault(f"gigatoken does not find each {between.text!r} between texts")
        own = flat_tokens(_guarded(lambda: [encode(encoded[number]) for number in spelled]))
        others = self._encode_utf8([b"" if separator in text else text for text in encoded])
        return others.replace(spelled, own)

    def _decode(self, ids: NDArray[np.uint32]) -> bytes:
        return bytes(self._backend.decode(ids))

    def _load(self) -> None:
        self._backend = None  # the old one goes before the new one comes
        try:
            self._backend = load_gigatoken(self._spec, self._ranks)
        except EncoderFault:
            if self._ranks is None:
                raise
            self._ranks = None
            self._backend = load_gigatoken(self._spec)
        self._bytes_at_load = process_bytes()
        self._since_look = 0

    @cached_property
    def _split_added(self) -> Callable[[str], list[str]]:
        tokens = sorted(self._spec.added_tokens(), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, tokens)) or '(?!)'})").split

    def _normalized(self, text: str) -> str:
        """NFC of each part of a text between added tokens, which are found before it is
        normalized."""
        return "".join(normalize("NFC", part) for part in self._split_added(text))

    @cached_property
    def _family(self) -> Family | None:
        return byte_family(self._spec)

    def _token_bytes(self, ids: NDArray[np.int32]) -> TokenBytes | None:
        """The bytes of these tokens at least. The first time, few tokens are looked up one by one:
        the table of all takes a tenth of a second."""
        family = self._family
        if family is None:
            return None
        # Where "▁" is a blank, decoding a token alone drops its first blank.
        if not self._asked_for_bytes and not family.blanks and len(ids) <= _FEW_TOKENS:
            self._asked_for_bytes = True
            used = np.unique(ids)
            known = {int(own): self._decode(np.array([own], np.uint32)) for own in used}
            return token_bytes(self._spec, known, self._decode)
        if not self._table_tried:
            self._table_tried = True
            self._table = token_bytes(self._spec, self._backend.vocab, self._decode)
        return self._table


def load_gigatoken(spec: TokenizerSpec, ranks: Ranks | None = None) -> Any:
    """gigatoken's own tokenizer object. Raises EncoderFault with its reason where it does not take
    this tokenizer."""
    try:
        from gigatoken.gigatoken_rs import BPETokenizer, load_hf_json
    except ImportError as error:
        raise EncoderFault(f"gigatoken is not installed here: {error}") from error
    if ranks is not None:
        return _guarded(
            lambda: BPETokenizer.from_tiktoken(str(ranks.path), ranks.scheme, ranks.specials),
            doing="load this tokenizer's ranks",
        )
    return _guarded(lambda: load_hf_json(spec.json), doing="load this tokenizer")


def process_bytes() -> int:
    """Memory of this process: what is resident now on Linux, the most there ever was elsewhere."""
    if sys.platform == "win32":
        return 0  # not looked at there: gigatoken's cache stays unbounded
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _guarded(call: Callable[[], T], doing: str = "encode these texts") -> T:
    """Run `call`; what goes wrong inside gigatoken becomes an EncoderFault, a panic too (which is
    no Exception in Python)."""
    try:
        return call()
    except Exception as error:
        raise EncoderFault(f"gigatoken cannot {doing}: {first_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise EncoderFault(
            f"gigatoken broke down when asked to {doing}: {first_line(error)}"
        ) from error

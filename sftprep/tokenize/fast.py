"""The fast encoder: gigatoken, guarded. What it is not known to do like `tokenizers` is given to
`tokenizers`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import is_normalized

import numpy as np
from numpy.typing import NDArray

from sftprep.ragged import Pieces, edges
from sftprep.tokenize.between import COMMA, between_texts, may_end, takes_commas
from sftprep.tokenize.chars import TokenBytes, char_ranges, token_bytes
from sftprep.tokenize.hf import not_unicode
from sftprep.tokenize.ranks import Ranks
from sftprep.tokenize.spec import TokenizerSpec
from sftprep.tokenize.tokens import Encoder, EncoderFault, Tokens, flat_tokens
from sftprep.tokenize.unicode14 import unsettled_texts
from sftprep.tokenize.versions import version_of

T = TypeVar("T")

_CACHE_BYTES = 256 << 20
"""gigatoken 0.10 keeps every word it has met, some 5 bytes for each byte of a text of nothing but
new words, without end. Once the process has grown by this much, the tokenizer is loaded anew (0.1
to 0.4 s)."""
_LOOK_EVERY = 64 << 20
"""Bytes of text, about, between two looks at the size of the process: the words in so many take no
more than some 300 MB."""
_THREADS_FROM = 16 << 20
"""Characters in a batch from which on threads are worth importing awkward for (0.2 s), which
gigatoken needs to give a batch."""


class FastEncoder:
    """gigatoken on a spec. threads: whether large batches use all cores; reference: makes the
    `tokenizers` encoder, when needed; ranks: the spec as ranks, which load faster (ranks.py).

    Texts with characters newer than the Unicode tables of either library (unicode14.py) are encoded
    by the reference, and so are the character ranges that the bytes of the tokens do not tell
    (chars.py). Raises EncoderFault where gigatoken cannot load the spec.
    """

    name = "gigatoken"

    def __init__(
        self,
        spec: TokenizerSpec,
        *,
        threads: bool,
        reference: Callable[[], Encoder],
        ranks: Ranks | None = None,
    ) -> None:
        self._spec, self._ranks = spec, ranks
        self._threads = threads
        self._reference = reference
        self._table: TokenBytes | None = None
        self._table_tried = False
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
            unsettled = unsettled_texts(texts)
        except UnicodeEncodeError as error:
            raise not_unicode(texts, error) from error
        if not unsettled:
            return self._encode_settled(texts)
        chosen = np.zeros(len(texts), np.bool_)
        chosen[unsettled] = True
        others = self._encode_settled([texts[k] for k in np.flatnonzero(~chosen).tolist()])
        return _interleaved(chosen, self._reference().encode([texts[k] for k in unsettled]), others)

    def token_chars(self, texts: Sequence[str], tokens: Tokens) -> NDArray[np.int64]:
        """First and last+1 character of each token: int64 [tokens, 2]."""
        table = self._token_bytes()
        if table is None:
            return self._reference().token_chars(texts, tokens)
        chars, unknown = char_ranges(texts, tokens, table)
        if unknown:
            part = flat_tokens([tokens.of(k) for k in unknown])
            rows = np.zeros(len(texts), np.bool_)
            rows[unknown] = True
            chars[np.repeat(rows, np.diff(tokens.offsets))] = self._reference().token_chars(
                [texts[k] for k in unknown], part
            )
        return chars

    def encode_with_chars(self, texts: Sequence[str]) -> tuple[Tokens, NDArray[np.int64]]:
        """`encode`, then `token_chars`."""
        tokens = self.encode(texts)
        return tokens, self.token_chars(texts, tokens)

    def encode_parts(self, joined: str, tokens: int, commas: int) -> Pieces[np.int32] | None:
        """Ids of parts with so many tokens (`between_texts`) and commas between them; None where
        parts need a look each."""
        if not joined.isascii() and (
            unsettled_texts([joined]) or (self._changes and not is_normalized("NFC", joined))
        ):
            return None
        self._make_room(len(joined), ascii_only=joined.isascii())
        return self._divided(joined, tokens, commas)

    @property
    def _changes(self) -> bool:
        """Whether texts would have to be normalized first."""
        return self._ranks is not None and self._ranks.normalizes

    def _make_room(self, size: int, *, ascii_only: bool) -> None:
        """Load anew before so many more characters, where what was met so far takes too much
        memory."""
        self._since_look += size if ascii_only else 3 * size
        if self._since_look > _LOOK_EVERY:
            self._since_look = 0
            if process_bytes() - self._bytes_at_load > _CACHE_BYTES:
                self._load()

    def _encode_settled(self, texts: Sequence[str]) -> Tokens:
        size = sum(map(len, texts))
        ascii_only = all(map(str.isascii, texts))
        if not ascii_only and self._changes:
            changed = np.array(
                [not (text.isascii() or is_normalized("NFC", text)) for text in texts], np.bool_
            )
            if changed.any():
                their, own = (
                    [texts[k] for k in np.flatnonzero(rows).tolist()]
                    for rows in (changed, ~changed)
                )
                return _interleaved(
                    changed, self._normalizing._encode_settled(their), self._encode_settled(own)
                )
        self._make_room(size, ascii_only=ascii_only)
        if self._threads and size >= _THREADS_FROM:
            batch = _guarded(lambda: self._backend.encode_batch(list(texts), parallel=True)).layout
            return Tokens(
                np.asarray(batch.content.data).view(np.int32),
                np.asarray(batch.offsets.data, np.int64),
            )
        encode, between = self._backend.encode, self._between
        if between is not None and len(texts) > 1:
            apart = len(texts) - 1
            if self._comma is not None and all(map(may_end, texts)):
                parts = self._divided(COMMA.join(texts), 0, apart)
            else:
                parts = self._divided(between.text.join(texts), apart, 0)
            if parts is not None:
                joined = parts.joined()
                return Tokens(joined.values, joined.edges)
        # One call a text costs a microsecond and spares the import of awkward; no thread is ever
        # started.
        return flat_tokens(_guarded(lambda: [encode(text) for text in texts]))

    def _divided(self, joined: str, tokens: int, commas: int) -> Pieces[np.int32] | None:
        """The ids of texts that are encoded as one, without those between them; None where a text
        holds one of those too."""
        assert self._between is not None
        ids = _guarded(lambda: self._backend.encode(joined))
        found = ids == self._between.id
        if commas:
            found |= ids == self._comma
        places = np.flatnonzero(found)
        within = (
            (ids[places] == self._comma).view(np.int8) if commas else 0
        )  # a comma has a digit on each side
        if len(places) != tokens + commas or np.count_nonzero(within) != commas:
            return None
        first, last = places + 1 + within, places - within
        return Pieces(ids.view(np.int32), np.concatenate(([0], first)), np.append(last, len(ids)))

    @cached_property
    def _comma(self) -> int | None:
        """The id of the sign in a comma; None where commas change what is beside them."""
        if not takes_commas(self._spec):
            return None
        ids = _guarded(lambda: self._backend.encode(COMMA)).tolist()
        return ids[1] if len(ids) == 3 and ids[0] == ids[2] != ids[1] else None

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
    def _normalizing(self) -> FastEncoder:
        """For the few texts that a normalizer changes, which ranks know nothing of."""
        return FastEncoder(self._spec, threads=self._threads, reference=self._reference)

    def _token_bytes(self) -> TokenBytes | None:
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
        raise EncoderFault(f"gigatoken cannot {doing}: {_first_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise EncoderFault(
            f"gigatoken broke down when asked to {doing}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _interleaved(chosen: NDArray[np.bool_], yes: Tokens, no: Tokens) -> Tokens:
    """Texts of `yes` where `chosen`, of `no` elsewhere, in their order. chosen: bool [texts]."""
    lengths = np.empty(len(chosen), np.int64)
    lengths[chosen], lengths[~chosen] = np.diff(yes.offsets), np.diff(no.offsets)
    offsets = edges(lengths)
    ids = np.empty(int(offsets[-1]), np.int32)
    rows = np.repeat(chosen, lengths)
    ids[rows], ids[~rows] = yes.input_ids, no.input_ids
    return Tokens(ids, offsets)

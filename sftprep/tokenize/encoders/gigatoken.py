"""The fastest encoder: gigatoken."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from sftprep.tokenize.encoders.base import Encoder, EncoderFault, Tokens, flat_tokens
from sftprep.tokenize.encoders.bpe_ranks import Ranks
from sftprep.tokenize.encoders.fast import FastEncoder, explain_refusal, guard
from sftprep.tokenize.encoders.separators import encode_separated, find_separator
from sftprep.tokenize.loading.spec import TokenizerSpec

# gigatoken 0.10 caches every distinct word without a limit: about 5 bytes per byte of text in which
# all words are new. When the process has grown by this many bytes since the tokenizer was loaded,
# it is loaded again (0.1 to 0.4 s).
_CACHE_BYTES = 256 << 20
# The size of the process is read once per this many bytes of text, in which the cache can grow by
# at most about 300 MB.
_MEMORY_CHECK_BYTES = 64 << 20


class GigatokenEncoder(FastEncoder):
    """The gigatoken encoder.

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
        super().__init__(spec, reference=reference)
        self._ranks = ranks
        if spec.split_special_tokens:
            raise EncoderFault(
                "it always recognizes special tokens, and this tokenizer is set not to"
            )
        self._separator = find_separator(spec)
        self._backend: Any = None  # the tokenizer object of gigatoken
        self._bytes_at_load = 0  # memory of the process when the backend was loaded
        self._bytes_since_check = 0  # text encoded since memory was last checked
        self._load()

    def _encode_all(
        self, texts: Sequence[str], encoded: list[bytes], denormalized: Sequence[int]
    ) -> Tokens:
        if self._ranks is not None:  # ranks do not include the normalizer
            for index in denormalized:
                encoded[index] = self._normalize(texts[index]).encode()
        self._limit_memory(sum(map(len, encoded)))
        separator = self._separator
        if separator is None or len(encoded) < 2:
            # Each call costs about a microsecond, which the separator saves.
            return self._encode_singly(encoded)
        mark = separator.text.encode()
        return encode_separated(
            encoded,
            mark,
            separator.id,
            encode=lambda group: self._encode_one(mark.join([*group, b""])),
            encode_singly=self._encode_singly,
        )

    def _encode_one(self, text: bytes) -> NDArray[np.int32]:
        ids: NDArray[np.uint32] = guard(lambda: self._backend.encode(text))
        return ids.view(np.int32)

    def _encode_singly(self, encoded: Sequence[bytes]) -> Tokens:
        return flat_tokens([self._encode_one(text) for text in encoded])

    def _bytes_of(self, ids: Iterable[int] | None) -> dict[int, bytes]:
        if ids is None:
            vocabulary: dict[int, bytes] = self._backend.vocab
            return vocabulary
        decode = self._backend.decode
        return {number: bytes(decode(np.array([number], np.uint32))) for number in ids}

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


def load_gigatoken(spec: TokenizerSpec, ranks: Ranks | None = None) -> Any:
    """Load a tokenizer with gigatoken, and return its tokenizer object.

    Args:
        spec: The tokenizer.
        ranks: The tokenizer as ranks, if it has some.

    Raises:
        EncoderFault: gigatoken cannot be imported, or does not accept the tokenizer.
    """
    try:
        from gigatoken import Tokenizer
    except ImportError as error:
        raise EncoderFault(f"it cannot be imported here: {error}") from error
    if ranks is not None:
        return guard(
            lambda: Tokenizer.from_tiktoken(ranks.path, ranks.scheme, ranks.specials),
            action="load this tokenizer's ranks",
        )
    try:
        return guard(lambda: Tokenizer.from_json(spec.json), action="load this tokenizer")
    except EncoderFault as refusal:
        raise explain_refusal(spec, refusal) from refusal


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

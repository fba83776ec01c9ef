"""The second encoder: fastokens, for tokenizers that gigatoken does not load.

Facts about fastokens 0.3 that this module relies on, or works around:

- A single text of fewer than 64 KiB is encoded on the calling thread. Longer ones, and the texts of
  a batch, are spread over threads, which a process that was forked does not have: with some regular
  expressions it waits for them without end. Such a process encodes short texts one by one, and
  leaves long ones to the reference encoder.
- A byte without a token is dropped with some vocabularies, as by `tokenizers`, and an error with
  others. Texts with such a byte are left to the reference encoder.
- Added tokens that are matched only as whole words, or after normalization, are matched as if they
  were not. Tokenizers with such tokens are refused.
- Its caches of words have a limit: memory stopped growing after 16 MB of words that never recur.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sftprep.core.chunking import in_groups
from sftprep.core.ragged import to_offsets
from sftprep.tokenize.encoders.base import Encoder, EncoderFault, Tokens
from sftprep.tokenize.encoders.bpe_ranks import byte_by_character
from sftprep.tokenize.encoders.fast import FastEncoder, explain_refusal, guard
from sftprep.tokenize.encoders.separators import encode_separated, find_separator
from sftprep.tokenize.loading.spec import TokenizerSpec

_PARALLEL_BYTES = 1 << 16
"""Texts of at least this many bytes are encoded on several threads."""
_GROUP_CHARACTERS = 1 << 14
"""Texts are joined up to about this many characters, which seldom have as many bytes."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class FastokensEncoder(FastEncoder):
    """The fastokens encoder.

    Args:
        spec: The tokenizer.
        reference: Returns the reference encoder; called when it is needed.
        threads: Whether to encode the texts of a batch on several threads.

    Raises:
        EncoderFault: fastokens cannot load the tokenizer.
    """

    name = "fastokens"

    has_threads: ClassVar[bool] = True
    """False in a process that was forked."""

    def __init__(
        self, spec: TokenizerSpec, *, reference: Callable[[], Encoder], threads: bool
    ) -> None:
        super().__init__(spec, reference=reference)
        self._threads = threads
        self._separator = find_separator(spec)
        self._missing_bytes = [bytes([byte]) for byte in spec.missing_bytes]
        self._backend = load_fastokens(spec)

    def _encode_all(
        self, texts: Sequence[str], encoded: list[bytes], denormalized: Sequence[int]
    ) -> Tokens:
        unsupported = self._find_unsupported(encoded)
        if not unsupported:
            return self._encode_supported(texts)
        supported = list(texts)
        for index in unsupported:
            supported[index] = ""
        reference_tokens = self._reference().encode([texts[index] for index in unsupported])
        return self._encode_supported(supported).replace(unsupported, reference_tokens)

    def _find_unsupported(self, encoded: list[bytes]) -> list[int]:
        """Return the indices of texts that fastokens must not, or cannot, encode."""
        joined = b"".join(encoded)
        # Such bytes are rare, so that one search of all texts is usually enough.
        missing = [mark for mark in self._missing_bytes if mark in joined]
        longest = None if self.has_threads else _PARALLEL_BYTES
        if not missing and longest is None:
            return []
        return [
            index
            for index, text in enumerate(encoded)
            if any(mark in text for mark in missing)
            or (longest is not None and len(text) >= longest)
        ]

    def _encode_supported(self, texts: Sequence[str]) -> Tokens:
        separator = self._separator
        if separator is None or len(texts) < 2 or not self.has_threads:
            return self._encode_batch(texts)
        return encode_separated(
            texts,
            separator.text,
            separator.id,
            encode=lambda group: self._encode_joined(group, separator.text),
            encode_singly=self._encode_batch,
        )

    def _encode_joined(self, texts: Sequence[str], separator: str) -> NDArray[np.int32]:
        """Return the ids of texts, each of which is followed by the separator.

        A call for each text would cost as much as 50 more bytes of it.
        """
        groups = in_groups(texts, _GROUP_CHARACTERS)
        return self._encode_batch([separator.join([*group, ""]) for group in groups]).input_ids

    def _encode_batch(self, texts: Sequence[str]) -> Tokens:
        """Return the ids of each text."""
        texts = list(texts)
        batches = [texts] if self._threads and self.has_threads else [[text] for text in texts]
        split = self._spec.split_special_tokens
        encode = self._backend.encode_batch_flat
        # Of each batch the ids, uint32, and the offsets of its texts in them, uint64.
        found: list[tuple[bytes, bytes]] = guard(
            lambda: [encode(batch, split_special_tokens=split) for batch in batches]
        )
        ids = np.frombuffer(b"".join([ids for ids, _ in found]), np.int32)
        lengths = [np.diff(np.frombuffer(offsets, np.int64)) for _, offsets in found]
        return Tokens(ids, to_offsets(np.concatenate([np.empty(0, np.int64), *lengths])))

    def _bytes_of(self, ids: Iterable[int] | None) -> dict[int, bytes]:
        token_of = self._backend.id_to_token
        vocabulary: dict[int, bytes] = {}
        for number in range(self._spec.vocab_size) if ids is None else ids:
            token = token_of(number)
            if token is not None:
                vocabulary[number] = self._to_bytes(number, token)
        return vocabulary

    def _to_bytes(self, number: int, token: str) -> bytes:
        """Return the bytes of a token from the form in which a vocabulary has it."""
        if number in self._added_ids:
            return token.encode()
        if self._family is not None and self._family.metaspace:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.encode()
        return token.translate(_byte_characters()).encode("latin-1", "ignore")

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._spec.added_tokens().values())


def _lose_threads() -> None:
    FastokensEncoder.has_threads = False


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_lose_threads)


@cache
def _byte_characters() -> dict[int, int]:
    """Return the byte of each character of byte-level BPE, for `str.translate`."""
    return {ord(character): byte for character, byte in byte_by_character().items()}


def load_fastokens(spec: TokenizerSpec) -> Any:
    """Load a tokenizer with fastokens, and return its tokenizer object.

    Raises:
        EncoderFault: fastokens cannot be imported, or does not accept the tokenizer.
    """
    try:
        from fastokens import Tokenizer
    except ImportError as error:
        raise EncoderFault(f"it cannot be imported here: {error}") from error
    entries = spec.part("added_tokens") or []
    if any(entry.get("single_word") for entry in entries):
        raise EncoderFault("it does not support added tokens that match only as whole words")
    if spec.steps("normalizer", "normalizers") and any(
        entry.get("normalized") for entry in entries
    ):
        raise EncoderFault("it does not support added tokens that match only normalized text")
    try:
        return guard(
            lambda: Tokenizer.from_json_str(spec.json.decode()), action="load this tokenizer"
        )
    except EncoderFault as refusal:
        raise explain_refusal(spec, refusal) from refusal

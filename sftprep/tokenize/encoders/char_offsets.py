"""Which characters of a text each token stands for, from the bytes of the tokens alone: what
`tokenizers` calls offsets.

The idea: for two families of tokenizers, the bytes of a text's tokens, one after the other, are the
bytes of the text. Then the end of each token is a cumulative sum of lengths, and characters come
from counting the bytes that begin one. It is never assumed: the bytes are compared with the text,
and a text on which they differ (a normalizer changed it, an added token swallowed blanks, unknown
characters were dropped) is left to `tokenizers`.

- byte-level BPE, without a normalizer or with NFC: a token's bytes as they are.
- SentencePiece as BPE with byte fallback: "▁" stands for a blank, and a blank that is not in the
  text is put before the
  text and after each added token: the token that starts there holds one byte less of the text, at
  its front, maybe none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import to_offsets
from sftprep.tokenize.encoders.base import Tokens
from sftprep.tokenize.loading.spec import TokenizerSpec

_BLANK = "▁".encode()
_GROUP_CHARACTERS = 1 << 18
"""Texts are worked on in groups of about this size, whose arrays fit into a processor's cache: some
20 bytes for each byte."""


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The text that each id stands for.

    data: uint8, the bytes of all ids; start, length: int64 [ids], where those of an id lie; added:
    bool [ids], an added token; leads: bool [ids], begins with a blank; prepends: whether a blank is
    put before the text and after added tokens; decode: gives the bytes of uint32 [tokens] as they
    are, one token after the other, faster than a look into `data` does.
    """

    data: NDArray[np.uint8]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    added: NDArray[np.bool_]
    leads: NDArray[np.bool_]
    prepends: bool
    decode: Callable[[NDArray[np.uint32]], bytes] | None = None


def token_bytes(
    spec: TokenizerSpec, vocabulary: dict[int, bytes], decode: Callable[[NDArray[np.uint32]], bytes]
) -> TokenBytes | None:
    """The table for a tokenizer; None where it belongs to neither family.

    vocabulary: bytes of each id, added ones included; decode: ids to bytes, as the vocabulary says.
    """
    family = byte_family(spec)
    if family is None:
        return None
    added_ids = np.array(sorted(spec.added_tokens().values()), np.int64)
    size = 1 + max(max(vocabulary, default=-1), int(added_ids.max(initial=-1)))
    added = np.zeros(size, np.bool_)
    added[added_ids] = True
    pieces = [vocabulary.get(number, b"") for number in range(size)]
    if family.blanks:
        for number in np.flatnonzero(~added).tolist():
            pieces[number] = pieces[number].replace(_BLANK, b" ")
    length = np.fromiter(map(len, pieces), np.int64, size)
    return TokenBytes(
        data=np.frombuffer(b"".join(pieces), np.uint8),
        start=np.cumsum(length) - length,
        length=length,
        added=added,
        leads=np.fromiter((piece[:1] == b" " for piece in pieces), np.bool_, size),
        prepends=family.prepends,
        decode=(
            None if family.blanks else decode
        ),  # where "▁" is a blank, decoding drops the first one
    )


def char_ranges(
    texts: Sequence[str], tokens: Tokens, table: TokenBytes
) -> tuple[NDArray[np.int64], list[int]]:
    """First and last+1 character of each token: int64 [tokens, 2]; and the numbers of the texts for
    which that cannot be said.

    The rows of those texts mean nothing.
    """
    chars = np.zeros((len(tokens.input_ids), 2), np.int64)
    unknown: list[int] = []
    first = 0
    while first < len(texts):
        last, size = first, 0
        while last < len(texts) and size < _GROUP_CHARACTERS:
            size += len(texts[last])
            last += 1
        bounds = tokens.offsets[first : last + 1]
        rows = slice(int(bounds[0]), int(bounds[-1]))
        missed = _group_ranges(
            list(texts[first:last]), tokens.input_ids[rows], bounds - bounds[0], table, chars[rows]
        )
        unknown += [first + number for number in missed]
        first = last
    return chars, unknown


@dataclass(frozen=True, slots=True)
class Family:
    """blanks: "▁" represents a blank (SentencePiece); otherwise the tokenizer is byte-level.
    prepends: a blank is added to the start of a text and after each added token."""

    blanks: bool
    prepends: bool


def byte_family(spec: TokenizerSpec) -> Family | None:
    """The family of a tokenizer whose tokens' bytes are the bytes of the text; None if its parts
    are not known to keep bytes and offsets."""
    if not all(_keeps_offsets(part) for part in spec.steps("post_processor", "processors")):
        return None
    normalizers = spec.steps("normalizer", "normalizers")
    pre_tokenizers = spec.steps("pre_tokenizer", "pretokenizers")
    if any(part["type"] == "ByteLevel" for part in pre_tokenizers):
        return (
            Family(blanks=False, prepends=False)
            if all(part["type"] == "NFC" for part in normalizers)
            else None
        )
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    # Gemma splits at blanks, of which its normalizer has left none.
    idle = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    if pre_tokenizers not in ([], [idle]) or normalizers not in ([prepend, replace], [replace]):
        return None
    return Family(blanks=True, prepends=prepend in normalizers)


def _keeps_offsets(post_processor: dict[str, Any]) -> bool:
    kind = post_processor["type"]
    return kind == "TemplateProcessing" or (
        kind == "ByteLevel" and not post_processor.get("trim_offsets", True)
    )


def _group_ranges(
    texts: list[str],
    ids: NDArray[np.int32],
    bounds: NDArray[np.int64],
    table: TokenBytes,
    chars: NDArray[np.int64],
) -> list[int]:
    """Fill `chars` for one group of texts, whose tokens are ids[bounds[k]:bounds[k + 1]]; give the
    texts that do not fit."""
    joined = "".join(texts)
    content = np.frombuffer(joined.encode(), np.uint8)
    text_chars = to_offsets(np.fromiter(map(len, texts), np.int64, len(texts)))
    ascii_only = len(content) == len(joined)
    text_bytes = (
        text_chars
        if ascii_only
        else to_offsets(
            np.array([len(t) if t.isascii() else len(t.encode()) for t in texts], np.int64)
        )
    )
    if len(ids) and (not len(content) or ids.min() < 0 or ids.max() >= len(table.length)):
        return list(range(len(texts)))
    length = table.length[ids]
    start = table.start[ids]
    if table.prepends:
        # The blank that is not in the text: at the first token of a text, and of what follows an
        # added token.
        fronts = np.zeros(len(ids), np.bool_)
        fronts[bounds[:-1][bounds[:-1] < bounds[1:]]] = True
        fronts[1:] |= table.added[ids[:-1]]
        fronts &= table.leads[ids] & ~table.added[ids]
        length = length - fronts
        start = start + fronts

    token_edges = to_offsets(length)
    misfit = np.flatnonzero(np.diff(token_edges[bounds]) != np.diff(text_bytes))
    if len(misfit):
        # Positions of all texts after a misfit are off: set it aside, and do the others without it.
        return _without(misfit, texts, ids, bounds, table, chars)
    differs = np.flatnonzero(_written(table, ids, start, length) != content)
    if len(differs):
        misfit = np.unique(np.searchsorted(text_bytes, differs, side="right") - 1)
        return _without(misfit, texts, ids, bounds, table, chars)

    first, last = token_edges[:-1], token_edges[1:]
    if ascii_only:
        chars[:, 0], chars[:, 1] = first, last
    else:
        number = np.cumsum(
            (content & 0xC0) != 0x80, dtype=np.int32
        )  # of the character that each byte belongs to, from 1
        chars[:, 0] = number[np.minimum(first, len(number) - 1)] - 1
        chars[:, 1] = number[np.maximum(last, 1) - 1]
    empty = length == 0
    # A token that is nothing but the blank before a text: tokenizers gives it the character that
    # follows.
    if empty.any():
        chars[empty, 1] = chars[empty, 0] + 1
    chars -= np.repeat(text_chars[:-1], np.diff(bounds))[:, None]
    return []


def _without(
    misfit: NDArray[np.int64],
    texts: list[str],
    ids: NDArray[np.int32],
    bounds: NDArray[np.int64],
    table: TokenBytes,
    chars: NDArray[np.int64],
) -> list[int]:
    """The group again, without the texts that do not fit."""
    keep = np.ones(len(texts), np.bool_)
    keep[misfit] = False
    kept = np.flatnonzero(keep).tolist()
    counts = np.diff(bounds)
    rows = np.repeat(keep, counts)
    part = np.zeros((int(rows.sum()), 2), np.int64)
    missed = _group_ranges(
        [texts[k] for k in kept], ids[rows], to_offsets(counts[keep]), table, part
    )
    chars[rows] = part
    return sorted([*misfit.tolist(), *(kept[k] for k in missed)])


def _written(
    table: TokenBytes, ids: NDArray[np.int32], start: NDArray[np.int64], length: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """The bytes of the tokens: table.data[start[k] : start[k] + length[k]] of all k, one after the
    other."""
    if table.decode is not None:
        decoded = np.frombuffer(table.decode(ids.view(np.uint32)), np.uint8)
        if len(decoded) == int(length.sum()):
            return decoded
    place = np.repeat((start - (np.cumsum(length) - length)).astype(np.int32), length)
    place += np.arange(len(place), dtype=np.int32)
    written: NDArray[np.uint8] = table.data[place]
    return written

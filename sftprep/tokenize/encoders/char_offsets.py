"""The character range of each token, computed from the tokens' bytes alone.

These ranges are what `tokenizers` calls offsets. The idea: for two families of tokenizers, the
concatenated bytes of the tokens of a string are the bytes of the string. Steps:

1. The end of each token in bytes is a cumulative sum of the lengths of the tokens.
2. The bytes of the tokens are compared with those of the string, so the idea is never assumed. A
   string on which they differ is left to `tokenizers`: a normalizer changed it, an added token
   swallowed whitespace, or unknown characters were dropped.
3. Byte offsets become character offsets by counting the bytes that begin a character.

The families:

- byte-level BPE, without a normalizer or with NFC: the bytes of a token as they are;
- SentencePiece as BPE with byte fallback: "▁" is a space, and a space that the string does not
  contain may be added before the string and after each added token. The token that starts there has
  one byte less in the string, possibly none.

Cost: some array operations per byte, and no second encoding. Reference: the offsets of `tokenizers`
(`HfEncoder.encode_with_chars`), and a loop over the bytes in tests/tokenize/test_char_offsets.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import Ragged, to_offsets
from sftprep.tokenize.encoders.base import Tokens
from sftprep.tokenize.loading.spec import TokenizerSpec

_METASPACE = "▁".encode()
# Strings are processed in groups of about this many characters, so that the arrays of a group
# (about 20 bytes for each byte) fit into the cache of a processor.
_GROUP_CHARACTERS = 1 << 18


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The bytes of each token of a vocabulary.

    Example:
        The tokens b"ab" and b" c", of which the first is an added token:
        data = b"ab c", start = [0, 2], length = [2, 2], added = [True, False],
        starts_with_space = [False, True]
    """

    data: NDArray[np.uint8]  # the bytes of all ids
    start: NDArray[np.int64]  # [ids], where the bytes of an id start in `data`
    length: NDArray[np.int64]  # [ids]
    added: NDArray[np.bool_]  # [ids], True = an added token
    starts_with_space: NDArray[np.bool_]  # [ids]
    prepends_space: bool  # as in `Family`


def token_bytes(spec: TokenizerSpec, vocabulary: dict[int, bytes]) -> TokenBytes | None:
    """Return the bytes of a tokenizer's tokens; None if it is in neither family.

    Args:
        spec: The tokenizer.
        vocabulary: The bytes of each id, including those of added tokens.
    """
    family = byte_family(spec)
    if family is None:
        return None
    added_ids = np.array(sorted(spec.added_tokens().values()), np.int64)
    size = 1 + max(max(vocabulary, default=-1), int(added_ids.max(initial=-1)))
    added = np.zeros(size, np.bool_)
    added[added_ids] = True
    pieces = [vocabulary.get(number, b"") for number in range(size)]
    if family.metaspace:
        # Added tokens are matched before "▁" is substituted, so a "▁" in them is that character.
        for number in np.flatnonzero(~added).tolist():
            pieces[number] = pieces[number].replace(_METASPACE, b" ")
    length = np.fromiter(map(len, pieces), np.int64, size)
    return TokenBytes(
        data=np.frombuffer(b"".join(pieces), np.uint8),
        start=np.cumsum(length) - length,
        length=length,
        added=added,
        starts_with_space=np.fromiter((piece[:1] == b" " for piece in pieces), np.bool_, size),
        prepends_space=family.prepends_space,
    )


def char_ranges(
    texts: Sequence[str], tokens: Tokens, table: TokenBytes
) -> tuple[NDArray[np.int64], list[int]]:
    """Return the range of characters of each token.

    Args:
        texts: The strings.
        tokens: Their tokens.
        table: The bytes of each token, for at least these tokens.

    Returns:
        int64 [tokens, 2]: the first character in its string, and the one after the last; and the
        indices of the strings for which the bytes do not determine it, whose rows are undefined.

    Example:
        texts = ["a é"], tokens b"a", b" ", b"é"  ->  [[0, 1], [1, 2], [2, 3]], []
    """
    chars = np.zeros((len(tokens.input_ids), 2), np.int64)
    unknown: list[int] = []
    first = 0
    while first < len(texts):
        last, size = first, 0
        while last < len(texts) and size < _GROUP_CHARACTERS:
            size += len(texts[last])
            last += 1
        offsets = tokens.offsets[first : last + 1]
        rows = slice(int(offsets[0]), int(offsets[-1]))
        unknown_in_group = _fill_group(
            list(texts[first:last]),
            tokens.input_ids[rows],
            offsets - offsets[0],
            table,
            chars[rows],
        )
        unknown += [first + index for index in unknown_in_group]
        first = last
    return chars, unknown


@dataclass(frozen=True, slots=True)
class Family:
    """A family of tokenizers with the bytes of the string in their tokens."""

    metaspace: bool  # "▁" represents a space (SentencePiece); otherwise byte-level
    prepends_space: bool  # a space is added before a string and after each added token


def byte_family(spec: TokenizerSpec) -> Family | None:
    """Return the family of a tokenizer.

    Returns:
        None if a part of the tokenizer is not known to preserve bytes and offsets.
    """
    if not all(_preserves_offsets(part) for part in spec.steps("post_processor", "processors")):
        return None
    normalizers = spec.steps("normalizer", "normalizers")
    pre_tokenizers = spec.steps("pre_tokenizer", "pretokenizers")
    if any(part["type"] == "ByteLevel" for part in pre_tokenizers):
        return (
            Family(metaspace=False, prepends_space=False)
            if all(part["type"] == "NFC" for part in normalizers)
            else None
        )
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    # Gemma splits at spaces, but its normalizer has replaced all of them before.
    no_effect = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    if pre_tokenizers not in ([], [no_effect]):
        return None
    if normalizers not in ([prepend, replace], [replace]):
        return None
    return Family(metaspace=True, prepends_space=prepend in normalizers)


def _preserves_offsets(post_processor: dict[str, Any]) -> bool:
    kind = post_processor["type"]
    return kind == "TemplateProcessing" or (
        kind == "ByteLevel" and not post_processor.get("trim_offsets", True)
    )


def _fill_group(
    texts: list[str],
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    table: TokenBytes,
    chars: NDArray[np.int64],
) -> list[int]:
    """Fill in the ranges of strings; return those with other bytes than their tokens.

    Args:
        texts: The strings.
        ids: int32 [tokens], the ids of all strings.
        offsets: int64 [strings + 1]; string k has ids[offsets[k] : offsets[k + 1]].
        table: The bytes of each token.
        chars: int64 [tokens, 2], filled in.
    """
    # Offsets of the strings in the joined characters, and in the joined bytes.
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

    start, length = _find_segments(table, ids, offsets)
    # Compare the lengths, then the bytes, of strings and tokens. A string with another length
    # shifts the bytes of all later ones, so the group is processed again without it.
    token_edges = to_offsets(length)
    differing = np.flatnonzero(np.diff(token_edges[offsets]) != np.diff(text_bytes))
    if len(differing):
        return _fill_without(differing, texts, ids, offsets, table, chars)
    wrong_bytes = np.flatnonzero(_concatenate_bytes(table, ids, start, length) != content)
    if len(wrong_bytes):
        differing = np.unique(np.searchsorted(text_bytes, wrong_bytes, side="right") - 1)
        return _fill_without(differing, texts, ids, offsets, table, chars)

    # Byte offsets to character offsets: those of the characters that hold the first and last byte.
    first, last = token_edges[:-1], token_edges[1:]
    chars[:, 0], chars[:, 1] = first, last
    if not ascii_only:
        # 1-based number of the character that each byte belongs to.
        number = np.cumsum((content & 0xC0) != 0x80, dtype=np.int32)
        chars[:, 0] = number[np.minimum(first, len(number) - 1)] - 1
        chars[:, 1] = number[np.maximum(last, 1) - 1]
    # `tokenizers` gives a token that is only the added space the character that follows.
    empty = length == 0
    if empty.any():
        chars[empty, 1] = chars[empty, 0] + 1

    # Relative to the start of each string.
    chars -= np.repeat(text_chars[:-1], np.diff(offsets))[:, None]
    return []


def _find_segments(
    table: TokenBytes, ids: NDArray[np.int32], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bytes of each token in its string, as segments of `table.data`.

    These are the bytes of the token, but without the space that the tokenizer added at the first
    token of a string and at the first token after an added one.

    Returns:
        The start and the length of each segment, int64 [tokens].
    """
    start, length = table.start[ids], table.length[ids]
    if not table.prepends_space:
        return start, length
    has_added_space = np.zeros(len(ids), np.bool_)
    has_added_space[offsets[:-1][offsets[:-1] < offsets[1:]]] = True
    has_added_space[1:] |= table.added[ids[:-1]]
    has_added_space &= table.starts_with_space[ids] & ~table.added[ids]
    return start + has_added_space, length - has_added_space


def _fill_without(
    differing: NDArray[np.int64],
    texts: list[str],
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    table: TokenBytes,
    chars: NDArray[np.int64],
) -> list[int]:
    """Process a group without its differing strings; see `_fill_group`."""
    keep = np.ones(len(texts), np.bool_)
    keep[differing] = False
    kept = np.flatnonzero(keep).tolist()
    counts = np.diff(offsets)
    rows = np.repeat(keep, counts)
    kept_chars = np.zeros((int(rows.sum()), 2), np.int64)
    unknown = _fill_group(
        [texts[k] for k in kept], ids[rows], to_offsets(counts[keep]), table, kept_chars
    )
    chars[rows] = kept_chars
    return sorted([*differing.tolist(), *(kept[k] for k in unknown)])


def _concatenate_bytes(
    table: TokenBytes, ids: NDArray[np.int32], start: NDArray[np.int64], length: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Return the concatenated segments table.data[start[k] : start[k] + length[k]]."""
    if not table.prepends_space:  # whole tokens, which Arrow copies faster
        offsets = np.append(table.start, len(table.data))
        return Ragged(table.data, offsets).take(ids.astype(np.int64)).values
    # Index in `data` of each byte: its index in the result, shifted by a constant per token.
    index = np.repeat((start - (np.cumsum(length) - length)).astype(np.int32), length)
    index += np.arange(len(index), dtype=np.int32)
    gathered: NDArray[np.uint8] = table.data[index]
    return gathered

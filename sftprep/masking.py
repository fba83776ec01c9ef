"""Which tokens are trained: from where a completion starts, or from the marked spans of a rendered conversation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def completion_starts(
    prompt_ids: NDArray[np.int32], prompt_offsets: NDArray[np.int64], ids: NDArray[np.int32], offsets: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Where each completion starts: the length of the longest common start of the prompt's ids and the whole's.

    Flat ids and offsets [n + 1] of the prompts alone, and of prompt + completion; returns int64 [n]. A start before the
    prompt's end means that tokens merge across the border, or that the template writes a prompt differently.
    Source: `common_prefix_length` of TRL 1.16.
    """
    prompt_lengths, lengths = np.diff(prompt_offsets), np.diff(offsets)
    shared = np.minimum(prompt_lengths, lengths)
    firsts = np.cumsum(shared) - shared
    # The compared parts of both, one after the other: a byte a token tells which those are, not an index of eight.
    heads, prompts = ids[~mask_from(shared, offsets)], prompt_ids
    if len(prompts) != len(heads):  # a prompt longer than the whole
        prompts = prompt_ids[~mask_from(shared, prompt_offsets)]
    differs = np.flatnonzero(heads != prompts)
    # The first difference at or after a sequence's first compared token, if it is still this sequence's.
    following = np.searchsorted(differs, firsts)
    first_difference = np.append(differs, np.iinfo(np.int64).max)[following]
    starts: NDArray[np.int64] = np.minimum(shared, first_difference - firsts)
    return starts


def mask_from(starts: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True from `starts[k]` on in each sequence k: bool [tokens]."""
    steps = np.zeros(int(offsets[-1]) + 1, dtype=np.int8)
    # Two sequences can meet at one token, so edges are added and not assigned.
    np.add.at(steps, offsets[:-1] + starts, 1)
    np.add.at(steps, offsets[1:], -1)
    return np.cumsum(steps[:-1], dtype=np.int8).view(np.bool_)


def mask_spans(
    spans: Sequence[tuple[tuple[int, int], ...]], token_chars: NDArray[np.int64], offsets: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Mark the tokens of character spans, text by text: bool [tokens].

    spans[k]: ranges [first, last + 1) in text k; token_chars: int64 [tokens, 2], first and last + 1 character of each token.
    A span marks from the token that holds its first character to the first token that holds its last one, both included;
    where no token holds its first character nothing is marked, and where none holds its last one the text is marked to its
    end. Source: `apply_chat_template(return_assistant_tokens_mask=True)` of transformers 5.23, which is what TRL trains on.
    """
    mask = np.zeros(len(token_chars), dtype=np.bool_)
    for k, ranges in enumerate(spans):
        begin, end = int(offsets[k]), int(offsets[k + 1])
        chars = token_chars[begin:end]
        for first, last in ranges:
            opening = _token_at(chars, first)
            if opening is None:
                break
            closing = _token_at(chars, last - 1)
            mask[begin + opening : end if not closing else begin + closing + 1] = True
    return mask


def _token_at(chars: NDArray[np.int64], position: int) -> int | None:
    """The first token whose characters hold `position`."""
    # Ends never fall, so the first token that ends beyond the position is the only candidate for the first that holds it.
    at = int(np.searchsorted(chars[:, 1], position, side="right"))
    while at < len(chars) and chars[at, 0] > position and chars[at, 0] == chars[at, 1]:
        at += 1
    return at if at < len(chars) and chars[at, 0] <= position < chars[at, 1] else None

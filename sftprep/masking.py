"""Which tokens are trained: from where a completion starts, or from the marked spans of a rendered
conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import to_offsets


def completion_starts(
    prompt_ids: NDArray[np.int32],
    prompt_offsets: NDArray[np.int64],
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Where each completion starts: the length of the longest common start of the prompt's ids and
    the whole's.

    Flat ids and offsets [n + 1] of the prompts alone, and of prompt + completion; returns int64
    [n]. A start before the prompt's end means that tokens merge across the border, or that the
    template writes a prompt differently. Source: `common_prefix_length` of TRL 1.16.
    """
    prompt_lengths, lengths = np.diff(prompt_offsets), np.diff(offsets)
    shared = np.minimum(prompt_lengths, lengths)
    firsts = np.cumsum(shared) - shared
    # The compared parts of both, one after the other: a byte a token tells which those are, not an
    # index of eight.
    heads, prompts = ids[~mask_from(shared, offsets)], prompt_ids
    if len(prompts) != len(heads):  # a prompt longer than the whole
        prompts = prompt_ids[~mask_from(shared, prompt_offsets)]
    differs = np.flatnonzero(heads != prompts)
    # The first difference at or after a sequence's first compared token, if it is still this
    # sequence's.
    following = np.searchsorted(differs, firsts)
    first_difference = np.append(differs, np.iinfo(np.int64).max)[following]
    starts: NDArray[np.int64] = np.minimum(shared, first_difference - firsts)
    return starts


def targets_of(
    completion_mask: NDArray[np.bool_] | NDArray[np.uint8], offsets: NDArray[Any]
) -> NDArray[np.int64]:
    """Tokens that each sequence trains, which its first one never is, for nothing predicts it:
    int64 [n].

    completion_mask: [tokens], 1 or True = trained; offsets: integers [n + 1].
    """
    marks = completion_mask.view(np.bool_)
    firsts, lasts = trained_runs(marks)
    lengths = lasts - firsts
    before = to_offsets(lengths)
    # How many tokens are trained before each offset: all of the runs that end before it, and a part
    # of the one around it.
    run = np.searchsorted(lasts, offsets)
    within = np.maximum(offsets - np.append(firsts, len(marks))[run], 0)
    targets: NDArray[np.int64] = np.diff(before[run] + within)
    filled = np.diff(offsets) > 0
    targets[filled] -= marks[offsets[:-1][filled]]
    return targets


def trained_runs(
    completion_mask: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The runs of trained tokens [first, last), in order: two int64 [runs]."""
    if not len(completion_mask):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    turns = np.flatnonzero(completion_mask[1:] != completion_mask[:-1]) + 1
    first = [0] if completion_mask[0] else []
    last = [len(completion_mask)] if completion_mask[-1] else []
    bounds = np.concatenate([first, turns, last]).astype(np.int64)
    return bounds[::2], bounds[1::2]


def mask_from(starts: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True from `starts[k]` on in each sequence k: bool [tokens]."""
    runs = np.empty(2 * len(starts), dtype=np.int64)
    runs[0::2], runs[1::2] = starts, np.diff(offsets) - starts
    return np.repeat(np.tile([False, True], len(starts)), runs)


def mask_spans(
    spans: Sequence[tuple[tuple[int, int], ...] | None],
    token_chars: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Mark the tokens of character spans, text by text: bool [tokens].

    spans[k]: ranges [first, last + 1) in text k, None for all of it; token_chars: int64 [tokens,
    2], first and last + 1 character of each token. A span marks from the token that holds its first
    character to the first token that holds its last one, both included; where no token holds its
    first character nothing is marked, and where none holds its last one the text is marked to its
    end. Source: `apply_chat_template(return_assistant_tokens_mask=True)` of transformers 5.23,
    which is what TRL trains on; only a span that ends with the first token of its text differs:
    transformers takes the number of that token, 0, for no token, and marks the text to its end.
    """
    of = [k for k, ranges in enumerate(spans) for _ in ranges or ()]
    flat = [span for ranges in spans for span in ranges or ()]
    whole = np.array([k for k, ranges in enumerate(spans) if ranges is None], dtype=np.int64)
    opens, closes = _token_ranges(
        np.array(of, np.int64), np.array(flat, np.int64).reshape(-1, 2), token_chars, offsets
    )
    steps = np.zeros(len(token_chars) + 1, dtype=np.int32)
    # Spans can meet at one token, so edges are added and not assigned.
    np.add.at(steps, np.concatenate((opens, offsets[:-1][whole])), 1)
    np.add.at(steps, np.concatenate((closes, offsets[1:][whole])), -1)
    mask: NDArray[np.bool_] = np.cumsum(steps[:-1]) > 0
    return mask


def weigh_spans(
    weights: Mapping[int, Sequence[tuple[int, int, float]]],
    token_chars: NDArray[np.int64],
    offsets: NDArray[np.int64],
    mask: NDArray[np.bool_],
) -> NDArray[np.float32] | None:
    """What each token weighs in the loss where it is trained: float32 [tokens], or None where every
    one weighs 1.

    weights[k]: character ranges of text k, in order, and what their tokens weigh; those that weigh
    nothing are taken out of `mask`. The rest is as for `mask_spans`.
    """
    weighed = np.ones(len(token_chars), dtype=np.float32)
    of = [k for k, ranges in weights.items() for _ in ranges]
    flat = [(first, last) for ranges in weights.values() for first, last, _ in ranges]
    each = [weight for ranges in weights.values() for _, _, weight in ranges]
    opens, closes = _token_ranges(
        np.array(of, np.int64), np.array(flat, np.int64).reshape(-1, 2), token_chars, offsets
    )
    for first, last, weight in zip(opens.tolist(), closes.tolist(), each, strict=True):
        weighed[first:last] = weight
    mask &= weighed != 0
    return weighed if (weighed[mask] != 1).any() else None


def _token_ranges(
    of: NDArray[np.int64],
    spans: NDArray[np.int64],
    chars: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last + 1 token of each character span [spans, 2], the span k in text of[k]; both 0
    where it marks none.

    The characters of all texts are numbered through, so that all tokens are looked up at once.
    """
    lengths = np.diff(offsets)
    ends = np.zeros(len(lengths), dtype=np.int64)
    ends[lengths > 0] = chars[offsets[1:][lengths > 0] - 1, 1]
    np.maximum.at(ends, of, spans[:, 1] if len(spans) else 0)
    bases = np.cumsum(ends + 1) - (ends + 1)
    numbered = chars + np.repeat(bases, lengths)[:, None]
    opens = _tokens_at(spans[:, 0] + bases[of], of, numbered, offsets)
    closes = _tokens_at(spans[:, 1] - 1 + bases[of], of, numbered, offsets)
    begins, after = offsets[:-1][of], offsets[1:][of]
    closes = np.where(closes < begins, after, closes + 1)
    missing = opens < 0
    for k in np.flatnonzero(missing).tolist():
        # After a span that starts nowhere, no further one of its text is marked.
        missing[k:][of[k:] == of[k]] = True
    return np.where(missing, 0, opens), np.where(missing, 0, closes)


def _tokens_at(
    positions: NDArray[np.int64],
    of: NDArray[np.int64],
    chars: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The first token of text of[k] whose characters hold positions[k], -1 where there is none:
    int64 [positions]."""
    # Ends never fall, so the first token that ends beyond the position is the only candidate for
    # the first that holds it.
    at = np.searchsorted(chars[:, 1], positions, side="right")
    after = offsets[1:][of]
    last = max(len(chars) - 1, 0)
    if not len(chars):
        return np.full(len(positions), -1, dtype=np.int64)
    while True:
        token = chars[np.minimum(at, last)]
        empty = (at < after) & (token[:, 0] > positions) & (token[:, 0] == token[:, 1])
        if not empty.any():
            break
        at = at + empty
    found: NDArray[np.int64] = np.where(
        (at < after) & (token[:, 0] <= positions) & (positions < token[:, 1]), at, -1
    )
    return found

"""Masks of trained tokens, from completion starts or from character spans.

These are operations on arrays. What is trained is decided before: `render/trained_turns.py` selects
the turns; `chat_template/assistant_spans.py` (reference path) and `render/token_space/regions.py`
(fast path) select the part of each turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import to_offsets


def completion_starts(
    prompt_ids: NDArray[np.int32],
    prompt_offsets: NDArray[np.int64],
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the start of each completion: the length of the common prefix.

    The prefix is common to the prompt and the whole sequence. A start before the end of the prompt
    means that tokens merge across the boundary, or that the template writes the prompt differently.
    Source: `common_prefix_length` of TRL 1.16.

    Args:
        prompt_ids: int32, the ids of all prompts alone.
        prompt_offsets: int64 [n + 1].
        ids: int32 [tokens], the ids of all sequences, prompt and completion.
        offsets: int64 [n + 1].

    Returns:
        int64 [n], relative to the start of each sequence.

    Example:
        prompts [1, 2] and [5], sequences [1, 2, 3] and [6, 7]  ->  [2, 0]
    """
    prompt_lengths, lengths = np.diff(prompt_offsets), np.diff(offsets)
    shared = np.minimum(prompt_lengths, lengths)
    firsts = np.cumsum(shared) - shared
    # The compared parts of both, one after the other. They are selected by a mask of one byte for
    # each token, which takes less memory than an index.
    heads, prompts = ids[~mask_from(shared, offsets)], prompt_ids
    if len(prompts) != len(heads):  # a prompt is longer than its sequence
        prompts = prompt_ids[~mask_from(shared, prompt_offsets)]
    differs = np.flatnonzero(heads != prompts)
    # The first difference at or after the first compared token of each sequence. A difference in a
    # later sequence is beyond the compared part, so the minimum below removes it.
    following = np.searchsorted(differs, firsts)
    first_difference = np.append(differs, np.iinfo(np.int64).max)[following]
    starts: NDArray[np.int64] = np.minimum(shared, first_difference - firsts)
    return starts


class TargetRuns(NamedTuple):
    """The runs of targets [first, last) of some sequences, in order.

    A target is a trained token, but never the first token of a sequence, which nothing predicts. So
    a run is within one sequence.
    """

    firsts: NDArray[np.int64]  # [runs]
    lasts: NDArray[np.int64]  # [runs]

    @property
    def total(self) -> int:
        """Return the number of targets."""
        return int((self.lasts - self.firsts).sum())

    def count_in(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of targets of pieces of the sequences: int64 [pieces].

        Args:
            begins: int64 [pieces], the first token of each piece, which is not a target of it.
            ends: int64 [pieces], its last token + 1.

        Example:
            runs [1, 3) and [5, 8), begins = [0, 2], ends = [3, 7]  ->  [2, 2]
        """
        return self._count_before(ends) - self._count_before(np.minimum(begins + 1, ends))

    def _count_before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of targets before each position: int64 [positions]."""
        # All tokens of the runs that end before it, and a part of the run around it.
        run = np.searchsorted(self.lasts, positions)
        first = np.append(self.firsts, np.iinfo(np.int64).max)[run]
        number: NDArray[np.int64] = np.maximum(positions - first, 0)
        number += to_offsets(self.lasts - self.firsts)[run]
        return number


def find_targets(
    completion_mask: NDArray[np.bool_] | NDArray[np.uint8] | None, offsets: NDArray[Any]
) -> TargetRuns:
    """Return the runs of targets of some sequences.

    Args:
        completion_mask: [tokens], 1 or True: trained; None if every token is trained.
        offsets: integers [n + 1].

    Example:
        completion_mask = [1, 1, 0, 1], offsets = [0, 2, 4]  ->  [1, 2), [3, 4)
    """
    offsets = offsets.astype(np.int64, copy=False)
    is_filled = np.diff(offsets) > 0
    begins = offsets[:-1][is_filled]
    if completion_mask is None:
        firsts, lasts = begins + 1, offsets[1:][is_filled]
        has_targets = firsts < lasts
        return TargetRuns(firsts[has_targets], lasts[has_targets])
    marks = completion_mask.view(np.bool_).copy()
    marks[begins] = False
    return TargetRuns(*trained_runs(marks))


def trained_runs(
    completion_mask: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the runs of trained tokens [first, last), in order: two int64 [runs].

    Example:
        [False, True, True, False, True]  ->  [1, 4], [3, 5]
    """
    if not len(completion_mask):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    changes = np.flatnonzero(completion_mask[1:] != completion_mask[:-1]) + 1
    first = [0] if completion_mask[0] else []
    last = [len(completion_mask)] if completion_mask[-1] else []
    bounds = np.concatenate([first, changes, last]).astype(np.int64)
    return bounds[::2], bounds[1::2]


def mask_from(starts: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return a mask, True from `starts[k]` on in each sequence k: bool [tokens].

    Example:
        starts = [1, 0], offsets = [0, 3, 5]  ->  [False, True, True, True, True]
    """
    runs = np.empty(2 * len(starts), dtype=np.int64)
    runs[0::2], runs[1::2] = starts, np.diff(offsets) - starts
    return np.repeat(np.tile([False, True], len(starts)), runs)


def mask_spans(
    spans: Sequence[tuple[tuple[int, int], ...] | None],
    token_chars: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return a mask of the tokens of character spans: bool [tokens].

    A span covers the tokens from the one that contains its first character to the first one that
    contains its last character, both included. If no token contains its first character, it covers
    nothing; if none contains its last character, it ends with the last token before it. An empty
    span covers nothing.

    Source: `apply_chat_template(return_assistant_tokens_mask=True)` of transformers 5.23, which is
    what TRL trains on. It differs where transformers trains words of the user: if the last
    character of a span is in the first token of the text (whose index, 0, it takes for a missing
    token) or in no token, transformers marks the text to its end; an empty span takes a token of
    the text around it.

    Args:
        spans: For each text, its spans [first, last) in characters; None: the whole text.
        token_chars: int64 [tokens, 2], the characters [first, last) of each token.
        offsets: int64 [n + 1].

    Example:
        spans = [((3, 5),)] in "ab cd", whose tokens are "ab", " cd" with characters [0, 2), [2, 5)
        ->  [False, True]
    """
    text_of = [k for k, ranges in enumerate(spans) for _ in ranges or ()]
    flat = [span for ranges in spans for span in ranges or ()]
    whole = np.array([k for k, ranges in enumerate(spans) if ranges is None], dtype=np.int64)
    opens, closes = _token_ranges(
        np.array(text_of, np.int64), np.array(flat, np.int64).reshape(-1, 2), token_chars, offsets
    )
    # The mask is a running sum of +1 at each start and -1 at each end. These are added, not
    # assigned, because spans can meet at one token.
    steps = np.zeros(len(token_chars) + 1, dtype=np.int32)
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
    """Return the loss weights: float32 [tokens], or None if all trained ones are 1.

    Args:
        weights: For some texts, by index, spans [first, last) in characters, in order, with the
            weight of their tokens.
        token_chars: As for `mask_spans`.
        offsets: int64 [n + 1].
        mask: bool [tokens], which tokens are trained; tokens with weight 0 are removed from it.
    """
    token_weights = np.ones(len(token_chars), dtype=np.float32)
    text_of = [k for k, ranges in weights.items() for _ in ranges]
    flat = [(first, last) for ranges in weights.values() for first, last, _ in ranges]
    span_weights = [weight for ranges in weights.values() for _, _, weight in ranges]
    opens, closes = _token_ranges(
        np.array(text_of, np.int64), np.array(flat, np.int64).reshape(-1, 2), token_chars, offsets
    )
    for first, last, weight in zip(opens.tolist(), closes.tolist(), span_weights, strict=True):
        token_weights[first:last] = weight
    mask &= token_weights != 0
    return token_weights if (token_weights[mask] != 1).any() else None


def _token_ranges(
    text_of: NDArray[np.int64],
    spans: NDArray[np.int64],
    chars: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens [first, last) of each character span; (0, 0) if none.

    Args:
        text_of: int64 [spans], the text of each span.
        spans: int64 [spans, 2], characters [first, last).
        chars: int64 [tokens, 2], characters [first, last) of each token in its text.
        offsets: int64 [texts + 1].
    """
    # 1. Number the characters of all texts consecutively, so that all tokens are searched at once.
    # The `+ 1` keeps the texts apart.
    lengths = np.diff(offsets)
    ends = np.zeros(len(lengths), dtype=np.int64)  # characters of each text
    ends[lengths > 0] = chars[offsets[1:][lengths > 0] - 1, 1]
    np.maximum.at(ends, text_of, spans[:, 1] if len(spans) else 0)
    bases = np.cumsum(ends + 1) - (ends + 1)
    global_chars = chars + np.repeat(bases, lengths)[:, None]
    # 2. Find the tokens of the first and of the last character of each span.
    is_empty = spans[:, 0] == spans[:, 1]
    firsts, lasts = spans[:, 0] + bases[text_of], spans[:, 1] - 1 + bases[text_of]
    opens = _tokens_at(firsts, text_of, global_chars, offsets)
    closes = _tokens_at(lasts, text_of, global_chars, offsets)
    # A last character that is in no token: the span ends before the first token after it.
    following = np.minimum(
        np.searchsorted(global_chars[:, 1], lasts, side="right"), offsets[1:][text_of]
    )
    closes = np.where(closes < 0, following, closes + 1)
    # 3. As in transformers, after a span without a first token, no further span of its text counts.
    is_missing = (opens < 0) & ~is_empty
    for k in np.flatnonzero(is_missing).tolist():
        is_missing[k:][text_of[k:] == text_of[k]] = True
    covers_nothing = is_missing | is_empty
    return np.where(covers_nothing, 0, opens), np.where(covers_nothing, 0, closes)


def _tokens_at(
    positions: NDArray[np.int64],
    text_of: NDArray[np.int64],
    chars: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the first token of text `text_of[k]` at the character `positions[k]`.

    Returns:
        int64 [positions]; -1 if no token contains the character.
    """
    if not len(chars):
        return np.full(len(positions), -1, dtype=np.int64)
    # The ends of tokens never decrease, so the first token that ends after the position is the only
    # candidate for the first one that contains it ...
    index = np.searchsorted(chars[:, 1], positions, side="right")
    after = offsets[1:][text_of]
    last = len(chars) - 1
    # ... apart from empty tokens behind the position, which are skipped.
    while True:
        token = chars[np.minimum(index, last)]
        is_empty = (index < after) & (token[:, 0] > positions) & (token[:, 0] == token[:, 1])
        if not is_empty.any():
            break
        index = index + is_empty
    found: NDArray[np.int64] = np.where(
        (index < after) & (token[:, 0] <= positions) & (positions < token[:, 1]), index, -1
    )
    return found

"""Masks, compared with slow definitions."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftprep.core.mask_arrays import (
    completion_starts,
    find_targets,
    mask_from,
    mask_spans,
    trained_runs,
)

IDS = st.lists(st.integers(0, 2), max_size=8)


def flat(rows):
    lengths = [len(row) for row in rows]
    return np.array([x for row in rows for x in row], np.int32), np.concatenate(
        ([0], np.cumsum(lengths, dtype=np.int64))
    ).astype(np.int64)


@given(st.lists(st.tuples(IDS, IDS), max_size=8))
def test_a_completion_starts_where_ids_first_differ(pairs):
    prompts, wholes = [p for p, _ in pairs], [w for _, w in pairs]
    starts = completion_starts(*flat(prompts), *flat(wholes))

    def slow(prompt, whole):
        return next(
            (k for k, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
            min(len(prompt), len(whole)),
        )

    assert starts.tolist() == [slow(p, w) for p, w in pairs]


@given(
    st.lists(
        st.integers(0, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=10
    )
)
def test_a_mask_is_true_from_each_start_on(sequences):
    offsets = np.concatenate(([0], np.cumsum([n for n, _ in sequences]))).astype(np.int64)
    mask = mask_from(np.array([s for _, s in sequences], np.int64), offsets)
    assert mask.tolist() == [k >= start for n, start in sequences for k in range(n)]


def char_to_token(chars, position):
    return next((k for k, (a, b) in enumerate(chars) if a <= position < b), None)


@st.composite
def tokens_and_spans(draw):
    """Tokens of a text. Some share a character, and some have a character before them that belongs
    to no token."""
    chars, at = [], 0
    for _ in range(draw(st.integers(0, 10))):
        at += draw(st.integers(0, 1))
        end = at + draw(st.integers(1, 3))
        for _ in range(draw(st.integers(1, 2)) if end - at == 1 else 1):
            chars.append((at, end))
        at = end
    edges = sorted(draw(st.lists(st.integers(0, at + 2), max_size=6)))
    return chars, tuple(zip(edges[::2], edges[1::2], strict=False))


@given(st.lists(tokens_and_spans(), max_size=4))
def test_spans_mark_the_tokens_that_transformers_marks_and_no_words_of_the_user(texts):
    expected = []
    for chars, spans in texts:
        mask = [False] * len(chars)
        for first, last in spans:
            if first == last:
                continue  # transformers takes a token of the text around an empty span
            start, end = char_to_token(chars, first), char_to_token(chars, last - 1)
            if start is None:
                break
            # transformers marks the text to its end if `end` is missing or the first token, 0.
            if end is None:
                end = max(k for k, (a, _) in enumerate(chars) if a < last)
            for k in range(start, end + 1):
                mask[k] = True
        expected += mask
    every = [pair for chars, _ in texts for pair in chars]
    offsets = np.concatenate(([0], np.cumsum([len(chars) for chars, _ in texts]))).astype(np.int64)
    got = mask_spans(
        [spans for _, spans in texts], np.array(every, np.int64).reshape(-1, 2), offsets
    )
    assert got.tolist() == expected


@given(st.lists(st.lists(st.booleans(), max_size=6), max_size=10))
def test_targets_are_the_trained_tokens_except_the_first_of_each_sequence(sequences):
    mask = np.array([trained for sequence in sequences for trained in sequence], np.bool_)
    offsets = np.concatenate(([0], np.cumsum([len(s) for s in sequences]))).astype(np.int64)
    expected = [sum(sequence[1:]) for sequence in sequences]
    masks = [mask, mask.view(np.uint8), *([None] if mask.all() else [])]
    for same in masks:
        targets = find_targets(same, offsets)
        assert targets.count_in(offsets[:-1], offsets[1:]).tolist() == expected
        assert targets.total == sum(expected)
    firsts, lasts = trained_runs(mask)
    assert np.array_equal(
        np.flatnonzero(mask), [k for a, b in zip(firsts, lasts, strict=True) for k in range(a, b)]
    )
    assert (firsts[1:] > lasts[:-1]).all()

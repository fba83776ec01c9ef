"""The count of conversations whose end is not trained, compared with a slow definition."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftprep.core.types import Counts, TokenBatch
from sftprep.pipeline.passes.diagnostics import count_untrained_ends

SEQUENCE = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=6)


@given(st.lists(st.tuples(SEQUENCE, st.booleans()), max_size=6))
def test_conversations_whose_end_is_not_trained_are_counted(sequences):
    """The end of a conversation is trained if its last trained token, or the trained one just
    before it, is an added token (3 here)."""
    lengths = [len(tokens) for tokens, _ in sequences]
    flat = [pair for tokens, _ in sequences for pair in tokens]
    batch = TokenBatch(
        np.array([token for token, _ in flat], np.int32),
        np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        np.array([trained for _, trained in flat], np.bool_),
        np.zeros(len(lengths), np.int64),
    )
    expected = 0
    for tokens, chat in sequences:
        indices = [index for index, (_, trained) in enumerate(tokens) if trained]
        if chat and indices:
            last = indices[-1]
            ends = [tokens[last][0], *(tokens[last - 1][:1] if last - 1 in indices else ())]
            expected += 3 not in ends
    counts = Counts()
    count_untrained_ends(
        batch, np.array([chat for _, chat in sequences], np.bool_), np.array([3], np.int32), counts
    )
    assert counts["warnings.end_of_turn_not_trained"] == expected

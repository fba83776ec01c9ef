"""What the tokens of a batch show that a user would want to know, counted: nothing here changes a
token."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from sftprep.core.types import TokenBatch
from sftprep.masking import trained_runs
from sftprep.tokenize.loading.load import TokenizerSpec


def count_double_bos(batch: TokenBatch, spec: TokenizerSpec, counts: Counter[str]) -> None:
    """Sequences that start with the token of a start twice: one from the text, one from the
    tokenizer or the template."""
    if spec.bos_token_id is None or not len(batch.input_ids):
        return
    firsts = batch.offsets[:-1][batch.lengths > 1]
    double = (batch.input_ids[firsts] == spec.bos_token_id) & (
        batch.input_ids[firsts + 1] == spec.bos_token_id
    )
    if double.any():
        counts["warnings.double_bos"] += int(np.count_nonzero(double))


def count_untrained_ends(
    batch: TokenBatch, chats: NDArray[np.bool_], added: NDArray[np.int32], counts: Counter[str]
) -> None:
    """Conversations whose trained part does not end with one of the tokenizer's added tokens: the
    model would not learn to stop.

    chats: bool [n], which sequences are conversations. A blank may follow the end token, as in
    ChatML. Source: the check of TRL 1.16, `is_chat_template_stop_token_trained`, which looks at a
    template; this looks at what was made.
    """
    firsts, lasts = trained_runs(batch.completion_mask)
    if not chats.any() or not len(firsts):
        return
    # The last trained token of each sequence is in the last run that begins before its end.
    run = np.searchsorted(firsts, batch.offsets[1:]) - 1
    last = np.minimum(lasts[run], batch.offsets[1:]) - 1
    some = chats & (run >= 0) & (last >= batch.offsets[:-1])
    last = last[some]
    before = np.maximum(last - 1, 0)
    stops = np.isin(batch.input_ids[last], added)
    # The one before counts if it is trained, and of the same sequence: where it is not, the last
    # one is the only one.
    stops |= (
        np.isin(batch.input_ids[before], added)
        & batch.completion_mask[before]
        & (before >= batch.offsets[:-1][some])
    )
    if not stops.all():
        counts["warnings.end_of_turn_not_trained"] += int(np.count_nonzero(~stops))

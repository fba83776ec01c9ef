"""Counts of suspicious token patterns, shown as warnings in the summary.

Nothing here changes a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sftprep.core.byte_search import has_any_byte
from sftprep.core.mask_arrays import trained_runs
from sftprep.core.types import Counts, TokenBatch
from sftprep.tokenize.loading.spec import TokenizerSpec


def count_double_bos(batch: TokenBatch, spec: TokenizerSpec, counts: Counts) -> None:
    """Count the sequences with two beginning-of-sequence tokens at the start.

    The usual cause: the text or the template has one, and the tokenizer adds another.

    Args:
        batch: The sequences.
        spec: The tokenizer.
        counts: Receives `warnings.double_bos`, if there is such a sequence.
    """
    if spec.bos_token_id is None or not len(batch.input_ids):
        return
    firsts = batch.offsets[:-1][batch.lengths > 1]
    double = (batch.input_ids[firsts] == spec.bos_token_id) & (
        batch.input_ids[firsts + 1] == spec.bos_token_id
    )
    if double.any():
        lines = batch.line_of[batch.lengths > 1][double]
        counts.warn("double_bos", int(lines[0]), len(lines))


def count_unknown(
    batch: TokenBatch,
    texts: Sequence[str],
    spec: TokenizerSpec,
    unknown_id: int,
    counts: Counts,
) -> None:
    """Count the sequences with characters unknown to the tokenizer.

    These characters are lost.

    Args:
        batch: The sequences.
        texts: Their texts.
        spec: The tokenizer.
        unknown_id: The id that replaces such characters.
        counts: Receives `warnings.unknown_characters`, if there is such a sequence.
    """
    positions = np.flatnonzero(batch.input_ids == unknown_id)
    if not len(positions):
        return
    numbers, found = np.unique(
        np.searchsorted(batch.offsets, positions, side="right") - 1, return_counts=True
    )
    # A text may also spell the token; that is counted as a special token in a text.
    spellings = [token for token, id_ in spec.added_tokens().items() if id_ == unknown_id]
    lines = [
        int(batch.line_of[k])
        for k, count in zip(numbers.tolist(), found.tolist(), strict=True)
        if count > sum(map(texts[k].count, spellings))
    ]
    if lines:
        counts.warn("unknown_characters", lines[0], len(lines))


def count_lost_bytes(
    batch: TokenBatch, texts: Sequence[str], missing: bytes, counts: Counts
) -> None:
    """Count the sequences whose texts have bytes outside a byte-level vocabulary.

    Args:
        batch: The sequences.
        texts: Their texts.
        missing: The bytes.
        counts: Receives `warnings.unknown_characters`, if there is such a sequence.
    """
    if has_any_byte("".join(texts), missing):
        lacking = [number for number, text in enumerate(texts) if has_any_byte(text, missing)]
        counts.warn("unknown_characters", int(batch.line_of[lacking[0]]), len(lacking))


def count_untrained_ends(
    batch: TokenBatch, chats: NDArray[np.bool_], added: NDArray[np.int32], counts: Counts
) -> None:
    """Count the conversations with a trained part not ending in an end-of-turn token.

    A model that is trained on such conversations may not learn to stop. The reference is the check
    of TRL 1.16, `is_chat_template_stop_token_trained`, which examines the template; this function
    examines the tokens.

    Args:
        batch: The sequences.
        chats: bool [n]; which sequences are conversations.
        added: int32; the ids of the tokenizer's added tokens, any of which may end a turn.
        counts: Receives `warnings.end_of_turn_not_trained`, if there is such a conversation.
    """
    firsts, lasts = trained_runs(batch.completion_mask)
    if not chats.any() or not len(firsts):
        return
    # The last trained token of a sequence is in the last run that begins before the end of the
    # sequence.
    run = np.searchsorted(firsts, batch.offsets[1:]) - 1
    last = np.minimum(lasts[run], batch.offsets[1:]) - 1
    is_examined = chats & (run >= 0) & (last >= batch.offsets[:-1])
    last = last[is_examined]
    ends_turn = np.isin(batch.input_ids[last], added)
    # In ChatML a newline follows the token that ends a turn. So the token before the last one is
    # accepted as well, provided that it is trained and in the same sequence.
    before = np.maximum(last - 1, 0)
    ends_turn |= (
        np.isin(batch.input_ids[before], added)
        & batch.completion_mask[before]
        & (before >= batch.offsets[:-1][is_examined])
    )
    if not ends_turn.all():
        lines = batch.line_of[is_examined][~ends_turn]
        counts.warn("end_of_turn_not_trained", int(lines[0]), len(lines))

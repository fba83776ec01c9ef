"""Records with token ids instead of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import to_offsets
from sftprep.core.types import Example, PretokenizedRow, Rejected, TokenBatch
from sftprep.records.options import InvalidRecord, Record, RecordOptions

MASKS = frozenset({"labels", "completion_mask", "assistant_masks"})
"""Keys by which a pre-tokenized record specifies which of its tokens are trained."""


def from_tokens(record: Record, line: int, options: RecordOptions) -> Example:
    """Return the example of a pre-tokenized record; its ids are used without change.

    `labels` specify the tokens that are trained, otherwise the masks do, otherwise every token is
    trained. `seq_lengths`, or position ids that restart at 0, divide the row into sequences.

    Raises:
        InvalidRecord: The fields have wrong types or do not agree.

    Example:
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}  ->
            PretokenizedRow(input_ids=[5, 6, 7], trained=[False, True, True], lengths=[3])
    """
    ids = _to_integers(record["input_ids"], '"input_ids"', low=0)
    trained = np.ones(len(ids), dtype=np.bool_)
    if record.get("attention_mask") is not None:
        attended = _to_integers(
            record["attention_mask"], '"attention_mask"', low=0, length=len(ids), booleans=True
        )
        if not attended.all():
            raise InvalidRecord(
                "padding", '"attention_mask" has zeros: remove the padding from "input_ids"'
            )
    if record.get("labels") is not None:
        labels = _to_integers(record["labels"], '"labels"', low=-(2**31), length=len(ids))
        trained = labels != -100
        # Shards store the ids and a mask, so labels that differ from the ids would be lost.
        if (labels[trained] != ids[trained]).any():
            raise InvalidRecord(
                "other_labels",
                '"labels" has tokens that differ from those of "input_ids" at the same positions',
            )
    else:
        for key in ("completion_mask", "assistant_masks"):
            if record.get(key) is not None:
                trained &= _to_mask(record[key], f'"{key}"', length=len(ids))
    return Example(
        line, pretokenized=PretokenizedRow(ids, trained, _sequence_lengths(record, len(ids)))
    )


def _to_integers(
    value: Any, label: str, *, low: int, length: int | None = None, booleans: bool = False
) -> NDArray[np.int32]:
    """Return a list of integers as int32 [n].

    Args:
        value: The value of the key.
        label: The key, for messages.
        low: The smallest valid integer.
        length: The required length; None for any.
        booleans: Whether true and false are accepted as 1 and 0.

    Raises:
        InvalidRecord: The value is anything else.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidRecord("bad_type", f"{label} is not a list of numbers: {error}") from error
    if (
        not isinstance(value, list)
        or array.ndim != 1
        or (array.size and array.dtype.kind not in "iub")
    ):
        raise InvalidRecord("bad_type", f"{label} is not a list of integers")
    # NumPy converts [1, True] to integers without notice.
    if not booleans and bool in {*map(type, value)}:
        raise InvalidRecord("bad_type", f"{label} has a boolean, which is not an integer")
    if array.size and not (low <= int(array.min()) and int(array.max()) < 2**31):
        raise InvalidRecord(
            "bad_type",
            f"{label} has values from {int(array.min())} to {int(array.max())}, which are out of"
            " range",
        )
    if length is not None and array.size != length:
        raise InvalidRecord(
            "bad_row", f'{label} has {array.size} entries, "input_ids" has {length}'
        )
    return array.astype(np.int32)


def _to_mask(value: Any, label: str, *, length: int) -> NDArray[np.bool_]:
    """Return a list of 0, 1, true or false as bool [n]. Raises InvalidRecord."""
    array = _to_integers(value, label, low=0, length=length, booleans=True)
    if array.size and int(array.max()) > 1:
        raise InvalidRecord(
            "bad_type",
            f"{label} has the value {int(array.max())}, but a mask consists of 0 and 1, or of true"
            " and false",
        )
    return array.astype(np.bool_)


def _sequence_lengths(record: Record, total: int) -> NDArray[np.int64]:
    """Return the lengths of the sequences in a row of `total` tokens: int64 [s]."""
    positions = record.get("position_ids")
    lengths = np.array([total], dtype=np.int64)
    if positions is not None:
        # A sequence starts where the position is 0; from there, the positions must count up.
        starts = np.flatnonzero(_to_integers(positions, '"position_ids"', low=0, length=total) == 0)
        lengths = np.diff(np.append(starts, total)).astype(np.int64)
        counted = (
            np.arange(total) - np.repeat(starts, lengths)
            if total and len(starts) and starts[0] == 0
            else None
        )
        if total and (counted is None or not np.array_equal(counted, positions)):
            raise InvalidRecord("bad_row", '"position_ids" do not count from 0 in each sequence')
    if record.get("seq_lengths") is None:
        return lengths
    stated = _to_integers(record["seq_lengths"], '"seq_lengths"', low=0).astype(np.int64)
    stated = stated[stated > 0]
    if int(stated.sum()) != total:
        raise InvalidRecord(
            "bad_row", f'"seq_lengths" sum to {int(stated.sum())}, "input_ids" has {total} entries'
        )
    if positions is not None and not np.array_equal(stated, lengths):
        raise InvalidRecord("bad_row", '"seq_lengths" and "position_ids" do not agree')
    return stated


def to_token_batch(
    examples: Sequence[Example], vocab_size: int, rejected: list[Rejected], counts: Counter[str]
) -> TokenBatch:
    """Return the sequences of pre-tokenized records as flat arrays.

    Args:
        examples: Examples of `from_tokens`.
        vocab_size: The size of the vocabulary. Records with other ids are rejected.
        rejected: Rejected records are appended.
        counts: Records without tokens, and additional sequences of rows, are counted.
    """
    kept: list[tuple[int, PretokenizedRow]] = []
    for example in examples:
        row = example.pretokenized
        assert row is not None
        highest = int(row.input_ids.max(initial=0))
        if highest >= vocab_size:
            message = (
                f'"input_ids" has the id {highest}, which is outside the vocabulary of {vocab_size}'
            )
            rejected.append(Rejected(example.line, 0, "bad_ids", message, ""))
        elif len(row.lengths) == 0 or not len(row.input_ids):
            counts["dropped.no_token"] += 1
        else:
            kept.append((example.line, row))
            counts["extra.pretokenized_rows"] += len(row.lengths) - 1
    # An empty array at the start of each concatenation sets the dtype if no row was kept.
    lengths = np.concatenate([np.zeros(0, np.int64), *(row.lengths for _, row in kept)])
    line_of = [np.full(len(row.lengths), line, np.int64) for line, row in kept]
    return TokenBatch(
        np.concatenate([np.zeros(0, np.int32), *(row.input_ids for _, row in kept)]),
        to_offsets(lengths),
        np.concatenate([np.zeros(0, np.bool_), *(row.trained for _, row in kept)]),
        np.concatenate([np.zeros(0, np.int64), *line_of]),
    )

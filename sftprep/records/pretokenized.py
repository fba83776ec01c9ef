"""Records that bring their tokens along."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import edges
from sftprep.core.types import Example, PretokenizedRow, Rejected, TokenBatch
from sftprep.records.options import InvalidRecord, Record, RecordOptions

MASKS = frozenset({"labels", "completion_mask", "assistant_masks"})
"""Keys by which a record of tokens says which of them are trained."""


def from_tokens(record: Record, line: int, reading: RecordOptions) -> Example:
    """Ids that are there already, used as they are: `labels` say what is trained, else the masks,
    else all of it is.

    `seq_lengths`, or position ids that start again at 0, say that the row holds several sequences.
    """
    ids = _integers(record["input_ids"], '"input_ids"', low=0)
    trained = np.ones(len(ids), dtype=np.bool_)
    if record.get("attention_mask") is not None:
        seen = _integers(
            record["attention_mask"], '"attention_mask"', low=0, length=len(ids), truths=True
        )
        if not seen.all():
            raise InvalidRecord(
                "padding", '"attention_mask" has zeros: take the padding out of "input_ids"'
            )
    if record.get("labels") is not None:
        labels = _integers(record["labels"], '"labels"', low=-(2**31), length=len(ids))
        trained = labels != -100
        if (labels[trained] != ids[trained]).any():
            raise InvalidRecord(
                "other_labels",
                '"labels" has tokens that are not those of "input_ids" at their places',
            )
    else:
        for key in ("completion_mask", "assistant_masks"):
            if record.get(key) is not None:
                trained &= _truths(record[key], f'"{key}"', length=len(ids))
    return Example(line, given=PretokenizedRow(ids, trained, _sequence_lengths(record, len(ids))))


def _integers(
    value: Any, what: str, *, low: int, length: int | None = None, truths: bool = False
) -> NDArray[np.int32]:
    """A list of whole numbers as int32. truths: true and false are 1 and 0.

    Raises InvalidRecord for anything else, and for another length.
    """
    try:
        found = np.asarray(value)
    except ValueError as error:
        raise InvalidRecord("bad_type", f"{what} is no list of numbers: {error}") from error
    if (
        not isinstance(value, list)
        or found.ndim != 1
        or (found.size and found.dtype.kind not in "iub")
    ):
        raise InvalidRecord("bad_type", f"{what} is no list of whole numbers")
    if not truths and bool in {*map(type, value)}:
        raise InvalidRecord("bad_type", f"{what} holds true or false, which is no number")
    if found.size and not (low <= int(found.min()) and int(found.max()) < 2**31):
        raise InvalidRecord(
            "bad_type",
            f"{what} holds {int(found.min())} or {int(found.max())}, which is out of range",
        )
    if length is not None and found.size != length:
        raise InvalidRecord("bad_row", f'{what} has {found.size} entries, "input_ids" has {length}')
    return found.astype(np.int32)


def _truths(value: Any, what: str, *, length: int) -> NDArray[np.bool_]:
    """A list of 0, 1, true or false, as bool. Raises InvalidRecord for anything else, and for
    another length."""
    found = _integers(value, what, low=0, length=length, truths=True)
    if found.size and int(found.max()) > 1:
        raise InvalidRecord(
            "bad_type",
            f"{what} holds {int(found.max())}: a mask is of 0 and 1, or of true and false",
        )
    return found.astype(np.bool_)


def _sequence_lengths(record: Record, total: int) -> NDArray[np.int64]:
    """Lengths of the sequences that a row of tokens holds: int64 [s]."""
    positions = record.get("position_ids")
    lengths = np.array([total], dtype=np.int64)
    if positions is not None:
        starts = np.flatnonzero(_integers(positions, '"position_ids"', low=0, length=total) == 0)
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
    given = _integers(record["seq_lengths"], '"seq_lengths"', low=0).astype(np.int64)
    given = given[given > 0]
    if int(given.sum()) != total:
        raise InvalidRecord(
            "bad_row", f'"seq_lengths" sum to {int(given.sum())}, "input_ids" has {total} entries'
        )
    if positions is not None and not np.array_equal(given, lengths):
        raise InvalidRecord("bad_row", '"seq_lengths" and "position_ids" do not agree')
    return given


def given_batch(
    examples: Sequence[Example], vocab_size: int, rejected: list[Rejected], counts: Counter[str]
) -> TokenBatch:
    """The sequences of records that bring their tokens along; one with an id outside the vocabulary
    is set aside."""
    kept: list[tuple[int, PretokenizedRow]] = []
    for example in examples:
        given = example.given
        assert given is not None
        highest = int(given.input_ids.max(initial=0))
        if highest >= vocab_size:
            message = (
                f'"input_ids" holds {highest}, which is outside the vocabulary of {vocab_size}'
            )
            rejected.append(Rejected(example.origin, 0, "bad_ids", message, ""))
        elif len(given.lengths) == 0 or not len(given.input_ids):
            counts["dropped.no_token"] += 1
        else:
            kept.append((example.origin, given))
            counts["extra.given"] += len(given.lengths) - 1
    lengths = np.concatenate([np.zeros(0, np.int64), *(given.lengths for _, given in kept)])
    origins = [np.full(len(given.lengths), origin, np.int64) for origin, given in kept]
    return TokenBatch(
        np.concatenate([np.zeros(0, np.int32), *(given.input_ids for _, given in kept)]),
        edges(lengths),
        np.concatenate([np.zeros(0, np.bool_), *(given.trained for _, given in kept)]),
        np.concatenate([np.zeros(0, np.int64), *origins]),
    )

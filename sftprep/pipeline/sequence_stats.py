"""What choosing among records needs to know of them beside their lengths: workers find it,
selection.py uses it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from sftprep.masking import targets_of
from sftprep.pipeline.spill import Spill
from sftprep.sources.readers.jsonl import split_lines

_ESCAPED_BLANKS = re.compile(rb"\\[nrt]")


@dataclass(frozen=True, slots=True)
class SequenceStats:
    """What choosing needs to know of the sequences of a partition: int32 [n] line of each, int32
    [n] targets of each, and, where records are to be held out or compared, uint64 [n] hashes of
    each one's record: keys with the seed of the evaluation, same of all of it, alike of all but
    blanks."""

    origin: NDArray[np.int32]
    targets: NDArray[np.int32]
    keys: NDArray[np.uint64] | None = None
    same: NDArray[np.uint64] | None = None
    alike: NDArray[np.uint64] | None = None


@dataclass(frozen=True, slots=True)
class StatsRequest:
    """Which facts are wanted. key_seed: hashes with this seed; compare: those that tell equal
    records."""

    key_seed: int | None = None
    compare: bool = False


def facts_of(spill: Spill, data: bytes, wanted: StatsRequest) -> SequenceStats:
    """The facts on a partition. data: its lines."""
    mask = (
        np.ones(len(spill.input_ids), np.uint8)
        if spill.completion_mask is None
        else spill.completion_mask
    )
    targets = targets_of(mask, spill.offsets)
    facts = SequenceStats(spill.origin.astype(np.int32), targets.astype(np.int32))
    if wanted.key_seed is None and not wanted.compare:
        return facts
    lines = split_lines(data)
    records, which = np.unique(spill.origin, return_inverse=True)
    own = [_canonical(lines[line]) for line in records.tolist()]

    def hashed(texts: list[bytes], seed: int) -> NDArray[np.uint64]:
        return np.array([xxhash.xxh3_64_intdigest(text, seed) for text in texts], dtype=np.uint64)[
            which
        ]

    if wanted.key_seed is not None:
        facts = replace(facts, keys=hashed(own, wanted.key_seed))
    if wanted.compare:
        facts = replace(
            facts, same=hashed(own, 0), alike=hashed([_without_blanks(line) for line in own], 0)
        )
    return facts


def _canonical(line: bytes) -> bytes:
    """The record of a line as the same bytes, however its keys are ordered and spaced in which kind
    of file."""
    try:
        return orjson.dumps(orjson.loads(line), option=orjson.OPT_SORT_KEYS)
    except orjson.JSONDecodeError:  # a byte order mark stands before it
        return line.strip()


def _without_blanks(line: bytes) -> bytes:
    return _ESCAPED_BLANKS.sub(b"", line.translate(None, b" \t\r"))

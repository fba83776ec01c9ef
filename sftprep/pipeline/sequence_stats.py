"""Statistics of sequences that the selection needs in addition to their lengths.

Workers collect them with the spill of a partition; selection.py uses them.
"""

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

_ESCAPED_WHITESPACE = re.compile(rb"\\[nrt]")


@dataclass(frozen=True, slots=True)
class SequenceStats:
    """Statistics of the sequences of one partition.

    The hashes of a sequence are those of its record.

    Attributes:
        origin: int32 [n]; the line of the record of each sequence.
        targets: int32 [n]; the number of targets of each sequence.
        keys: uint64 [n]; hashes with the seed of the evaluation, if records are held out.
        same: uint64 [n]; hashes of the whole record, if records are compared.
        alike: uint64 [n]; hashes of the record without whitespace, if records are compared.
    """

    origin: NDArray[np.int32]
    targets: NDArray[np.int32]
    keys: NDArray[np.uint64] | None = None
    same: NDArray[np.uint64] | None = None
    alike: NDArray[np.uint64] | None = None


@dataclass(frozen=True, slots=True)
class StatsRequest:
    """The optional statistics to collect.

    Attributes:
        key_seed: The seed for `keys`; None if no record is held out.
        compare: Whether to hash records for the comparison with other records.
    """

    key_seed: int | None = None
    compare: bool = False


def collect_stats(spill: Spill, data: bytes, request: StatsRequest) -> SequenceStats:
    """Return the statistics of a partition.

    Args:
        spill: The spill of the partition.
        data: Its lines.
        request: The optional statistics.
    """
    mask = spill.completion_mask
    if mask is None:
        mask = np.ones(len(spill.input_ids), np.uint8)
    targets = targets_of(mask, spill.offsets)
    stats = SequenceStats(spill.origin.astype(np.int32), targets.astype(np.int32))
    if request.key_seed is None and not request.compare:
        return stats
    # Each record is hashed once, and its hash is repeated for each of its sequences.
    lines = split_lines(data)
    record_lines, record_of = np.unique(spill.origin, return_inverse=True)
    records = [_canonical_bytes(lines[line]) for line in record_lines.tolist()]

    def hash_records(texts: list[bytes], seed: int) -> NDArray[np.uint64]:
        hashes = [xxhash.xxh3_64_intdigest(text, seed) for text in texts]
        return np.array(hashes, dtype=np.uint64)[record_of]

    if request.key_seed is not None:
        stats = replace(stats, keys=hash_records(records, request.key_seed))
    if request.compare:
        stats = replace(
            stats,
            same=hash_records(records, 0),
            alike=hash_records([_without_whitespace(record) for record in records], 0),
        )
    return stats


def _canonical_bytes(line: bytes) -> bytes:
    """Return the record of a line as bytes that depend on its keys and values only.

    The order and spacing of the keys differ between files and kinds of files.
    """
    try:
        return orjson.dumps(orjson.loads(line), option=orjson.OPT_SORT_KEYS)
    except orjson.JSONDecodeError:  # the line begins with a byte order mark
        return line.strip()


def _without_whitespace(record: bytes) -> bytes:
    return _ESCAPED_WHITESPACE.sub(b"", record.translate(None, b" \t\r"))

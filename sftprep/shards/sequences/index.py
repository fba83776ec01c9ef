"""The index of a group of layout `sequences`: all columns of its shards except ids and weights.

It has the lengths of the sequences, their masks as runs, and how often the build contains each. So
the packs of any `max_length` are planned without reading the shards, and only the tokens of a pack
are gathered from them. It is an Arrow file with a record batch for each shard.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftprep.core.mask_arrays import TargetRuns
from sftprep.core.ragged import to_offsets
from sftprep.errors import ShardError
from sftprep.shards.group import Group
from sftprep.shards.layout import index_path
from sftprep.shards.pack_index import arrow_bytes, opened_index
from sftprep.shards.schema import arrow_array, numpy_view
from sftprep.shards.shard_file import BUILD_AGAIN
from sftprep.shards.writer import ShardRows
from sftprep.stores.cache import local_file
from sftprep.stores.folder import BuildFolder

_BYTES_PER_SEQUENCE, _BYTES_PER_TOKEN, _OTHER_BYTES = 64, 8, 1 << 20
"""Bounds for the size of an index, with room for the columns of later versions."""


@dataclass(frozen=True, eq=False)
class SequenceIndex:
    """The sequences of a shard or of a group, in the order in which they are stored.

    Attributes:
        tokens: int32 [n]; the number of tokens of each sequence, at least 1.
        num_bounds: int32 [n]; the number of its values in `bounds`.
        bounds: int32 [2 runs]; the runs of trained tokens [first, last) of each sequence, counted
            from its first token.
        origin: int64 [n]; slice and line of its record.
        flags: uint8 [n]; see `core.types.Flag`.
        copies: int32 [n]; how often the build contains it, at least 1.

    Example:
        A sequence of 6 tokens, of which the tokens 2, 3 and 5 are trained, used twice:
        tokens = [6], num_bounds = [4], bounds = [2, 4, 5, 6], copies = [2]
    """

    tokens: NDArray[np.int32]
    num_bounds: NDArray[np.int32]
    bounds: NDArray[np.int32]
    origin: NDArray[np.int64]
    flags: NDArray[np.uint8]
    copies: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, rows: ShardRows, copies: NDArray[np.int32]) -> SequenceIndex:
        """Return the index of sequences.

        Args:
            rows: The sequences, each with at least one token. The packs are ignored.
            copies: int32 [n]; at least 1.
        """
        offsets = to_offsets(rows.seq_lengths.astype(np.int64))
        num_bounds, bounds = _find_runs(rows.completion_mask, offsets)
        tokens = rows.seq_lengths.astype(np.int32)
        return cls(tokens, num_bounds, bounds, rows.origin, rows.flags, copies.astype(np.int32))

    @classmethod
    def concatenate(cls, parts: Iterable[SequenceIndex]) -> SequenceIndex:
        """Return the index of the sequences of several shards, in order."""
        found = [*parts]
        return cls(
            **{
                name: np.concatenate([np.zeros(0, dtype), *(getattr(p, name) for p in found)])
                for name, dtype in _TYPES.items()
            }
        )

    def part(self, start: int, stop: int) -> SequenceIndex:
        """Return the index of the sequences [start, stop)."""
        ends = to_offsets(self.num_bounds.astype(np.int64))
        bounds = self.bounds[ends[start] : ends[stop]]
        others = {name: getattr(self, name)[start:stop] for name in _TYPES if name != "bounds"}
        return SequenceIndex(bounds=bounds, **others)

    @property
    def sequences(self) -> NDArray[np.int32]:
        """The number of sequences in packs that each of them makes: its copies."""
        return self.copies

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """The first token of each sequence among all tokens, and their number: int64 [n + 1]."""
        return to_offsets(self.tokens.astype(np.int64))

    def targets(self) -> TargetRuns:
        """Return the runs of targets, as positions among the tokens of all sequences."""
        firsts, lasts = self._target_bounds()
        starts = np.repeat(self.offsets[:-1], self.num_bounds // 2)
        is_filled = firsts < lasts
        return TargetRuns((starts + firsts)[is_filled], (starts + lasts)[is_filled])

    @cached_property
    def trained_tokens(self) -> NDArray[np.int64]:
        """The number of targets of each sequence: int64 [n]."""
        firsts, lasts = self._target_bounds()
        sums = to_offsets(np.maximum(lasts - firsts, 0).astype(np.int64))
        return np.diff(sums[np.cumsum(self.num_bounds, dtype=np.int64) // 2], prepend=0)

    def _target_bounds(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        # Nothing predicts the first token of a sequence.
        return np.maximum(self.bounds[::2], 1), self.bounds[1::2]

    def equals(self, other: SequenceIndex) -> bool:
        """Return whether another index has the same values, apart from the copies."""
        names = [name for name in _TYPES if name != "copies"]
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)


_TYPES = {
    "tokens": np.int32,
    "num_bounds": np.int32,
    "bounds": np.int32,
    "origin": np.int64,
    "flags": np.uint8,
    "copies": np.int32,
}
_DEFAULTS = {"flags": 0, "copies": 1}
"""The columns that are not written if they have this value only."""


def _find_runs(
    mask: NDArray[np.bool_], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return `num_bounds` and `bounds` of sequences."""
    # A run ends with its sequence, so the first token of each sequence after it begins a new one.
    is_first = np.zeros(len(mask) + 1, np.bool_)
    is_first[offsets] = True
    before = np.append(False, mask)
    after = np.append(mask, False)
    firsts = np.flatnonzero(after & (~before | is_first))
    lasts = np.flatnonzero(before & (~after | is_first))
    sequence = np.searchsorted(offsets, firsts, side="right") - 1
    bounds = np.stack((firsts, lasts), axis=1) - offsets[sequence][:, None]
    num_bounds = 2 * np.bincount(sequence, minlength=len(offsets) - 1)
    return num_bounds.astype(np.int32), bounds.reshape(-1).astype(np.int32)


def index_bytes(parts: Iterable[SequenceIndex]) -> bytes:
    """Return the content of the index of a group from those of its shards, in order."""
    found = [*parts] or [SequenceIndex.concatenate([])]
    omitted = [
        name
        for name, default in _DEFAULTS.items()
        if all((getattr(part, name) == default).all() for part in found)
    ]
    return arrow_bytes([_to_batch(part, omitted) for part in found])


def _to_batch(index: SequenceIndex, omitted: list[str]) -> pa.RecordBatch:
    # A shard has less than 2**31 tokens, so int32 offsets are enough.
    offsets = np.append(0, np.cumsum(index.num_bounds)).astype(np.int32)
    columns = {
        "tokens": arrow_array(index.tokens),
        "trained": pa.ListArray.from_arrays(arrow_array(offsets), arrow_array(index.bounds)),
        "origin": arrow_array(index.origin),
        "flags": arrow_array(index.flags),
        "copies": arrow_array(index.copies),
    }
    kept = {name: column for name, column in columns.items() if name not in omitted}
    return pa.RecordBatch.from_arrays([*kept.values()], names=[*kept])


def read_sequence_index(folder: BuildFolder, group: Group) -> SequenceIndex:
    """Read the index of a group of layout `sequences`.

    Raises:
        ShardError: The file is missing or damaged.
        StorageError: The store cannot be reached.
    """
    name = index_path(group.key, group.index_digest)
    with local_file(folder, name, group.index_digest) as path:
        return read_sequence_index_file(path, group)


def read_sequence_index_file(path: Path, group: Group) -> SequenceIndex:
    """Read the index of a group from a local file, as `read_sequence_index` does."""
    most_bytes = _BYTES_PER_SEQUENCE * group.rows + _BYTES_PER_TOKEN * group.tokens + _OTHER_BYTES
    with opened_index(path, group.index_digest, most_bytes) as file:
        batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
        index = SequenceIndex.concatenate(map(_from_batch, batches))
    if problem := _find_problem(index, group):
        raise ShardError(f"{path}: {problem}", remedy=BUILD_AGAIN)
    return index


def _from_batch(batch: pa.RecordBatch) -> SequenceIndex:
    tokens, trained = numpy_view(batch.column("tokens")), batch.column("trained")
    offsets = numpy_view(trained.offsets)
    if offsets[:1].any() or offsets[-1:].sum() != len(trained.values):
        raise ValueError("its lists do not hold all of their values")
    others = {
        name: numpy_view(batch.column(name))
        if name in batch.schema.names
        else np.full(len(tokens), default, _TYPES[name])
        for name, default in _DEFAULTS.items()
    }
    return SequenceIndex(
        tokens=tokens,
        num_bounds=np.diff(offsets),
        bounds=numpy_view(trained.values),
        origin=numpy_view(batch.column("origin")),
        **others,
    )


def _find_problem(index: SequenceIndex, group: Group) -> str:
    """Return what is wrong with an index, on whose values readers rely; "" if nothing is."""
    if any(getattr(index, name).dtype != dtype for name, dtype in _TYPES.items()):
        return "its columns are of other types"
    if (len(index), int(index.offsets[-1])) != (group.rows, group.tokens):
        return f"it does not have {group.rows} sequences and {group.tokens} tokens"
    if index.tokens.min(initial=1) < 1 or index.copies.min(initial=1) < 1:
        return "a sequence has no tokens or no copies"
    firsts, lasts = index.bounds[::2], index.bounds[1::2]
    if (index.num_bounds % 2).any():
        return "a run of trained tokens has no end"
    tokens = np.repeat(index.tokens, index.num_bounds // 2)
    starts = np.repeat(index.offsets[:-1], index.num_bounds // 2)
    is_valid = (firsts >= 0) & (firsts < lasts) & (lasts <= tokens)
    if not is_valid.all() or ((starts + firsts)[1:] < (starts + lasts)[:-1]).any():
        return "the runs of trained tokens are not in order"
    return ""

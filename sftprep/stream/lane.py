"""One lane of a stream: tokenization, packing, and a small state.

1. Read and tokenize blocks until the window is full.
2. Take a snapshot: the cursors of all blocks with sequences in use, and for each of their sequences
   whether it is in the window, not yet in the window, or gone. It contains no tokens.
3. Pack the window; the packs go to the pool, from which `next_pack` draws them.

A state is the last snapshot and the number of packs that were drawn. Restoring reads the blocks
again, packs the window as before, and draws and drops the packs that had been drawn since. The cost
is tokenizing the blocks of one window again.

Sequences are addressed by references, `serial << 32 | k`: the serial number of the block, and the
index of the sequence in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sftprep.core.hashing import hash64
from sftprep.core.types import TokenBatch
from sftprep.errors import MismatchError, StorageError
from sftprep.packing.window import MOST_WAITS, CarryingWindow
from sftprep.pipeline.passes.overlong import LengthLimit
from sftprep.pipeline.passes.preprocess import Preprocessor, preprocess
from sftprep.records.transform import add_counts
from sftprep.shards.reading.pack import Pack
from sftprep.shards.schema import position_dtype
from sftprep.shards.writer import make_position_ids
from sftprep.stream.sources.base import Block, Cursor, LineGroup, Reader, retry_with_backoff
from sftprep.stream.sources.merged_batches import merge_batches

LaneState = dict[str, Any]
"""JSON with the keys `taken` (packs that were drawn), `ended`, and `window` (the snapshot before
the window was last packed; None before the first time)."""

_SHIFT = 32
_INDEX_MASK = (1 << _SHIFT) - 1

# The characters of a snapshot, one per sequence of a block.
_GONE = ord(".")  # in a pack of an earlier window
_WAITING = ord("+")  # not yet in the window
_CARRIED = ord("A")  # in the window; A: never carried, B: carried once, ...


@dataclass(frozen=True, slots=True)
class LaneRules:
    """The settings of all lanes of a pass.

    Attributes:
        limit: The limit of the lengths of sequences, which is also that of packs.
        window: Sequences in a full window.
        packing: "bfd" or "none".
        seed, epoch: Determine the order of the packs.
        buffer: Number of packs from which one is drawn at random; 0 keeps the order of the window.
        retries, pause: How often a block is read again if its source raises, and the seconds before
            the first retry, which double each time.
    """

    limit: LengthLimit
    window: int
    packing: str
    seed: int
    epoch: int
    buffer: int
    retries: int
    pause: float


@dataclass(slots=True)
class _ActiveBlock:
    """A tokenized block with sequences still in the lane."""

    cursor: Cursor  # from which it can be read again
    batch: TokenBatch
    origins: NDArray[np.int64]  # int64 [lines]
    num_remaining: int = 0  # number of sequences that were not packed yet


@dataclass(slots=True)
class Lane:
    """The packs of one lane, in order.

    Attributes:
        number: The number of the lane.
        reader, preprocessor, rules: Shared by all lanes.
        on_batch: Called with each block and its sequences; may raise.
        after_block: Called after each block with the lane, the block, and the number of its
            sequences; may raise.
        num_taken: Number of packs that were drawn.
        ended: Whether all packs were returned.
        counts: Counters of the blocks read so far, by the names that builds use.
        first_origins: The origin of the first record of some counters.
    """

    number: int
    reader: Reader
    preprocessor: Preprocessor
    rules: LaneRules
    on_batch: Callable[[Block, TokenBatch], None]
    after_block: Callable[[Lane, Block, int], None]
    num_taken: int = 0
    ended: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    first_origins: dict[str, int] = field(default_factory=dict)

    _window: CarryingWindow = field(init=False)
    _blocks: dict[int, _ActiveBlock] = field(default_factory=dict)  # by serial number
    _serial: int = 0  # of the next block
    _next_cursor: Cursor = None  # of the next block
    _is_source_dry: bool = False  # all blocks were read
    # The serial number of the last block, and its first sequence that is not yet in the window.
    _waiting: tuple[int, int] | None = None
    _pool: list[NDArray[np.int64]] = field(default_factory=list)  # packs to draw, as references
    _snapshot: LaneState | None = None  # from before the window was last packed

    def __post_init__(self) -> None:
        rules = self.rules
        seed, capacity = hash64(rules.seed, rules.epoch), rules.limit.max_length
        self._window = CarryingWindow(capacity, rules.window, seed=seed, lane=self.number)

    def next_pack(self) -> Pack | None:
        """Return the next pack, or None at the end.

        Raises:
            SourceError: The source raised at every attempt.
            SftprepError: Any error of `on_batch` and `after_block`.
        """
        pack = self._draw()
        return None if pack is None else self._assemble(pack)

    def state(self) -> LaneState:
        """Return the state for `restore`, with the snapshot of the last packing."""
        return {"taken": self.num_taken, "ended": self.ended, "window": self._snapshot}

    def restore(self, state: LaneState) -> Iterator[Cursor]:
        """Restore the lane from a state, completely once the iterator is exhausted.

        Yields:
            The cursor of each block of the snapshot, before it is read and tokenized again.

        Raises:
            MismatchError: The source has other records than when the state was taken.
        """
        snapshot = state["window"]
        self.num_taken, self.ended = state["taken"], state["ended"]
        if snapshot is None:
            return
        self.counts = Counter(snapshot["counts"])
        if self.ended:
            self._snapshot = snapshot
            return
        # The lane as it was before the window was last packed.
        self.num_taken = snapshot["taken"]
        self._next_cursor, self._is_source_dry = snapshot["next"], snapshot["dry"]
        self._window.number = snapshot["number"]
        for serial, (cursor, marks) in enumerate(snapshot["blocks"]):
            yield cursor
            self._restore_block(serial, cursor, np.frombuffer(marks.encode("ascii"), np.uint8))
        self._serial = len(snapshot["blocks"])
        self._pool = [
            np.array([(s << _SHIFT) + k for s, k in pack], np.int64) for pack in snapshot["pool"]
        ]
        for serial in (s for pack in snapshot["pool"] for s, _ in pack):
            self._blocks[serial].num_remaining += 1
        # The packs that were drawn since.
        self._pack_window()
        while self.num_taken < state["taken"]:
            pack = self._draw()
            if pack is None:
                raise self._changed_source()
            self._release(pack)

    # --- packs ------------------------------------------------------------------------------------

    def _draw(self) -> NDArray[np.int64] | None:
        """Return the references of the next pack, and count it as taken."""
        rules = self.rules
        while len(self._pool) <= rules.buffer and self._fill_and_pack():
            pass
        if not self._pool:
            self.ended = True
            return None
        index = 0
        if rules.buffer:
            index = hash64(rules.seed, rules.epoch, self.number, self.num_taken) % len(self._pool)
        self.num_taken += 1
        return self._pool.pop(index)

    def _fill_and_pack(self) -> bool:
        """Fill the window and pack it; return False if there is nothing left to pack."""
        while self._window.room > 0 and (self._waiting is not None or self._read_sequences()):
            self._add_waiting()
        if not self._window.members.size:
            return False
        self._pack_window()
        return True

    def _pack_window(self) -> None:
        self._snapshot = self._take_snapshot()
        window = self._window
        if self.rules.packing == "none":
            packs = [window.members[k : k + 1] for k in range(window.members.size)]
            window.members, window.lengths = window.members[:0], window.lengths[:0]
            window.waits = window.waits[:0]
            window.number += 1
        else:
            # A window that could not be filled is the last one.
            emission = window.pack(flush=window.room > 0)
            packs = [emission[k] for k in range(len(emission))]
        self._pool += packs

    def _assemble(self, refs: NDArray[np.int64]) -> Pack:
        """Return the tokens of a pack, and release its sequences."""
        blocks = [(self._blocks[ref >> _SHIFT], ref & _INDEX_MASK) for ref in refs.tolist()]
        # The range of tokens of each sequence in its batch.
        ranges = [
            (block.batch, int(block.batch.offsets[k]), int(block.batch.offsets[k + 1]))
            for block, k in blocks
        ]
        lengths = np.array([end - begin for _, begin, end in ranges], np.int32)
        mask = np.concatenate([batch.completion_mask[begin:end] for batch, begin, end in ranges])
        origins = [block.origins[block.batch.line_of[k]] for block, k in blocks]
        pack = Pack(
            input_ids=np.concatenate([batch.input_ids[begin:end] for batch, begin, end in ranges]),
            position_ids=make_position_ids(lengths, position_dtype(self.rules.limit.max_length)),
            completion_mask=mask,
            seq_lengths=lengths,
            origin=np.array(origins, np.int64),
            loss_weights=_concatenate_weights(ranges, mask),
        )
        self._release(refs)
        return pack

    def _release(self, refs: NDArray[np.int64]) -> None:
        """Forget the blocks without sequences in the lane."""
        for ref in refs.tolist():
            block = self._blocks[ref >> _SHIFT]
            block.num_remaining -= 1
            if block.num_remaining == 0:
                del self._blocks[ref >> _SHIFT]

    # --- blocks -----------------------------------------------------------------------------------

    def can_read_ahead(self) -> bool:
        """Return whether the window has room and the source has further blocks."""
        if self._waiting is not None:
            self._add_waiting()
        return not self.ended and not self._is_source_dry and self._window.room > 0

    def has_queued(self) -> bool:
        """Return whether the next block is in a queue of the reader."""
        return self.reader.has_queued(self.number, self._next_cursor)

    def read_ahead(self) -> None:
        """Read one block before it is needed; requires `can_read_ahead`.

        This changes no pack, since the window gets the same sequences in the same order.
        """
        self._read_block()
        if self._waiting is not None:
            self._add_waiting()

    def _read_sequences(self) -> bool:
        """Read blocks up to one with a sequence; return False if the source has ended."""
        while not self._is_source_dry:
            if self._read_block() and self._waiting is not None:
                return True
        return False

    def _read_block(self) -> bool:
        """Tokenize the next block, and hold any sequences; return False at the end."""
        cursor = self._next_cursor
        block = self._block_at(cursor)
        if block is None:
            self._is_source_dry = True
            return False
        batch = self._tokenize(block)
        self.counts.update(f"rejected.{rejected.reason}" for rejected in batch.rejected)
        add_counts(self.counts, self.first_origins, batch, block.origins)
        self.on_batch(block, batch)
        self._next_cursor = block.cursor_after(batch)
        sequences = len(batch.offsets) - 1
        if sequences:
            self._blocks[self._serial] = _ActiveBlock(cursor, batch, block.origins, sequences)
            self._waiting = (self._serial, 0)
            self._serial += 1
        self.after_block(self, block, sequences)
        return True

    def _add_waiting(self) -> None:
        """Add sequences of the last block to the window, up to its size."""
        assert self._waiting is not None
        serial, first = self._waiting
        batch = self._blocks[serial].batch
        count = len(batch.offsets) - 1
        last = min(count, first + self._window.room)
        self._window.add(
            (serial << _SHIFT) + np.arange(first, last), batch.lengths[first:last].astype(np.int32)
        )
        self._waiting = None if last == count else (serial, last)

    def _block_at(self, cursor: Cursor) -> Block | None:
        rules = self.rules
        return retry_with_backoff(
            lambda: self.reader.read(self.number, cursor),
            rules.retries,
            rules.pause,
            describe=lambda: f"{self.reader.reading} (lane {self.number} of the stream)",
            transient=(StorageError,),  # of a store that was reached before
        )

    def _tokenize(self, block: Block) -> TokenBatch:
        batches = [self._tokenize_group(group) for group in block.groups]
        positions = [group.positions for group in block.groups if group.positions is not None]
        return merge_batches(batches, positions) if positions else batches[0]

    def _tokenize_group(self, group: LineGroup) -> TokenBatch:
        # Without a seed, no records are compared with the reference encoder, whose loading would
        # delay the first packs. Small builds do not load it either.
        seed = xxhash.xxh3_64_intdigest(group.data) if self._window.number > 0 else None
        stages, transform, limit = self.preprocessor, group.transform, self.rules.limit
        return preprocess(stages, group.data, group.format, limit, seed=seed, transform=transform)

    # --- the state --------------------------------------------------------------------------------

    def _take_snapshot(self) -> LaneState:
        """Return the lane before its window is packed, with cursors for blocks."""
        index_of = {serial: index for index, serial in enumerate(self._blocks)}
        marks = [
            np.full(len(block.batch.offsets) - 1, _GONE, np.uint8)
            for block in self._blocks.values()
        ]
        # Mark the sequences in the window, one block at a time.
        serials, rows = self._window.members >> _SHIFT, self._window.members & _INDEX_MASK
        window_marks = (_CARRIED + self._window.waits).astype(np.uint8)
        for serial in np.unique(serials).tolist():
            in_block = serials == serial
            marks[index_of[serial]][rows[in_block]] = window_marks[in_block]
        if self._waiting is not None:
            marks[index_of[self._waiting[0]]][self._waiting[1] :] = _WAITING
        return {
            "taken": self.num_taken,
            "number": self._window.number,
            "next": self._next_cursor,
            "dry": self._is_source_dry,
            "blocks": [
                [block.cursor, m.tobytes().decode("ascii")]
                for block, m in zip(self._blocks.values(), marks, strict=True)
            ],
            "pool": [
                [[index_of[ref >> _SHIFT], ref & _INDEX_MASK] for ref in pack.tolist()]
                for pack in self._pool
            ],
            "counts": dict(self.counts),
        }

    def _changed_source(self) -> MismatchError:
        problem = f"lane {self.number} no longer has the records of its state"
        remedy = "resume with the data and settings of the saved state, or start a new stream"
        return MismatchError(problem, remedy=remedy)

    def _restore_block(self, serial: int, cursor: Cursor, marks: NDArray[np.uint8]) -> None:
        """Read a block of a snapshot again, and add its sequences to the window."""
        block = self._block_at(cursor)
        batch = None if block is None else self._tokenize(block)
        if block is None or batch is None or len(batch.offsets) - 1 != marks.size:
            raise self._changed_source()
        in_window = (marks >= _CARRIED) & (marks <= _CARRIED + MOST_WAITS)
        rows, waiting = np.flatnonzero(in_window), np.flatnonzero(marks == _WAITING)
        self._window.add(
            (serial << _SHIFT) + rows,
            batch.lengths[rows].astype(np.int32),
            marks[rows].astype(np.int32) - _CARRIED,
        )
        if waiting.size:
            self._waiting = (serial, int(waiting[0]))
        num_remaining = rows.size + waiting.size
        self._blocks[serial] = _ActiveBlock(cursor, batch, block.origins, num_remaining)


def _concatenate_weights(
    ranges: list[tuple[TokenBatch, int, int]], mask: NDArray[np.bool_]
) -> NDArray[np.float32] | None:
    """Return a pack's loss weights, 0 for untrained tokens; None if all are 1."""
    if all(batch.loss_weights is None for batch, _, _ in ranges):
        return None
    parts = [
        np.ones(end - begin, np.float32) if b.loss_weights is None else b.loss_weights[begin:end]
        for b, begin, end in ranges
    ]
    return np.concatenate(parts) * mask

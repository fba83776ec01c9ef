"""One lane of a stream: its blocks tokenized, its window packed, and where it stands, as a small
state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sftprep.core.hashing import hash64
from sftprep.core.types import Rejected, TokenBatch
from sftprep.errors import MismatchError
from sftprep.packing.window import MOST_WAITS, CarryingWindow
from sftprep.pipeline.preprocess import Preprocessor, preprocess
from sftprep.shards.reader import Pack
from sftprep.shards.schema import position_dtype
from sftprep.shards.writer import make_position_ids
from sftprep.stream.sources.base import Block, Cursor, Piece, Reader, retry_with_backoff
from sftprep.stream.sources.mixture import in_places

LaneState = dict[str, Any]
"""JSON. taken: packs handed out; window: what was held when the window was last packed, None before
the first time."""

_SHIFT = 32
_AWAY, _WAITING, _CARRIED = ord("."), ord("+"), ord("A")
"""A character a sequence of a block: gone; not in the window yet; in the window, carried so often
(A: never, B: once ...)."""


@dataclass(frozen=True, slots=True)
class LaneRules:
    """What all lanes of a pass have in common.

    buffer: packs that one is drawn from, 0 for the order of the window; retries, pause: how often a
    block is read again when its source raises, and the seconds before the first time, doubled each
    time.
    """

    capacity: int
    window: int
    packing: str
    seed: int
    epoch: int
    buffer: int
    retries: int
    pause: float


@dataclass(slots=True)
class _Held:
    """A block of which sequences are still here: left of them."""

    cursor: Cursor
    batch: TokenBatch
    origins: NDArray[np.int64]
    left: int = 0


@dataclass(slots=True)
class Lane:
    """The packs of one lane, in order.

    told: called with a block and each record of it that cannot be used; may raise. after_block:
    called with this lane after each block that it read, the block, and how many sequences it gave;
    may raise.
    """

    number: int
    reader: Reader
    preprocessor: Preprocessor
    rules: LaneRules
    told: Callable[[Block, Rejected], None]
    after_block: Callable[[Lane, Block, int], None]
    taken: int = 0
    ended: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    """What was counted in the blocks read so far, by the names that builds use."""

    _window: CarryingWindow = field(init=False)
    _blocks: dict[int, _Held] = field(default_factory=dict)
    _serial: int = 0
    _next: Cursor = None
    _dry: bool = False
    """The source has ended."""
    _waiting: tuple[int, int] | None = None
    """Serial of the last block, and its first sequence that is not in the window yet."""
    _pool: list[NDArray[np.int64]] = field(default_factory=list)
    """Packs that wait to be handed out, as references: serial of the block and number in it."""
    _snapshot: LaneState | None = None

    def __post_init__(self) -> None:
        rules = self.rules
        self._window = CarryingWindow(
            rules.capacity, rules.window, seed=hash64(rules.seed, rules.epoch), lane=self.number
        )

    def next(self) -> Pack | None:
        """The next pack, None at the end. Raises what the source raises again and again, and what
        `told` raises."""
        pack = self._draw()
        return None if pack is None else self._assembled(pack)

    def state(self) -> LaneState:
        """Where it stands, for `restore`. The part that is not a number is made anew only when a
        window was packed."""
        return {"taken": self.taken, "ended": self.ended, "window": self._snapshot}

    def restore(self, state: LaneState) -> Iterator[Cursor]:
        """Stand where another lane stood, at the end of the iterator.

        Blocks of which sequences were held are read and tokenized again: yields the cursor of each
        before it is read.
        """
        snapshot = state["window"]
        self.taken, self.ended = state["taken"], state["ended"]
        if snapshot is None:
            return
        self.counts = Counter(snapshot["counts"])
        if self.ended:
            self._snapshot = snapshot
            return
        self.taken = snapshot["taken"]
        self._next, self._dry, self._window.number = (
            snapshot["next"],
            snapshot["dry"],
            snapshot["number"],
        )
        for serial, (cursor, marks) in enumerate(snapshot["blocks"]):
            yield cursor
            self._put_back(serial, cursor, np.frombuffer(marks.encode("ascii"), np.uint8))
        self._serial = len(snapshot["blocks"])
        self._pool = [
            np.array([(s << _SHIFT) + k for s, k in pack], np.int64) for pack in snapshot["pool"]
        ]
        for serial in (s for pack in snapshot["pool"] for s, _ in pack):
            self._blocks[serial].left += 1
        self._pack_window()
        while self.taken < state["taken"]:
            pack = self._draw()
            if pack is None:
                raise self._other_data()
            self._release(pack)

    # --- packs ------------------------------------------------------------------------------------

    def _draw(self) -> NDArray[np.int64] | None:
        """References of the next pack, which counts as taken from now on."""
        while len(self._pool) <= self.rules.buffer and self._fill():
            pass
        if not self._pool:
            self.ended = True
            return None
        rules = self.rules
        at = (
            hash64(rules.seed, rules.epoch, self.number, self.taken) % len(self._pool)
            if rules.buffer
            else 0
        )
        self.taken += 1
        return self._pool.pop(at)

    def _fill(self) -> bool:
        """Fill the window and pack it; False where nothing is left to pack."""
        while self._window.room > 0 and (self._waiting is not None or self._read()):
            self._add_waiting()
        if not self._window.members.size:
            return False
        self._pack_window()
        return True

    def _pack_window(self) -> None:
        self._snapshot = self._taken_down()
        window = self._window
        if self.rules.packing == "none":
            packs = [window.members[k : k + 1] for k in range(window.members.size)]
            window.members, window.lengths, window.waits = (
                window.members[:0],
                window.lengths[:0],
                window.waits[:0],
            )
            window.number += 1
        else:
            emission = window.pack(flush=window.room > 0)
            packs = [emission[k] for k in range(len(emission))]
        self._pool += packs

    def _assembled(self, pack: NDArray[np.int64]) -> Pack:
        places = [(self._blocks[ref >> _SHIFT], ref & ((1 << _SHIFT) - 1)) for ref in pack.tolist()]
        bounds = [
            (held.batch, int(held.batch.offsets[k]), int(held.batch.offsets[k + 1]))
            for held, k in places
        ]
        lengths = np.array([end - begin for _, begin, end in bounds], np.int32)
        mask = np.concatenate([batch.completion_mask[begin:end] for batch, begin, end in bounds])
        made = Pack(
            input_ids=np.concatenate([batch.input_ids[begin:end] for batch, begin, end in bounds]),
            position_ids=make_position_ids(lengths, position_dtype(self.rules.capacity)),
            completion_mask=mask,
            seq_lengths=lengths,
            origin=np.array([held.origins[held.batch.origin[k]] for held, k in places], np.int64),
            loss_weights=_weights(bounds, mask),
        )
        self._release(pack)
        return made

    def _release(self, pack: NDArray[np.int64]) -> None:
        """Forget the blocks of which the last sequence has gone."""
        for ref in pack.tolist():
            held = self._blocks[ref >> _SHIFT]
            held.left -= 1
            if held.left == 0:
                del self._blocks[ref >> _SHIFT]

    # --- blocks -----------------------------------------------------------------------------------

    def can_read_ahead(self) -> bool:
        """Return False where the window is full, or nothing is left."""
        if self._waiting is not None:
            self._add_waiting()
        return not self.ended and not self._dry and self._window.room > 0

    def has_queued(self) -> bool:
        """Whether the next block is in a queue of the reader."""
        return self.reader.has_queued(self.number, self._next)

    def read_ahead(self) -> None:
        """Read one block before it is needed, where `can_read_ahead`.

        The packs are the same with and without it: the window gets the same sequences.
        """
        self._read_block()
        if self._waiting is not None:
            self._add_waiting()

    def _read(self) -> bool:
        """Tokenize blocks up to one that has a sequence; False where the source has ended."""
        while not self._dry:
            if self._read_block() and self._waiting is not None:
                return True
        return False

    def _read_block(self) -> bool:
        """Tokenize the next block, and hold it if it has a sequence; False where there is none."""
        cursor = self._next
        block = self._block_at(cursor)
        if block is None:
            self._dry = True
            return False
        batch = self._prepared(block)
        for rejected in batch.rejected:
            self.counts[f"rejected.{rejected.reason}"] += 1
        self.counts.update(batch.counts)
        for rejected in batch.rejected:
            self.told(block, rejected)
        self._next = block.after
        sequences = len(batch.offsets) - 1
        if sequences:
            self._blocks[self._serial] = _Held(cursor, batch, block.origins, sequences)
            self._waiting = (self._serial, 0)
            self._serial += 1
        self.after_block(self, block, sequences)
        return True

    def _add_waiting(self) -> None:
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
        """Read a block, again where its source raises."""
        rules = self.rules
        what = f"lane {self.number} of the stream"
        return retry_with_backoff(
            lambda: self.reader.read(self.number, cursor),
            rules.retries,
            rules.pause,
            what=lambda: f"{self.reader.reading} ({what})",
        )

    def _prepared(self, block: Block) -> TokenBatch:
        batches = [self._prepared_piece(piece) for piece in block.pieces]
        places = [piece.places for piece in block.pieces if piece.places is not None]
        return in_places(batches, places) if places else batches[0]

    def _prepared_piece(self, piece: Piece) -> TokenBatch:
        # The first packs do not wait for the reference encoder, as those of small builds do not.
        seed = xxhash.xxh3_64_intdigest(piece.data) if self._window.number > 0 else None
        return preprocess(self.preprocessor, piece.data, piece.format, seed=seed)

    # --- the state --------------------------------------------------------------------------------

    def _taken_down(self) -> LaneState:
        """The window before it is packed, by the cursors of its blocks."""
        place = {serial: number for number, serial in enumerate(self._blocks)}
        marks = [
            np.full(len(held.batch.offsets) - 1, _AWAY, np.uint8) for held in self._blocks.values()
        ]
        serials, rows = self._window.members >> _SHIFT, self._window.members & ((1 << _SHIFT) - 1)
        signs = (_CARRIED + self._window.waits).astype(np.uint8)
        for serial in np.unique(serials).tolist():
            of = serials == serial
            marks[place[serial]][rows[of]] = signs[of]
        if self._waiting is not None:
            marks[place[self._waiting[0]]][self._waiting[1] :] = _WAITING
        return {
            "taken": self.taken,
            "number": self._window.number,
            "next": self._next,
            "dry": self._dry,
            "blocks": [
                [held.cursor, m.tobytes().decode("ascii")]
                for held, m in zip(self._blocks.values(), marks, strict=True)
            ],
            "pool": [
                [[place[ref >> _SHIFT], ref & ((1 << _SHIFT) - 1)] for ref in pack.tolist()]
                for pack in self._pool
            ],
            "counts": dict(self.counts),
        }

    def _other_data(self) -> MismatchError:
        return MismatchError(
            f"lane {self.number} does not hold the records any more that its state names",
            remedy="resume with the data and settings that the state was made with, or begin a new"
            " stream",
        )

    def _put_back(self, serial: int, cursor: Cursor, marks: NDArray[np.uint8]) -> None:
        """Read a block again, and hold what was held of it."""
        block = self._block_at(cursor)
        batch = None if block is None else self._prepared(block)
        if block is None or batch is None or len(batch.offsets) - 1 != marks.size:
            raise self._other_data()
        inside = (marks >= _CARRIED) & (marks <= _CARRIED + MOST_WAITS)
        rows, waiting = np.flatnonzero(inside), np.flatnonzero(marks == _WAITING)
        self._blocks[serial] = _Held(cursor, batch, block.origins, 0)
        refs = (serial << _SHIFT) + rows
        self._window.add(
            refs, batch.lengths[rows].astype(np.int32), marks[rows].astype(np.int32) - _CARRIED
        )
        if waiting.size:
            self._waiting = (serial, int(waiting[0]))
        self._blocks[serial].left = rows.size + waiting.size


def _weights(
    bounds: list[tuple[TokenBatch, int, int]], mask: NDArray[np.bool_]
) -> NDArray[np.float32] | None:
    """What the tokens of a pack weigh, None where no sequence in it comes from a block that says
    so."""
    if all(batch.loss_weights is None for batch, _, _ in bounds):
        return None
    parts = [
        np.ones(end - begin, np.float32) if b.loss_weights is None else b.loss_weights[begin:end]
        for b, begin, end in bounds
    ]
    return np.concatenate(parts) * mask

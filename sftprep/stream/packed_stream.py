"""Packs made while they are trained on, in an order that does not depend on who makes them."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftprep.config.build import BuildConfig, Order
from sftprep.core.hashing import digest
from sftprep.core.types import Rejected
from sftprep.errors import ConfigError, EmptyInput, MismatchError, RecordError, TooManyRejected
from sftprep.pipeline.preprocess import Preprocessor
from sftprep.pipeline.setup import prepare_recipe
from sftprep.shards.reader import Pack
from sftprep.shards.schema import position_dtype
from sftprep.stream.backlog import Backlog
from sftprep.stream.lane import Lane, LaneRules, LaneState
from sftprep.stream.sources.base import Block, LaneAssignment, retry_with_backoff
from sftprep.stream.sources.open import open_source
from sftprep.stream.state import check_state, states_of

WINDOW = 4096
SHUFFLE_BUFFER = 256

State = dict[str, Any]
"""JSON: what `PackedStream.state_dict` gives."""

_STATE_VERSION = 1
_KEPT_REJECTED = 100
_ENOUGH_RECORDS = 1000


@dataclass(frozen=True, slots=True)
class Placed:
    """A pack, its place (its number in its lane), and the state of its lane after it."""

    pack: Pack
    lane: int
    number: int
    epoch: int
    state: LaneState


class PackedStream:
    """Raw records as packs, tokenized and packed as they are asked for. Iterate it: one pass;
    again: the next.

    The source is dealt to `lanes`, each of which packs its records in a window of its own. The
    order of the packs is one of each lane in turn: it depends on the source, the settings, the
    epoch and the seed, and not on how many ranks and loader workers there are, which only share out
    the lanes. The packs are those of `build` with the same --pack-window and
    --order keep.

    source: see `stream.sources.open.open_source`. tokenizer: folder or Hub name, where config has
    none. config: settings as of a build. window, lanes: win over those of config; without any,
    4096 and 16. order: "keep"; or "shuffle": blocks of plain files are read in a random order, and
    packs are drawn from a buffer of 256 a lane. rank, world_size: the lanes k with k % world_size
    == rank are ours. retries, retry_wait: how often a block is read again when its source raises,
    and the seconds before the first time, doubled each time. Raises ConfigError, and what reading
    the first records and loading the tokenizer raise.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: str | None = None,
        config: BuildConfig | None = None,
        *,
        window: int | None = None,
        order: Order = "keep",
        lanes: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        retries: int = 4,
        retry_wait: float = 1.0,
    ) -> None:
        self.config = _settled(config or BuildConfig(), tokenizer, window, order, lanes)
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"rank is {rank} of {world_size}", remedy="give a rank from 0 to world_size - 1"
            )
        count = self.config.pack.lanes
        if world_size > count:
            raise ConfigError(
                f"{count} lanes cannot be shared out to {world_size} ranks",
                remedy=f"give lanes={world_size}",
            )
        self.recipe, _ = prepare_recipe(self.config)
        self.source = retry_with_backoff(
            lambda: open_source(source, self.config, self.recipe),
            retries,
            retry_wait,
            what=lambda: "the start of the source",
        )
        self.retries, self.retry_wait = retries, retry_wait
        self.owned: tuple[int, ...] = tuple(range(rank, count, world_size))
        """Lanes that are ours."""
        self.epoch = 0
        """Number of the pass that is being made, from 0."""
        self.rejected: deque[tuple[str, int, Rejected]] = deque(maxlen=_KEPT_REJECTED)
        """The last records that were set aside: where, line or row, and why."""
        self._lanes: dict[int, Lane] | None = None
        self._states: dict[int, LaneState] = {}
        self._loaded = False
        self._preprocessor: Preprocessor | None = None
        self._threads = True

    # --- packs ------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Pack]:
        """The rest of this pass. After its end the next iteration makes another one.

        A state that was taken at the end of a pass, and loaded, gives nothing first: that pass has
        nothing left.
        """
        return (placed.pack for placed in self.placed())

    def placed(self) -> Iterator[Placed]:
        """As iterating, with the place of each pack and the state of its lane."""
        if self._ended and not self._loaded:
            self.set_epoch(self.epoch + 1)
        self._loaded = False
        lanes, warm = self._opened(), False
        while going := [lane for lane in lanes.values() if not lane.ended]:
            lane = min(going, key=lambda one: (one.taken, one.number))
            pack = lane.next()
            if not warm:
                warm = True
                threading.Thread(target=_warm_packing, daemon=True).start()
            if pack is not None:
                yield Placed(pack, lane.number, lane.taken - 1, self.epoch, lane.state())
        self._check_rejected(at_end=True)
        if not self.counts.get("sequences") and len(self.owned) == self.config.pack.lanes:
            raise EmptyInput(
                "a whole pass gave no sequence that can be trained on"
                f" ({self.counts or 'no record'})",
                remedy=(
                    "check --format, --train-on and --max-length, and that the source is the one"
                    " you meant"
                ),
            )

    def padding(self) -> Pack:
        """A pack that trains nothing, for a rank whose lanes have ended before those of others. Its
        origin is -1."""
        token = self.recipe.tokenizer.eos_token_id or 0
        return Pack(
            input_ids=np.full(2, token, np.int32),
            position_ids=np.arange(2, dtype=position_dtype(self.max_length)),
            completion_mask=np.zeros(2, np.bool_),
            seq_lengths=np.array([2], np.int32),
            origin=np.array([-1], np.int64),
        )

    @property
    def max_length(self) -> int:
        """Tokens that a pack can hold."""
        return self.recipe.max_length

    @property
    def counts(self) -> dict[str, int]:
        """What was counted in this pass, in our lanes: lines, records, sequences, tokens,
        rejected.REASON and so on."""
        total: Counter[str] = Counter()
        for lane in (self._lanes or {}).values():
            total.update(lane.counts)
        return dict(total)

    def locate(self, origin: int) -> tuple[str, int]:
        """Where the record of a sequence stands: the file (or what the source is called), and the
        line or row, from 1."""
        return self.source.locate(origin)

    # --- who makes which, and from where ----------------------------------------------------------

    def share(self, index: int, of: int, *, threads: bool = True) -> PackedStream:
        """Our lanes shared out once more, to loader workers: a stream of every `of`-th of them,
        standing where this one does.

        Where there are more workers than lanes, some get none. threads: the encoder may use every
        core, which is not for processes that were forked.
        """
        part = object.__new__(PackedStream)
        part.__dict__.update(self.__dict__)
        part.owned = self.owned[index::of]
        part.rejected = deque(maxlen=_KEPT_REJECTED)
        part._lanes, part._states = None, self._lane_states()
        if threads != self._threads:
            part._threads, part._preprocessor = threads, None
        return part

    def to_hf(self, *, shards: int = 1, epochs: int | None = 1) -> Any:
        """This stream as a `datasets.IterableDataset` with the columns of shards, beginning where
        this one stands.

        shards: into how many parts it can be split by loader workers or ranks, each in turn over
        its own lanes; 1 keeps the order of the stream. epochs: passes, None for no end. Its own
        `state_dict` goes on by passing again what was read; for a resume that costs nothing use
        `state_dict` of the stream, or `sftprep.torch`. Columns of weights are not given.
        """
        from sftprep.stream.hf_dataset import to_hf

        return to_hf(self, shards=shards, epochs=epochs)

    def set_epoch(self, epoch: int) -> None:
        """Begin pass number `epoch`; nothing happens where it is being made already."""
        if epoch != self.epoch:
            self.epoch, self._lanes, self._states, self._loaded = epoch, None, {}, False

    def state_dict(self) -> State:
        """Where the stream stands: JSON, with positions and counters and no data."""
        states = self._lane_states()
        lanes = {str(lane): states[lane] for lane in self.owned if lane in states}
        return {
            "version": _STATE_VERSION,
            "stream": self.identity,
            "epoch": self.epoch,
            "lanes": lanes,
        }

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Stand where a stream with this state stood; of several ranks, give the states of all.

        The number of ranks and workers may be another than then. Raises MismatchError for the state
        of another stream, and ConfigError for what is no state.
        """
        states = states_of(state)
        for one in states:
            if one.get("version") != _STATE_VERSION or one.get("stream") != self.identity:
                raise MismatchError(
                    "the state is one of another stream",
                    remedy="give the source, tokenizer and settings it was made with",
                )
            check_state(one, self.config.pack.lanes)
        epochs = {one["epoch"] for one in states}
        latest = max(epochs, default=0)
        # A rank may have begun the next pass when another had not ended the last one: its lanes
        # have ended then.
        found = {
            int(lane): kept
            for one in states
            if one["epoch"] == latest
            for lane, kept in one["lanes"].items()
        }
        self.epoch, self._lanes, self._states, self._loaded = latest, None, found, True

    @property
    def identity(self) -> str:
        """Digest of what decides the packs: source, recipe, packing."""
        pack = self.config.pack
        settings = [
            pack.packing,
            pack.pack_window,
            pack.order,
            pack.lanes,
            pack.seed,
            self.config.output.on_bad_record,
        ]
        return digest(self.recipe.digest, self.source.identity, settings)[:32]

    @property
    def _ended(self) -> bool:
        """Whether this pass has been made to its end."""
        states = self._lane_states()
        return all(lane in states and states[lane]["ended"] for lane in self.owned)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_lanes": None,
            "_states": self._lane_states(),
            "_preprocessor": None,
        }

    def _lane_states(self) -> dict[int, LaneState]:
        if self._lanes is None:
            return self._states
        return {**self._states, **{number: lane.state() for number, lane in self._lanes.items()}}

    def _opened(self) -> dict[int, Lane]:
        if self._lanes is None:
            pack = self.config.pack
            starts = {
                lane: start
                for lane in self.owned
                if (start := _first_cursor(self._states.get(lane))) is not None
            }
            shuffle = pack.order == "shuffle"
            backlog = Backlog()
            reader = backlog.reader = self.source.open(
                LaneAssignment(
                    lanes=self.owned,
                    of=pack.lanes,
                    epoch=self.epoch,
                    seed=pack.seed,
                    shuffle=shuffle,
                    start=starts,
                    on_queued=backlog.on_queued,
                )
            )
            rules = LaneRules(
                capacity=self.max_length,
                window=pack.pack_window or WINDOW,
                packing=pack.packing,
                seed=pack.seed,
                epoch=self.epoch,
                buffer=SHUFFLE_BUFFER if shuffle else 0,
                retries=self.retries,
                pause=self.retry_wait,
            )
            if self._preprocessor is None:
                self._preprocessor = Preprocessor(self.recipe, threads=self._threads)
            lanes = {
                number: Lane(
                    number, reader, self._preprocessor, rules, self._tell, backlog.after_block
                )
                for number in self.owned
            }
            backlog.restore(lanes, self._states)
            self._lanes = backlog.lanes = lanes
        return self._lanes

    # --- records that cannot be used --------------------------------------------------------------

    def _tell(self, block: Block, rejected: Rejected) -> None:
        where, line = self.source.locate(int(block.origins[rejected.line]))
        if self.config.output.on_bad_record == "error":
            raise RecordError(
                file=where,
                line=line,
                column=rejected.column,
                reason=rejected.reason,
                message=rejected.message,
                excerpt=rejected.excerpt,
            )
        self.rejected.append((where, line, rejected))
        self._check_rejected(at_end=False)

    def _check_rejected(self, *, at_end: bool) -> None:
        counts, output = self.counts, self.config.output
        rejected = sum(count for name, count in counts.items() if name.startswith("rejected."))
        records = counts.get("records", 0)
        # A share of the first few records says nothing.
        if rejected > output.rejected_limit(records if at_end else max(records, _ENOUGH_RECORDS)):
            where, line, last = self.rejected[-1] if self.rejected else ("", 0, None)
            raise TooManyRejected(
                f"{rejected:,} of {records:,} records were rejected, more than --max-rejected"
                f" {output.max_rejected}"
                + (f"; the last is {where}:{line}: {last.message}" if last else ""),
                remedy="mend the records, or raise --max-rejected",
            )


def open_stream(
    source: Any, *, rank: int = 0, world_size: int = 1, **settings: Any
) -> PackedStream:
    """A PackedStream with flat settings, by the names of the command line: `open_stream("a.jsonl",
    tokenizer="gpt2", max_length=2048)`.

    Raises ConfigError for an unknown name, with the nearest known one.
    """
    return PackedStream(
        source,
        config=BuildConfig.of(**settings),
        order=settings.get("order", "keep"),
        rank=rank,
        world_size=world_size,
    )


def _settled(
    config: BuildConfig, tokenizer: str | None, window: int | None, order: Order, lanes: int | None
) -> BuildConfig:
    """The settings, with those given beside them. What is written to files is shuffled by default;
    a stream is not."""
    left_out = {
        "limit": config.read.limit is not None,
        "duplicates": config.read.duplicates != "keep",
        "eval_fraction": bool(config.evaluation.eval_fraction),
        "eval_input": bool(config.evaluation.eval_input),
        "eval_split": config.evaluation.eval_split is not None,
    }
    for name, given in left_out.items():
        if given:
            raise ConfigError(
                f"{name} is for builds, which know all of their records",
                remedy=f"leave {name} out, or build shards",
            )
    if config.pack.packing not in ("bfd", "none"):
        raise ConfigError(
            f"a stream cannot pack by {config.pack.packing!r}",
            remedy="choose bfd or none, or build shards",
        )
    size = None if config.pack.packing == "none" else WINDOW if window is None else window
    packing = dataclasses.replace(
        config.pack,
        pack_window=size if window is not None else config.pack.pack_window or size,
        order=order,
        lanes=config.pack.lanes if lanes is None else lanes,
    )
    tokenize = (
        dataclasses.replace(config.tokenize, tokenizer=tokenizer) if tokenizer else config.tokenize
    )
    return dataclasses.replace(config, pack=packing, tokenize=tokenize)


def _first_cursor(state: LaneState | None) -> Any:
    """Where a lane begins to read again, None at its first block."""
    window = state["window"] if state is not None else None
    if window is None:
        return None
    return window["blocks"][0][0] if window["blocks"] else window["next"]


def _warm_packing() -> None:
    # The compiled packer takes half a second to load. The first windows do without, so that passes
    # while they are trained on.
    from sftprep.packing import bestfit  # noqa: F401

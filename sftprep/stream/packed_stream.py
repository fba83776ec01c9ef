"""A stream of packs, tokenized and packed on demand.

1. The records of the source are assigned to `lanes`. Each lane tokenizes and packs its own records
   (`lane.py`), so its packs do not depend on other lanes.
2. The order of the stream is one pack of each lane in turn.
3. Ranks and loader workers each own some of the lanes. Neither the packs nor their order depend on
   how many ranks and workers there are.
4. A state contains one small state per lane, and can be loaded by any number of ranks and workers.
"""

from __future__ import annotations

import heapq
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftprep.config.build import BuildConfig, Order
from sftprep.core.hashing import digest
from sftprep.core.types import Rejected, TokenBatch
from sftprep.errors import ConfigError, MismatchError, setting
from sftprep.pipeline.passes.preprocess import Preprocessor
from sftprep.pipeline.prepare.setup import length_limit, prepare_recipe
from sftprep.shards.reading.pack import Pack
from sftprep.shards.schema import position_dtype
from sftprep.stream.backlog import Backlog
from sftprep.stream.lane import Lane, LaneRules, LaneState
from sftprep.stream.rejections import Rejections
from sftprep.stream.settings import WINDOW, stream_config
from sftprep.stream.sources.base import Block, LaneAssignment, retry_with_backoff
from sftprep.stream.sources.open import open_source
from sftprep.stream.state import check_state, first_cursor, states_of

SHUFFLE_BUFFER = 256
"""Packs of a lane from which one is drawn at random with order="shuffle"."""

State = dict[str, Any]
"""JSON that `PackedStream.state_dict` returns."""

_STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Placed:
    """A pack with its position in the stream.

    Attributes:
        pack: The pack.
        lane: The lane of the pack.
        number: The number of the pack in its lane, from 0.
        epoch: The pass.
        state: The state of the lane after the pack.
    """

    pack: Pack
    lane: int
    number: int
    epoch: int
    state: LaneState


class PackedStream:
    """A stream of packs of raw records; each iteration is one pass.

    The packs are those of `sftprep build` with the same `pack_window` and `order="keep"`.

    Args:
        source: The records; see `stream.sources.open.open_source`.
        tokenizer: Folder or name on the Hub, if `config` has none.
        config: The settings, as for a build.
        window, lanes: Override those of `config`; the defaults are 4096 and 16.
        order: "keep"; or "shuffle": blocks of uncompressed files are read in a random order, and
            packs are drawn from a buffer of 256 per lane.
        rank, world_size: This stream owns the lanes k with k % world_size == rank.
        retries, retry_wait: How often a block is read again if its source raises, and the seconds
            before the first retry, which double each time.

    Attributes:
        owned, epoch: The lanes of this stream; the number of the current pass, from 0.

    Raises:
        ConfigError: A setting is invalid or not supported by streams.
        SftprepError: The first records or the tokenizer cannot be read.

    Example:
        for pack in PackedStream("chats.jsonl", "Qwen/Qwen3-8B"):
            pack.input_ids, pack.position_ids, pack.completion_mask
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
        self.config = stream_config(config or BuildConfig(), tokenizer, window, order, lanes)
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"rank is {rank} of {world_size}", remedy="use a rank from 0 to world_size - 1"
            )
        num_lanes = self.config.pack.lanes
        if world_size > num_lanes:
            raise ConfigError(
                f"{num_lanes} lanes cannot be divided among {world_size} ranks",
                remedy=f"use {setting('lanes', world_size)}",
            )
        self.recipe, _ = prepare_recipe(self.config)
        self.limit = length_limit(self.config, self.recipe.tokenizer)
        self.source = retry_with_backoff(
            lambda: open_source(source, self.config, self.recipe),
            retries,
            retry_wait,
            describe=lambda: "the start of the source",
        )
        self.retries, self.retry_wait = retries, retry_wait
        self.owned: tuple[int, ...] = tuple(range(rank, num_lanes, world_size))
        self.epoch = 0
        self._rejections = Rejections(self.config, self.max_length)
        self._lanes: dict[int, Lane] | None = None  # opened by the first iteration
        self._states: dict[int, LaneState] = {}  # of the lanes before they are opened
        self._is_loaded = False  # a state was loaded, and no iteration began since
        self._preprocessor: Preprocessor | None = None
        self._use_threads = True  # the encoder may use all cores

    # --- packs ------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Pack]:
        """Yield the rest of the current pass; after its end, the next pass.

        After loading a state from the end of a pass, the first iteration yields nothing, since
        that pass has no packs left.
        """
        return (placed.pack for placed in self.placed())

    def placed(self) -> Iterator[Placed]:
        """Iterate as over the stream itself, with the position of each pack.

        Raises:
            RecordError: A record cannot be used, and bad records are errors.
            TooManyRejected: Too many records were quarantined.
            EmptyInput: The pass, or one lane, has too few sequences that can be trained on.
            SourceError: The source raised at every attempt.
        """
        if self._has_ended and not self._is_loaded:
            self.set_epoch(self.epoch + 1)
        self._is_loaded = False
        lanes, is_first = self._open_lanes(), True
        # The lane with the fewest packs taken is next; of several, the one with the lowest number.
        queue = sorted((lane.num_taken, lane.number) for lane in lanes.values() if not lane.ended)
        while queue:
            lane = lanes[heapq.heappop(queue)[1]]
            pack = lane.next_pack()
            if not lane.ended:
                heapq.heappush(queue, (lane.num_taken, lane.number))
            if is_first:
                is_first = False
                threading.Thread(target=_load_packing_kernels, daemon=True).start()
            if pack is not None:
                yield Placed(pack, lane.number, lane.num_taken - 1, self.epoch, lane.state())
        self._rejections.check(self.counts, at_end=True)
        self._rejections.warn_of_cuts(self.counts, at_end=True)
        # Only a stream of all lanes knows that the whole source is empty.
        if not self.counts.get("sequences") and len(self.owned) == self.config.pack.lanes:
            firsts = [item for lane in lanes.values() for item in lane.first_origins.items()]
            raise self._rejections.empty_pass(self.counts, firsts, self.locate)

    def padding(self) -> Pack:
        """Return a pack without trained tokens (origin -1), for ranks at their end."""
        return Pack(
            input_ids=np.full(2, self.recipe.tokenizer.eos_token_id or 0, np.int32),
            position_ids=np.arange(2, dtype=position_dtype(self.max_length)),
            completion_mask=np.zeros(2, np.bool_),
            seq_lengths=np.array([2], np.int32),
            origin=np.array([-1], np.int64),
        )

    @property
    def max_length(self) -> int:
        """Return the maximum number of tokens in a pack."""
        return self.limit.max_length

    @property
    def counts(self) -> dict[str, int]:
        """Return counts of this pass in the owned lanes: records, rejected.REASON, etc."""
        total: Counter[str] = Counter()
        for lane in (self._lanes or {}).values():
            total.update(lane.counts)
        return dict(total)

    @property
    def first_dropped(self) -> dict[str, tuple[str, int]]:
        """Return name and line of the first dropped record, by `dropped.REASON`."""
        lanes = (self._lanes or {}).values()
        found = sorted((i for lane in lanes for i in lane.first_origins.items()), reverse=True)
        return {k: self.locate(origin) for k, origin in found if k.startswith("dropped.")}

    @property
    def rejected(self) -> deque[tuple[str, int, Rejected]]:
        """Return the last 100 quarantined records: input, line or row, and reason."""
        return self._rejections.latest

    def locate(self, origin: int) -> tuple[str, int]:
        """Return the file or source of an origin, and the line or row, from 1."""
        return self.source.locate(origin)

    # --- owned lanes, and the position in the stream ----------------------------------------------

    def share(self, index: int, num_shares: int, *, threads: bool = True) -> PackedStream:
        """Return a stream with a part of the owned lanes, at the current position.

        Args:
            index: The number of the part, from 0.
            num_shares: The number of parts, such as the loader workers of a rank. Parts beyond the
                number of lanes own no lane.
            threads: Whether the encoder may use all cores, which forked processes cannot.
        """
        part = object.__new__(PackedStream)
        part.__dict__.update(self.__dict__)
        part.owned = self.owned[index::num_shares]
        part._rejections = Rejections(self.config, self.max_length)
        part._lanes, part._states = None, self._lane_states()
        if threads != self._use_threads:
            part._use_threads, part._preprocessor = threads, None
        return part

    def to_hf(self, *, shards: int = 1, epochs: int | None = 1) -> Any:
        """Return this stream as a `datasets.IterableDataset`.

        It starts at the current position. It has the columns of shards, without loss weights. Its
        own `state_dict` resumes by iterating over the earlier rows again; for an immediate resume,
        use `state_dict` of the stream, or `sftprep.torch`.

        Args:
            shards: The number of parts among which loader workers or ranks can divide the dataset,
                each with its own lanes. 1 keeps the order of the stream.
            epochs: The number of passes; None for no end.
        """
        from sftprep.stream.hf_dataset import to_hf

        return to_hf(self, shards=shards, epochs=epochs)

    def set_epoch(self, epoch: int) -> None:
        """Start the given pass, unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self._lanes, self._states, self._is_loaded = epoch, None, {}, False

    def state_dict(self) -> State:
        """Return the position in the stream as JSON: cursors and counters, without data."""
        states = self._lane_states()
        lanes = {str(lane): states[lane] for lane in self.owned if lane in states}
        return {
            "version": _STATE_VERSION,
            "stream": self.identity,
            "epoch": self.epoch,
            "lanes": lanes,
        }

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Resume from a state.

        Args:
            state: The state of a stream, or the states of all ranks. The number of ranks and
                workers may differ from that of this stream.

        Raises:
            MismatchError: The state is from a stream with another source, tokenizer or settings.
            ConfigError: The argument is not a state.
        """
        states = states_of(state)
        for rank_state in states:
            is_version = rank_state.get("version") == _STATE_VERSION
            if not is_version or rank_state.get("stream") != self.identity:
                raise MismatchError(
                    "the state is from another stream",
                    remedy="use the source, tokenizer, functions and settings with which it was"
                    f" saved; a function without a stable digest needs {setting('transform_id')}",
                )
            check_state(rank_state, self.config.pack.lanes)
        # A rank may have started the next pass while another one was at the end of the last: the
        # lanes of the latter have ended, and start the next pass as well.
        latest = max((rank_state["epoch"] for rank_state in states), default=0)
        lanes = {
            int(lane): lane_state
            for rank_state in states
            if rank_state["epoch"] == latest
            for lane, lane_state in rank_state["lanes"].items()
        }
        self.epoch, self._lanes, self._states, self._is_loaded = latest, None, lanes, True

    @property
    def identity(self) -> str:
        """Return the digest of the packs' inputs: source, recipe and packing."""
        pack = self.config.pack
        settings: list[object] = [pack.packing, pack.pack_window, pack.order, pack.lanes, pack.seed]
        settings += [self.config.output.on_bad_record, self.limit]
        return digest(self.recipe.cache_key, self.source.identity, settings)[:32]

    @property
    def _has_ended(self) -> bool:
        """Return whether the current pass has no packs left in the owned lanes."""
        states = self._lane_states()
        return all(lane in states and states[lane]["ended"] for lane in self.owned)

    def __getstate__(self) -> dict[str, Any]:
        # Open lanes have iterators, which cannot be pickled; the copy restores them from states.
        closed = {"_lanes": None, "_states": self._lane_states(), "_preprocessor": None}
        return {**self.__dict__, **closed}

    def _lane_states(self) -> dict[int, LaneState]:
        if self._lanes is None:
            return self._states
        return {**self._states, **{number: lane.state() for number, lane in self._lanes.items()}}

    def _open_lanes(self) -> dict[int, Lane]:
        """Return the owned lanes, opening the source and restoring them if necessary."""
        if self._lanes is not None:
            return self._lanes
        pack = self.config.pack
        first_cursors = {lane: first_cursor(self._states.get(lane)) for lane in self.owned}
        shuffle = pack.order == "shuffle"
        backlog = Backlog()
        reader = backlog.reader = self.source.open(
            LaneAssignment(
                lanes=self.owned,
                num_lanes=pack.lanes,
                epoch=self.epoch,
                seed=pack.seed,
                shuffle=shuffle,
                start={k: cursor for k, cursor in first_cursors.items() if cursor is not None},
                on_queued=backlog.on_queued,
            )
        )
        rules = LaneRules(
            limit=self.limit,
            window=pack.pack_window or WINDOW,
            packing=pack.packing,
            seed=pack.seed,
            epoch=self.epoch,
            buffer=SHUFFLE_BUFFER if shuffle else 0,
            retries=self.retries,
            pause=self.retry_wait,
        )
        if self._preprocessor is None:
            self._preprocessor = Preprocessor(self.recipe, threads=self._use_threads)
        stages = self._preprocessor
        lanes = {
            number: Lane(number, reader, stages, rules, self._examine, backlog.after_block)
            for number in self.owned
        }
        backlog.restore(lanes, self._states)
        self._lanes = backlog.lanes = lanes
        return lanes

    def _examine(self, block: Block, batch: TokenBatch) -> None:
        self._rejections.examine(block, batch, self.locate, lambda: self.counts)


def open_stream(
    source: Any, *, rank: int = 0, world_size: int = 1, **settings: Any
) -> PackedStream:
    """Return a PackedStream with flat settings.

    Args:
        source, rank, world_size: See `PackedStream`.
        **settings: The fields of `BuildConfig` by name.

    Raises:
        ConfigError: A setting is unknown (the remedy is the most similar name) or invalid.

    Example:
        open_stream("a.jsonl", tokenizer="gpt2", max_length=2048)
    """
    return PackedStream(
        source,
        config=BuildConfig.of(**settings),
        order=settings.get("order", "keep"),
        rank=rank,
        world_size=world_size,
    )


def _load_packing_kernels() -> None:
    # Loading the compiled packer takes half a second. The first windows are packed without it, so
    # it is loaded while their packs are trained on.
    from sftprep.packing import bestfit  # noqa: F401

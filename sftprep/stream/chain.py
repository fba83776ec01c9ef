"""Sources one after the other, and sources mixed by weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sftprep.errors import ConfigError
from sftprep.stream.blocks import PART_BITS, Block, Cursor, Dealt, Reader, Source

Stop = Literal["all", "first"]


@dataclass(frozen=True)
class Chain:
    """Inputs in the order given. first_parts: number of the first part of each."""

    sources: tuple[Source, ...]
    first_parts: tuple[int, ...]

    @property
    def identity(self) -> Any:
        """Those of its inputs."""
        return [source.identity for source in self.sources]

    def open(self, dealt: Dealt) -> Reader:
        """An input is opened when a lane comes to it."""
        return _ChainReader(self, dealt)

    def locate(self, origin: int) -> tuple[str, int]:
        """As the input says that it is of."""
        part = origin >> PART_BITS
        return self.sources[max(k for k, first in enumerate(self.first_parts) if first <= part)].locate(origin)


class _ChainReader:
    """Cursor: number of the input, and the cursor in it."""

    def __init__(self, source: Chain, dealt: Dealt) -> None:
        self.source, self.dealt = source, dealt
        self._readers: dict[int, Reader] = {}

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        number, inner = cursor or (0, None)
        while number < len(self.source.sources):
            block = self._reader(number).read(lane, inner)
            if block is not None:
                return Block(block.data, block.format, block.origins, [number, block.after])
            number, inner = number + 1, None
        return None

    def _reader(self, number: int) -> Reader:
        if number not in self._readers:
            starts = {lane: self.dealt.start.get(lane) or (0, None) for lane in self.dealt.lanes}
            lanes = tuple(lane for lane in self.dealt.lanes if starts[lane][0] <= number)
            begin = {lane: starts[lane][1] for lane in lanes if starts[lane][0] == number}
            d = self.dealt
            self._readers[number] = self.source.sources[number].open(Dealt(lanes, d.of, d.epoch, d.seed, d.shuffle, begin))
        return self._readers[number]


@dataclass(frozen=True)
class Mixture:
    """Several sources side by side: of each lane's records, source k gives the share weights[k] / sum(weights).

    sources: whatever a stream takes; weights: positive. stop: "all", a source that has ended leaves its share to the others
    until all have; "first", the pass ends with the first that ends. Blocks are taken in turn, so that the shares hold within a
    block of each source, and the same in every run.
    """

    sources: Sequence[Any]
    weights: Sequence[float]
    stop: Stop = "all"

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.weights) or not self.sources:
            raise ConfigError(
                f"{len(self.sources)} sources have {len(self.weights)} weights", remedy="give one weight for each source"
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ConfigError(f"the weights are {list(self.weights)}", remedy="give positive numbers")
        if self.stop not in ("all", "first"):
            raise ConfigError(f"stop is {self.stop!r}", remedy="choose one of: all, first")


@dataclass(frozen=True)
class Mixed:
    """A mixture whose sources are opened. first_parts: number of the first part of each."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    stop: Stop
    first_parts: tuple[int, ...] = field(default=())

    @property
    def identity(self) -> Any:
        """Sources, weights, and when it stops."""
        return [[source.identity for source in self.sources], list(self.weights), self.stop]

    def open(self, dealt: Dealt) -> Reader:
        """Every source is read by the lanes of the stream."""
        return _MixedReader(self, dealt)

    def locate(self, origin: int) -> tuple[str, int]:
        """As the source says that it is of."""
        part = origin >> PART_BITS
        return self.sources[max(k for k, first in enumerate(self.first_parts) if first <= part)].locate(origin)


class _MixedReader:
    """Cursor: for each source its cursor, the records taken from it, and 1 where it has ended."""

    def __init__(self, source: Mixed, dealt: Dealt) -> None:
        self.source, d = source, dealt
        self._readers = [
            one.open(
                Dealt(
                    d.lanes, d.of, d.epoch, d.seed, d.shuffle, {lane: at[k][0] for lane, at in d.start.items() if at is not None}
                )
            )
            for k, one in enumerate(source.sources)
        ]

    def read(self, lane: int, cursor: Cursor) -> Block | None:
        at: list[list[Any]] = [list(one) for one in cursor] if cursor else [[None, 0, 0] for _ in self._readers]
        while any(not ended for _, _, ended in at):
            turn = min((k for k in range(len(at)) if not at[k][2]), key=lambda k: (at[k][1] / self.source.weights[k], k))
            block = self._readers[turn].read(lane, at[turn][0])
            if block is not None:
                at[turn] = [block.after, at[turn][1] + len(block.origins), 0]
                return Block(block.data, block.format, block.origins, at)
            if self.source.stop == "first":
                return None
            at[turn][2] = 1
        return None

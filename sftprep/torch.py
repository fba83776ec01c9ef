"""Streams for torch: as an IterableDataset, and as a loader that goes on exactly with any number of
workers and ranks.

The only module of sftprep that imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sftprep.errors import ConfigError, SftprepError
from sftprep.shards.reader import Pack
from sftprep.stream.hf_dataset import columns_of
from sftprep.stream.packed_stream import PackedStream, State

Batch = TypeVar("Batch")
Row = dict[str, Tensor]

_PREFETCH_TOKENS = 4 * 1024 * 1024


class PackedDataset(IterableDataset[Row]):
    """A stream as a torch IterableDataset: each pack a dictionary of tensors by column. Loader
    workers share the lanes.

    Works with `DataLoader` and, for a resume, with
    `torchdata.stateful_dataloader.StatefulDataLoader`, which keeps the state of each worker and
    wants as many again; `StreamLoader` takes any number. Give `batch_size=None`, or
    `collate_fn=collate_packs`.
    """

    def __init__(self, stream: PackedStream) -> None:
        self.stream = stream
        self._mine: PackedStream | None = None

    def __iter__(self) -> Iterator[Row]:
        """One pass, the rest of one after a state was loaded."""
        mine = self._own()
        _divide_no_further()
        return (pack_to_tensors(pack) for pack in mine)

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass that comes next; workers that run already are not reached."""
        self.stream.set_epoch(epoch)

    def state_dict(self) -> State:
        """Where this process stands."""
        return self._own().state_dict()

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        self._own().load_state_dict(state)

    def _own(self) -> PackedStream:
        """The lanes of this worker, or all."""
        worker = get_worker_info()
        if worker is not None and self._mine is None:
            self._mine = self.stream.share(worker.id, worker.num_workers, threads=False)
        return self.stream if self._mine is None else self._mine


def pack_to_tensors(pack: Pack) -> Row:
    """The columns of a pack as tensors, by their names in shards; position ids come as int32 where
    they are stored as uint16."""
    return {name: torch.from_numpy(_known(values)) for name, values in columns_of(pack).items()}


def collate_packs(packs: Sequence[Row]) -> Row:
    """Packs (of a `PackedDataset`, or `columns` of each) as one padding-free row for a transformers
    model.

    Returns input_ids, position_ids and labels, int64 [1, T] each.

    Labels are -100 where nothing is trained and at the first token of each sequence.
    """
    ids = torch.cat([pack["input_ids"] for pack in packs]).long()
    positions = torch.cat([pack["position_ids"] for pack in packs]).long()
    labels = ids.masked_fill(
        ~torch.cat([pack["completion_mask"] for pack in packs]) | (positions == 0), -100
    )
    return {"input_ids": ids[None], "position_ids": positions[None], "labels": labels[None]}


class StreamLoader(Generic[Batch]):
    """Batches of a stream, one pass an iteration. Tokenizing happens in `workers` processes while a
    step runs, or here for 0.

    batch_size: packs in a batch. collate: makes a batch of packs. prefetch: packs that each worker
    makes ahead, by default so many that all together hold 4 M tokens (30 MB). The state counts the
    packs of batches that were handed out, by lane: it can be loaded with another number of workers,
    batch size or ranks. Where there are several ranks, those whose lanes have ended get batches of
    one pack that trains nothing until all have: every rank makes as many steps. With as many ranks
    and workers as divide the lanes, the batches of all ranks at a step are the next packs of the
    global order.
    """

    def __init__(
        self,
        stream: PackedStream,
        batch_size: int,
        collate: Callable[[list[Pack]], Batch],
        *,
        workers: int = 0,
        prefetch: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", remedy="give 1 or more")
        self.stream, self.batch_size, self.collate = stream, batch_size, collate
        self.workers = min(workers, len(stream.owned))
        # Windows are filled in bursts: what waits meanwhile is what a worker has made before.
        self.prefetch = prefetch or max(
            2, _PREFETCH_TOKENS // (stream.max_length * max(1, self.workers))
        )
        self._done, self._resumed = stream.state_dict(), False
        self._last: list[dict[str, Any]] = []
        self._flags = (
            _flag_group() if stream.owned != tuple(range(stream.config.pack.lanes)) else None
        )

    def __iter__(self) -> Iterator[Batch]:
        """One pass, or the rest of one; where a loaded state leaves nothing of its pass, the next
        one."""
        given = 0
        for batch in self._even_batches():
            given += 1
            yield self.collate(batch)
        resumed, self._resumed = self._resumed, False
        self.begin(self._done["epoch"] + 1)
        if resumed and not given:
            yield from self

    def _even_batches(self) -> Iterator[list[Pack]]:
        """The batches of this rank, and padding after them until no rank has any."""
        batches = self._batches()
        while True:
            batch = next(batches, None)
            going = batch is not None
            if self._flags is not None:
                flag = torch.tensor([going], dtype=torch.int32)
                torch.distributed.all_reduce(
                    flag, op=torch.distributed.ReduceOp.MAX, group=self._flags
                )
                going = bool(flag.item())
            if not going:
                return
            yield batch if batch is not None else [self.stream.padding()]

    def begin(self, epoch: int) -> None:
        """Begin pass `epoch` from its start. Not needed between passes: each iteration makes the
        next by itself."""
        self._last = list(self._done["lanes"].values())
        self._done, self._resumed = {**self._done, "epoch": epoch, "lanes": {}}, False

    def state_dict(self) -> State:
        """Where the batches that were handed out end: JSON, of the lanes of this rank."""
        return {
            **self._done,
            "lanes": {name: dict(state) for name, state in self._done["lanes"].items()},
        }

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Go on from there; of several ranks, give the states of all. Raises MismatchError for the
        state of another stream."""
        self.stream.load_state_dict(state)
        self._done, self._resumed = self.stream.state_dict(), True

    def _batches(self) -> Iterator[list[Pack]]:
        packs: list[Pack] = []
        reached: dict[str, Any] = {}
        for item in self._placed():
            if isinstance(item, SftprepError):
                raise item
            pack, lane, state = item
            packs.append(pack)
            if state["window"] == _SAME:
                state["window"] = (reached.get(lane) or self._done["lanes"][lane])["window"]
            reached[lane] = state
            if len(packs) == self.batch_size:
                self._done["lanes"].update(reached)
                yield packs
                packs, reached = [], {}
        if packs:
            self._done["lanes"].update(reached)
            yield packs

    @property
    def counts(self) -> dict[str, int]:
        """What was counted in this pass, or in the last one after its end, in the windows of which
        packs were handed out."""
        total: Counter[str] = Counter()
        for state in self._done["lanes"].values() or self._last:
            total.update((state["window"] or {}).get("counts", {}))
        return dict(total)

    def _placed(self) -> Iterator[_Item]:
        self.stream.load_state_dict(self._done)
        data: Any = _Placed(self.stream)
        if not self.workers:
            return iter(data)
        return iter(
            DataLoader(
                data, batch_size=None, num_workers=self.workers, prefetch_factor=self.prefetch
            )
        )


_SAME = "same"
"""Instead of the window in a state, where it is that of the pack before."""


_Item = tuple[Pack, str, dict[str, Any]] | SftprepError


class _Placed(IterableDataset[Any]):
    """Packs with their lanes and the states of these, each window only once; an error of ours comes
    as what it is.

    A DataLoader would make another of it, without what it says.
    """

    def __init__(self, stream: PackedStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[_Item]:
        try:
            yield from self._packs()
        except SftprepError as error:
            yield error

    def _packs(self) -> Iterator[_Item]:
        worker = get_worker_info()
        stream = (
            self.stream
            if worker is None
            else self.stream.share(worker.id, worker.num_workers, threads=False)
        )
        _divide_no_further()
        sent: dict[int, Any] = {}
        for placed in stream.iter_placed():
            state = dict(placed.state)
            if placed.lane in sent and sent[placed.lane] is state["window"]:
                state["window"] = _SAME
            else:
                sent[placed.lane] = state["window"]
            yield placed.pack, str(placed.lane), state


def _divide_no_further() -> None:
    """Hide from what is read here that this process is one worker of several.

    `datasets.IterableDataset` would share out its rows among workers by itself, and the lanes have
    shared them out already.
    """
    from torch.utils.data._utils import worker

    worker._worker_info = None


def _flag_group() -> Any:
    """A group in which ranks tell each other, on the CPU, whether they have a batch; None where
    there is one rank."""
    distributed = torch.distributed
    if not (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        return None
    return distributed.new_group(backend="gloo")


def _known(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Arrays of types that torch has: unsigned ones of 16 bits become int32."""
    return values.astype(np.int32) if values.dtype == np.uint16 else values

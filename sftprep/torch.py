"""Streams for torch: an IterableDataset, and a loader with an exact resume.

This is the only module of sftprep that imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from sftprep.errors import ConfigError, EmptyInput, MissingDependency, SftprepError
from sftprep.shards.reading.pack import Pack
from sftprep.stream.hf_dataset import columns_of
from sftprep.stream.packed_stream import PackedStream, State
from sftprep.stream.settings import CHECK_SETTINGS

try:
    import torch
    from torch import Tensor
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    raise MissingDependency("torch", extra="train", needed_for="sftprep.torch") from missing

__all__ = ["PackedDataset", "StreamLoader", "collate_packs", "pack_to_tensors"]

Batch = TypeVar("Batch")
Row = dict[str, Tensor]

_PREFETCHED_TOKENS = 4 * 1024 * 1024
"""Default number of tokens that all workers together keep ready: 30 MB."""


class PackedDataset(IterableDataset[Row]):
    """A stream as a torch IterableDataset, with lanes divided among workers.

    Each row is a pack as a dictionary of tensors by column. The dataset works with `DataLoader`
    and, if training must be resumed, with `torchdata.stateful_dataloader.StatefulDataLoader`, which
    keeps the state of each worker and resumes with the same number of workers; `StreamLoader`
    resumes with any number.

    Example:
        DataLoader(PackedDataset(stream), batch_size=4, collate_fn=collate_packs)
    """

    def __init__(self, stream: PackedStream) -> None:
        self.stream = stream
        self._share: PackedStream | None = None  # the lanes of this worker

    def __iter__(self) -> Iterator[Row]:
        """Yield one pass, or the rest of the pass of a loaded state."""
        stream = self._worker_stream()
        _hide_worker_info()
        return (pack_to_tensors(pack) for pack in stream)

    def set_epoch(self, epoch: int) -> None:
        """Choose the next pass; running workers are not affected."""
        self.stream.set_epoch(epoch)

    def state_dict(self) -> State:
        """Return the position of this process in the stream."""
        return self._worker_stream().state_dict()

    def load_state_dict(self, state: State) -> None:
        """Resume from a state; see `PackedStream.load_state_dict`."""
        self._worker_stream().load_state_dict(state)

    def _worker_stream(self) -> PackedStream:
        """Return the lanes of this worker, or the whole stream outside of workers."""
        worker = get_worker_info()
        if worker is not None and self._share is None:
            self._share = self.stream.share(worker.id, worker.num_workers, threads=False)
        return self.stream if self._share is None else self._share


def pack_to_tensors(pack: Pack) -> Row:
    """Return the columns of a pack as tensors, by their names in shards.

    Position ids that are stored as uint16 are returned as int32, since torch supports few
    operations on uint16.
    """
    return {
        name: torch.from_numpy(_to_torch_type(values)) for name, values in columns_of(pack).items()
    }


def collate_packs(packs: Sequence[Row]) -> Row:
    """Concatenate packs to one padding-free row for a transformers model.

    Args:
        packs: Rows of a `PackedDataset`, or results of `pack_to_tensors`.

    Returns:
        `input_ids`, `position_ids` and `labels`, int64 [1, T] each. Labels are -100 for tokens that
        are not trained, and for the first token of each sequence, which has no context.
    """
    ids = torch.cat([pack["input_ids"] for pack in packs]).long()
    positions = torch.cat([pack["position_ids"] for pack in packs]).long()
    is_trained = torch.cat([pack["completion_mask"] for pack in packs])
    labels = ids.masked_fill(~is_trained | (positions == 0), -100)
    return {"input_ids": ids[None], "position_ids": positions[None], "labels": labels[None]}


class StreamLoader(Generic[Batch]):
    """Batches of a stream; each iteration is one pass.

    The state counts the packs of batches that were yielded, by lane, not those that workers have
    prepared. It can be loaded with another number of workers or ranks, or another batch size.

    Several ranks make the same number of steps: a rank whose lanes have ended yields batches of one
    pack without trained tokens, until all ranks have ended. If the number of ranks and workers
    divides that of the lanes, the batches of all ranks in a step are the next packs of the stream.

    Args:
        stream: The stream, with the lanes of this rank.
        batch_size: Packs in a batch.
        collate: Converts the packs of a batch.
        workers: Processes that tokenize during the training steps; 0 for the current process.
        prefetch: Packs that each worker prepares. By default, all workers together prepare 4 M
            tokens (30 MB).

    Raises:
        ConfigError: The batch size is less than 1.

    Example:
        loader = StreamLoader(stream, 8, list, workers=2)
        for batch in loader:
            state = loader.state_dict()
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
            raise ConfigError(f"batch_size is {batch_size}", remedy="use 1 or more")
        self.stream, self.batch_size, self.collate = stream, batch_size, collate
        self.workers = min(workers, len(stream.owned))
        # Packs are available in bursts, when a window was packed: prefetched packs bridge the time
        # in which windows are filled.
        self.prefetch = prefetch or max(
            2, _PREFETCHED_TOKENS // (stream.max_length * max(1, self.workers))
        )
        self._position = stream.state_dict()  # after the last batch that was yielded
        self._is_resumed = False  # a state was loaded, and its pass has not ended
        self._last_lanes: list[dict[str, Any]] = []  # states at the end of the last pass
        self._owns_all_lanes = stream.owned == tuple(range(stream.config.pack.lanes))
        self._process_group = None if self._owns_all_lanes else _gloo_group()

    def __iter__(self) -> Iterator[Batch]:
        """Yield one pass, or the rest of the pass of a loaded state.

        If that pass has no batches left, the next pass is yielded.

        Raises:
            EmptyInput: A whole pass has no batch.
        """
        num_batches = 0
        for batch in self._even_batches():
            num_batches += 1
            yield self.collate(batch)
        was_resumed, self._is_resumed = self._is_resumed, False
        self.begin(self._position["epoch"] + 1)
        if num_batches:
            return
        if was_resumed:
            yield from self
        elif self._owns_all_lanes:
            # Workers own a part of the lanes each, so none of them knows that the source is empty.
            raise EmptyInput(
                "a whole pass gave no sequence that can be trained on", remedy=CHECK_SETTINGS
            )

    def _even_batches(self) -> Iterator[list[Pack]]:
        """Yield the batches of this rank, then padding until no rank has a batch."""
        batches = self._batches()
        while True:
            batch = next(batches, None)
            any_rank_has_batch = batch is not None
            if self._process_group is not None:
                flag = torch.tensor([any_rank_has_batch], dtype=torch.int32)
                torch.distributed.all_reduce(
                    flag, op=torch.distributed.ReduceOp.MAX, group=self._process_group
                )
                any_rank_has_batch = bool(flag.item())
            if not any_rank_has_batch:
                return
            yield batch if batch is not None else [self.stream.padding()]

    def begin(self, epoch: int) -> None:
        """Start a pass.

        This is not needed between passes, since iterating continues by itself.
        """
        self._last_lanes = list(self._position["lanes"].values())
        self._position = {**self._position, "epoch": epoch, "lanes": {}}
        self._is_resumed = False

    def state_dict(self) -> State:
        """Return the position after the last yielded batch, for this rank's lanes."""
        lanes = {name: dict(state) for name, state in self._position["lanes"].items()}
        return {**self._position, "lanes": lanes}

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Resume from the state of a loader, or from the states of all ranks.

        Raises:
            MismatchError: The state is from a stream with another source, tokenizer or settings.
            ConfigError: The argument is not a state.
        """
        self.stream.load_state_dict(state)
        self._position, self._is_resumed = self.stream.state_dict(), True

    def _batches(self) -> Iterator[list[Pack]]:
        packs: list[Pack] = []
        reached: dict[str, Any] = {}  # the states of lanes after the packs of this batch
        for item in self._iter_placed():
            if isinstance(item, SftprepError):
                raise item
            pack, lane, state = item
            packs.append(pack)
            if state["window"] == _SAME_WINDOW:
                state["window"] = (reached.get(lane) or self._position["lanes"][lane])["window"]
            reached[lane] = state
            if len(packs) == self.batch_size:
                self._position["lanes"].update(reached)
                yield packs
                packs, reached = [], {}
        if packs:
            self._position["lanes"].update(reached)
            yield packs

    @property
    def counts(self) -> dict[str, int]:
        """Return the counters of this pass, or of the last one after its end.

        They include the windows from which packs were yielded, not those that workers read ahead.
        """
        total: Counter[str] = Counter()
        for state in self._position["lanes"].values() or self._last_lanes:
            total.update((state["window"] or {}).get("counts", {}))
        return dict(total)

    def _iter_placed(self) -> Iterator[_Item]:
        self.stream.load_state_dict(self._position)
        data: Any = _PlacedPacks(self.stream)
        if not self.workers:
            return iter(data)
        return iter(
            DataLoader(
                data, batch_size=None, num_workers=self.workers, prefetch_factor=self.prefetch
            )
        )


_SAME_WINDOW = "same"
"""Replaces the window in a state if it is the window of the pack before, which saves its transfer
from the worker."""


_Item = tuple[Pack, str, dict[str, Any]] | SftprepError
"""A pack, its lane, and the state of the lane after it; or an error."""


class _PlacedPacks(IterableDataset[Any]):
    """Packs with the states of their lanes, as items sent by a worker.

    An error of this project is sent as an item: a DataLoader would raise another object, without
    its attributes.
    """

    def __init__(self, stream: PackedStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[_Item]:
        try:
            yield from self._iter_items()
        except SftprepError as error:
            yield error

    def _iter_items(self) -> Iterator[_Item]:
        worker, stream = get_worker_info(), self.stream
        if worker is not None:
            stream = stream.share(worker.id, worker.num_workers, threads=False)
        _hide_worker_info()
        sent_windows: dict[int, Any] = {}  # by lane, the window that was sent last
        for placed in stream.placed():
            state = dict(placed.state)
            if placed.lane in sent_windows and sent_windows[placed.lane] is state["window"]:
                state["window"] = _SAME_WINDOW
            else:
                sent_windows[placed.lane] = state["window"]
            yield placed.pack, str(placed.lane), state


def _hide_worker_info() -> None:
    """Hide torch's information about this worker from the source.

    A `datasets.IterableDataset` would divide its rows among the workers, and the lanes have already
    divided them.
    """
    from torch.utils.data._utils import worker

    worker._worker_info = None


def _gloo_group() -> Any:
    """Return a process group for flags on the CPU, or None if there is only one rank."""
    distributed = torch.distributed
    if not (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        return None
    return distributed.new_group(backend="gloo")


def _to_torch_type(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values.astype(np.int32) if values.dtype == np.uint16 else values

"""Batches of packs, each in one padding-free row.

`PackLoader` gives the packs of each rank and step, by a `StepPlan`, to torch, and `collate_packs`
joins the packs of a device batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sftprep import Shards
from sfttrain.data.packs import PackLike, PackSource
from sfttrain.data.step_plan import StepPlan

_BATCHES_AHEAD = 16
"""Device batches after the present one whose shards are fetched from a store."""


class RowBatch(TypedDict):
    """A device batch as one padding-free row.

    It has T tokens, S sequences and n scored positions. A position is scored if the token after it
    is trained. n is at least 1: in a row without a trained token, position 0 is the only scored
    position, and its target is -100.

    Example:
        Sequences [5, 6, 7] and [8, 9] with 6, 7 and 9 trained:
        input_ids    [[5, 6, 7, 8, 9]]      cu_seq_lens_q  [0, 3, 5]
        position_ids [[0, 1, 2, 0, 1]]      scored         [0, 1, 3]
        labels       [[-100, 6, 7, -100, 9]]  targets      [6, 7, 9]
    """

    input_ids: Tensor
    """Token ids, int64 [1, T]."""
    position_ids: Tensor
    """Positions, int64 [1, T], which restart at 0 with every sequence."""
    labels: Tensor
    """The token where it is trained, else -100, int64 [1, T]; -100 at the first token of every
    sequence."""
    cu_seq_lens_q: Tensor
    """Offsets of the sequences, int32 [S + 1], as flash attention expects them for queries."""
    cu_seq_lens_k: Tensor
    """The same offsets, for keys."""
    max_length_q: int
    """Length of the longest sequence in tokens, for queries."""
    max_length_k: int
    """The same length, for keys."""
    seq_lens: tuple[int, ...]
    """Lengths of the S sequences on the host, for code that must not wait for the device."""
    scored: Tensor
    """Ascending positions whose next token is trained, int64 [n]."""
    targets: Tensor
    """The token after each scored position, int64 [n]."""
    weights: Tensor | None
    """Weight of each target in the loss, float32 [n]; None if all weights are 1."""
    total_weight: float
    """Sum of `weights`; without weights, the number of targets other than -100."""
    origins: tuple[int, ...]
    """Origin of each sequence that has one; names the record where training fails."""


def collate_packs(packs: Sequence[PackLike]) -> RowBatch:
    """Join the packs of a device batch into one padding-free row.

    Args:
        packs: The packs. A pack may have `loss_weights`, float32 [T]: the weight of each token in
            the loss where it is trained. A pack without them has weight 1 for every token if
            another pack has them. A token of weight 0 is not trained. An empty sequence of packs,
            which a rank gets if the last step has no packs left for it, gives a row of two tokens
            of which none is trained.

    Returns:
        The row; see `RowBatch`.
    """
    # Join the columns of all packs.
    ids = _concatenate([p.input_ids for p in packs], [0, 0], np.int64)
    trained = _concatenate([p.completion_mask for p in packs], [0, 0], np.bool_)
    token_weights = _join_weights(packs)
    if token_weights is not None:
        trained &= token_weights != 0
    lengths = _concatenate([p.seq_lengths for p in packs], [2], np.int64)
    lengths = lengths[lengths > 0]
    # Compute the offsets of the sequences, and positions that restart with each of them.
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    starts = offsets[:-1]
    position_ids = np.arange(len(ids), dtype=np.int64) - np.repeat(starts, lengths)
    # Find the scored positions, whose next token is trained.
    labels = np.where(trained, ids, -100)
    labels[starts] = -100  # the token before it belongs to another sequence
    scored = np.flatnonzero(labels[1:] != -100)
    targets = labels[scored + 1]
    if len(scored) == 0:
        # The row passes through the model nevertheless, because every rank must take part in every
        # step; the loss of the row is 0.
        scored, targets, token_weights = np.zeros(1, np.int64), np.full(1, -100, np.int64), None
    weights = None if token_weights is None else token_weights[scored + 1]
    cu_seq_lens = torch.from_numpy(offsets.astype(np.int32))
    longest = int(lengths.max())
    return RowBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        labels=torch.from_numpy(labels)[None],
        cu_seq_lens_q=cu_seq_lens,
        cu_seq_lens_k=cu_seq_lens,
        max_length_q=longest,
        max_length_k=longest,
        seq_lens=tuple(lengths.tolist()),
        scored=torch.from_numpy(scored),
        targets=torch.from_numpy(targets),
        weights=None if weights is None else torch.from_numpy(weights),
        total_weight=float(
            (targets != -100).sum() if weights is None else weights.sum(dtype=np.float64)
        ),
        origins=tuple(
            int(origin) for pack in packs for origin in getattr(pack, "origin", np.empty(0))
        ),
    )


def _join_weights(packs: Sequence[PackLike]) -> NDArray[np.float32] | None:
    """Return the weights of the tokens of all packs, float32 [T], or None.

    None means that no pack has weights.
    """
    parts = [getattr(p, "loss_weights", None) for p in packs]
    if all(part is None for part in parts):
        return None
    return np.concatenate(
        [
            np.ones(len(p.input_ids), np.float32) if w is None else w
            for p, w in zip(packs, parts, strict=True)
        ],
        dtype=np.float32,
    )


@dataclass(frozen=True, slots=True)
class _FillerPack:
    """Padding as a sequence of its own, without a trained token."""

    input_ids: NDArray[np.int32]
    completion_mask: NDArray[np.bool_]
    seq_lengths: NDArray[np.int32]


def collate_filled(packs: Sequence[PackLike], *, multiple: int, pad_token_id: int) -> RowBatch:
    """Join packs like `collate_packs`, filled to a multiple of `multiple` tokens.

    Args:
        packs: The packs of a device batch.
        multiple: The unit of the row length in tokens.
        pad_token_id: The id of the padding tokens. They form one sequence of their own, of which
            no token is trained.
    """
    tokens = sum(len(p.input_ids) for p in packs) or 2
    missing = -tokens % multiple
    if not missing:
        return collate_packs(packs)
    # An empty batch counts as two tokens, which `collate_packs` adds to it. With the filler, the
    # batch is not empty, so the filler must include these two.
    size = missing if packs else missing + 2
    filler = _FillerPack(
        np.full(size, pad_token_id, np.int32), np.zeros(size, np.bool_), np.array([size], np.int32)
    )
    return collate_packs([*packs, filler])


def _concatenate(
    parts: list[NDArray[Any]], default: list[int], dtype: type[np.generic]
) -> NDArray[Any]:
    """Return the joined parts as a new array; `default` for an empty list."""
    return np.concatenate(parts).astype(dtype) if parts else np.array(default, dtype)


class StepSampler(Sampler[tuple[int, int]]):
    """A batch sampler that names each batch of an epoch: (epoch, number of the device batch).

    The dataset of `PackLoader` finds the packs, so a resume that skips batches takes no time.
    transformers' Trainer skips batches and sets the epoch on this object. It must not be prepared
    by accelerate, which would divide the batches among the ranks a second time.
    """

    def __init__(self, plan: StepPlan, rank: int = 0) -> None:
        self.plan, self.rank, self.epoch = plan, rank, 0

    def __len__(self) -> int:
        return self.plan.batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, number) for number in range(len(self)))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for the order of the next iteration."""
        self.epoch = epoch


class PackLoader(DataLoader[RowBatch]):
    """A DataLoader of collated rows with the epoch passed on to its sampler."""

    def __init__(
        self,
        source: Any,
        sampler: StepSampler,
        *,
        collate: Callable[[list[Any]], Any] = collate_packs,
        workers: int = 0,
        **options: Any,
    ) -> None:
        """Create a loader.

        Args:
            source: Packs by index, or the rows that `collate` takes.
            sampler: The batches of this rank.
            collate: The function that makes a batch from the items.
            workers: The number of worker processes; 0 loads in this process.
            options: Further arguments of torch's DataLoader.
        """
        super().__init__(
            cast(Any, BatchDataset(source, sampler.plan, sampler.rank)),
            batch_sampler=cast(Any, sampler),
            collate_fn=collate,
            num_workers=workers,
            **{"persistent_workers": workers > 0, **options},
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for the order of the next iteration."""
        cast(StepSampler, self.batch_sampler).set_epoch(epoch)


class BatchDataset(Dataset[PackLike]):
    """The batches of one rank by their names, as torch's map-style dataset.

    Args:
        source: Packs by index.
        plan: The plan of the packs for each step.
        rank: The rank.
    """

    def __init__(self, source: PackSource, plan: StepPlan, rank: int) -> None:
        self.source, self.plan, self.rank = source, plan, rank
        # The latest epoch and its order, and the batches of its latest steps: the next batch is
        # usually of one of them.
        self._epoch, self._order = 0, plan.order(0)
        self._batches: OrderedDict[int, list[NDArray[np.int64]]] = OrderedDict()  # by step

    def __len__(self) -> int:
        return len(self.source)

    def packs(self, epoch: int, number: int) -> list[int]:
        """Return the indices of the packs of a device batch."""
        step, batch = divmod(number, self.plan.accumulation)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.plan.order(epoch)
            self._batches.clear()
        if step not in self._batches:
            self._batches[step] = self.plan.batches_of_rank(self._order, step, self.rank)
            if len(self._batches) > _BATCHES_AHEAD + 1:
                self._batches.popitem(last=False)
        packs: list[int] = self._batches[step][batch].tolist()
        return packs

    def __getitems__(self, name: tuple[int, int]) -> list[PackLike]:
        """Return the packs of a device batch, for torch's DataLoader.

        The shards of the next batches are fetched ahead, if the packs are those of a build in a
        store.
        """
        if isinstance(self.source, Shards):
            self.source.fetch_ahead(self._following_packs(*name))
        return [self.source[index] for index in self.packs(*name)]

    def _following_packs(self, epoch: int, number: int) -> Iterator[int]:
        """Yield the packs of the device batches after one, in their order."""
        end = min(number + 1 + _BATCHES_AHEAD, self.plan.batches)
        for following in range(number + 1, end):
            yield from self.packs(epoch, following)

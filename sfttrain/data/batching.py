"""From packs to batches: which packs each rank trains on at each step, and how they become one
padding-free row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sfttrain.data.packs import PackLike, PackSource


class RowBatch(TypedDict):
    """The packs of a device batch as one padding-free row of T tokens, S sequences and n scored
    positions (n >= 1).

    A scored position is one whose next token is trained; where nothing is, position 0 stands alone
    with target -100.
    """

    input_ids: Tensor
    """int64 [1, T]"""
    position_ids: Tensor
    """int64 [1, T], restarting at 0 with every sequence"""
    labels: Tensor
    """int64 [1, T]: the token where it is trained, else -100; never at the first token of a
    sequence"""
    cu_seq_lens_q: Tensor
    """int32 [S + 1]: where sequences start and end"""
    cu_seq_lens_k: Tensor
    """the same"""
    max_length_q: int
    """length of the longest sequence"""
    max_length_k: int
    """the same"""
    seq_lens: tuple[int, ...]
    """lengths of the S sequences, for code that must not wait for the device"""
    scored: Tensor
    """int64 [n]: positions whose next token is trained, ascending"""
    targets: Tensor
    """int64 [n]: that next token"""
    weights: Tensor | None
    """float32 [n]: what each target weighs in the loss; None where all weigh 1"""
    total_weight: float
    """sum of those weights; without them the number of targets that count"""
    origins: tuple[int, ...]
    """origin of each sequence that has one, to name its row where training fails"""


def collate_packs(packs: Sequence[PackLike]) -> RowBatch:
    """Put the packs of a device batch into one padding-free row; see `RowBatch`.

    No pack at all gives a row of two tokens, neither trained: what a rank gets that has nothing
    left in the last step. A pack may have `loss_weights`, float32 [T]: what each token weighs in
    the loss where it is trained. One that has none beside one that has some weighs 1 a token; a
    token of weight 0 is not trained.
    """
    ids = _joined([p.input_ids for p in packs], [0, 0], np.int64)
    trained = _joined([p.completion_mask for p in packs], [0, 0], np.bool_)
    token_weights = _weights(packs)
    if token_weights is not None:
        trained &= token_weights != 0
    lengths = _joined([p.seq_lengths for p in packs], [2], np.int64)
    lengths = lengths[lengths > 0]
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    starts = bounds[:-1]
    position_ids = np.arange(len(ids), dtype=np.int64) - np.repeat(starts, lengths)
    labels = np.where(trained, ids, -100)
    labels[starts] = -100  # nothing of the same sequence comes before its first token
    scored = np.flatnonzero(labels[1:] != -100)
    targets = labels[scored + 1]
    if len(scored) == 0:
        # The row still goes through the model, so that every rank takes part in every step; its
        # loss is 0.
        scored, targets, token_weights = np.zeros(1, np.int64), np.full(1, -100, np.int64), None
    weights = None if token_weights is None else token_weights[scored + 1]
    cu_seq_lens = torch.from_numpy(bounds.astype(np.int32))
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


def _weights(packs: Sequence[PackLike]) -> NDArray[np.float32] | None:
    """What the tokens of all packs weigh, float32 [T], or None where no pack says anything of
    it."""
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
class _Filler:
    """Padding as a sequence of its own, in which nothing is trained."""

    input_ids: NDArray[np.int32]
    completion_mask: NDArray[np.bool_]
    seq_lengths: NDArray[np.int32]


def collate_filled(packs: Sequence[PackLike], *, multiple: int, pad_token_id: int) -> RowBatch:
    """As `collate_packs`, with the row filled up to a multiple of so many tokens, by one sequence
    that trains nothing."""
    tokens = sum(len(p.input_ids) for p in packs) or 2
    missing = -tokens % multiple
    if not missing:
        return collate_packs(packs)
    # Where there is no pack at all, the two tokens that stand for it are the filler's own.
    size = missing if packs else missing + 2
    filler = _Filler(
        np.full(size, pad_token_id, np.int32), np.zeros(size, np.bool_), np.array([size], np.int32)
    )
    return collate_packs([*packs, filler])


def _joined(parts: list[NDArray[Any]], instead: list[int], dtype: type[np.generic]) -> NDArray[Any]:
    """The parts one after the other, as a new array; `instead` where there are none."""
    return np.concatenate(parts).astype(dtype) if parts else np.array(instead, dtype)


@dataclass(frozen=True)
class StepPlan:
    """Which packs are trained at which step: a pure function of the seed, the epoch and the step.

    The packs of an optimizer step do not depend on how many ranks share them, so a run goes the
    same way on any number of them, as long as rows * accumulation * world stays the same.
    """

    packs: int
    """Packs in an epoch."""
    rows: int
    """Packs in a device batch."""
    accumulation: int = 1
    """Device batches of a rank in an optimizer step."""
    world: int = 1
    """Ranks."""
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    """Leave out the last, smaller step of an epoch."""

    @property
    def packs_per_step(self) -> int:
        """Packs of a whole optimizer step, over all ranks."""
        return self.rows * self.accumulation * self.world

    @property
    def batches(self) -> int:
        """Device batches of each rank in an epoch: the same for all ranks, known without asking
        them."""
        whole, rest = divmod(self.packs, self.packs_per_step)
        tail = -(-rest // (self.rows * self.world))
        return whole * self.accumulation + (0 if self.drop_last and whole else tail)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The packs in the order of the epoch: int64 [packs], each once."""
        if not self.shuffle:
            return np.arange(self.packs, dtype=np.int64)
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.packs)

    def batch(self, order: NDArray[np.int64], number: int, rank: int) -> NDArray[np.int64]:
        """Packs of device batch `number` (from 0) of a rank: at most `rows`; none where the last
        step has run out."""
        begin = (number * self.world + rank) * self.rows
        return order[begin : begin + self.rows]


class StepSampler(Sampler[list[int]]):
    """The plan of one rank as a batch sampler: for the loader, and for transformers' skip and
    set_epoch.

    It is rank-aware already, and must not be prepared by accelerate, which would share it out once
    more.
    """

    def __init__(self, plan: StepPlan, rank: int = 0) -> None:
        self.plan, self.rank, self.epoch = plan, rank, 0

    def __len__(self) -> int:
        return self.plan.batches

    def __iter__(self) -> Iterator[list[int]]:
        order = self.plan.order(self.epoch)
        for number in range(len(self)):
            yield self.plan.batch(order, number, self.rank).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch


class PackLoader(DataLoader[RowBatch]):
    """A DataLoader of collated rows that passes the epoch on to its sampler."""

    def __init__(
        self,
        source: Any,
        sampler: StepSampler,
        *,
        collate: Callable[[list[Any]], Any] = collate_packs,
        workers: int = 0,
        **options: Any,
    ) -> None:
        """source: packs, or rows for another `collate`, by number; options: those of torch's
        DataLoader."""
        super().__init__(
            cast(Any, _PackDataset(source)),
            batch_sampler=cast(Any, sampler),
            collate_fn=collate,
            num_workers=workers,
            **{"persistent_workers": workers > 0, **options},
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        cast(StepSampler, self.batch_sampler).set_epoch(epoch)


class _PackDataset(Dataset[PackLike]):
    """A PackSource as torch's map-style dataset."""

    def __init__(self, source: PackSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> PackLike:
        return self.source[index]

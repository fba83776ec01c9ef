"""Packs in memory, for tests that need no build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.sfttrain.tiny import VOCABULARY


@dataclass
class MemoryPack:
    """A pack made by a test."""

    input_ids: NDArray[np.int32]
    completion_mask: NDArray[np.bool_]
    seq_lengths: NDArray[np.int32]
    loss_weights: NDArray[np.float32] | None = None


class MemoryPacks:
    """Packs by index, like the result of `sftprep.open_shards`."""

    def __init__(self, packs: Sequence[MemoryPack]) -> None:
        self.packs = list(packs)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int, /) -> MemoryPack:
        return self.packs[index]

    def seq_lengths(self, index: int, /) -> NDArray[np.int32]:
        return self.packs[index].seq_lengths


def make_pack(
    lengths: Sequence[int], *, seed: int = 0, trained: float = 0.6, vocabulary: int = VOCABULARY
) -> MemoryPack:
    """Return a pack of random tokens with sequences of these lengths; `trained` is a share."""
    random = np.random.default_rng(seed)
    tokens = sum(lengths)
    return MemoryPack(
        random.integers(3, vocabulary, tokens).astype(np.int32),
        random.random(tokens) < trained,
        np.array(lengths, np.int32),
    )


def make_packs(
    count: int, *, seed: int = 0, longest: int = 12, vocabulary: int = VOCABULARY
) -> MemoryPacks:
    """Return packs of one to five random sequences."""
    random = np.random.default_rng(seed)
    return MemoryPacks(
        [
            make_pack(
                random.integers(1, longest + 1, random.integers(1, 6)).tolist(),
                seed=seed * 1000 + number,
                vocabulary=vocabulary,
            )
            for number in range(count)
        ]
    )


def split(pack: MemoryPack) -> list[MemoryPack]:
    """Return the sequences of a pack, each as a pack of its own."""
    ends, weights = np.cumsum(pack.seq_lengths), pack.loss_weights
    return [
        MemoryPack(
            pack.input_ids[e - n : e],
            pack.completion_mask[e - n : e],
            np.array([n], np.int32),
            None if weights is None else weights[e - n : e],
        )
        for e, n in zip(ends, pack.seq_lengths, strict=True)
    ]

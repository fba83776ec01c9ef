"""Counters of a run, kept on the device and read only when something is logged."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from sfttrain.losses.fused_cross_entropy import LossSums


class Counters:
    """Sums over the positions trained since the last reading: of their loss, their right guesses,
    and how many they are.

    Adding never waits for the device; `read` does, once, and adds up the ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(
            3, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device
        )
        self._since = time.perf_counter()

    def add(self, sums: LossSums) -> None:
        """Count one row in."""
        self._sums += torch.stack([sums.nll, sums.correct, sums.tokens]).to(self._sums.dtype)

    def read(self, accelerator: Any) -> CounterReading:
        """The sums over all ranks since the last reading, which start again at 0. Every rank must
        call it."""
        reading = self.peek(accelerator)
        self._since += reading.seconds
        self._sums.zero_()
        return reading

    def peek(self, accelerator: Any) -> CounterReading:
        """As `read`, and nothing starts again. Every rank must call it."""
        total: Tensor = accelerator.reduce(self._sums.clone(), reduction="sum")
        nll, correct, tokens = total.tolist()
        return CounterReading(nll, int(correct), int(tokens), time.perf_counter() - self._since)


class CounterReading:
    """What counters said. nll: summed; correct, tokens: counts; seconds: since the reading
    before."""

    def __init__(self, nll: float, correct: int, tokens: int, seconds: float) -> None:
        self.nll, self.correct, self.tokens, self.seconds = nll, correct, tokens, seconds

    @property
    def loss(self) -> float:
        """Mean negative log likelihood of a token; 0 where there was none."""
        return self.nll / self.tokens if self.tokens else 0.0

    @property
    def accuracy(self) -> float:
        """Share of tokens whose most likely candidate was the right one; 0 where there was none."""
        return self.correct / self.tokens if self.tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens a second, over all ranks."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

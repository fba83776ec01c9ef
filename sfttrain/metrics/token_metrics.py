"""Counters of a run, kept on the device and read only for the log."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfttrain.losses.fused_cross_entropy import LossSums


class Counters:
    """Sums of loss, correct predictions and tokens since the last `read`.

    `add` never waits for the device. `read` and `peek` wait once, and sum over the ranks.
    """

    def __init__(self, device: torch.device) -> None:
        # Negative log likelihood, correct predictions and tokens; mps has no float64.
        self._sums = torch.zeros(
            3, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device
        )
        self._last_read = time.perf_counter()  # time of the last `read`

    def add(self, sums: LossSums) -> None:
        """Add the sums of one row."""
        self._sums += torch.stack([sums.nll, sums.correct, sums.tokens]).to(self._sums.dtype)

    def read(self, accelerator: Any) -> CounterReading:
        """Return the sums over all ranks and reset them.

        Every rank must call this method.
        """
        reading = self.peek(accelerator)
        self._last_read += reading.seconds
        self._sums.zero_()
        return reading

    def peek(self, accelerator: Any) -> CounterReading:
        """Return the sums over all ranks; every rank must call this method."""
        total: Tensor = accelerator.reduce(self._sums.clone(), reduction="sum")
        nll, correct, tokens = total.tolist()
        return CounterReading(nll, int(correct), int(tokens), time.perf_counter() - self._last_read)


@dataclass(frozen=True)
class CounterReading:
    """Values of the counters at one time."""

    nll: float
    """Sum of the negative log likelihood."""
    correct: int
    """Tokens that were predicted correctly."""
    tokens: int
    """Trained tokens."""
    seconds: float
    """Time since the last `read`."""

    @property
    def loss(self) -> float:
        """Mean negative log likelihood per token; 0 if there was no token."""
        return self.nll / self.tokens if self.tokens else 0.0

    @property
    def accuracy(self) -> float:
        """Share of tokens with the correct prediction; 0 if there was no token."""
        return self.correct / self.tokens if self.tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens per second over all ranks."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite beyond the range of a float."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

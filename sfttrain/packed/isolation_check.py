"""Verification of the isolation of sequences in a packed row of a model.

The check runs the model itself and does not rely on a list of architectures:

1. Run one sequence alone. This is the reference, taken before the attention is changed.
2. Run a row of three sequences. The logits of the middle sequence must be those of the reference.
3. Run the row with another first sequence. The logits of the later sequences must not change.

The cost is three forwards on at most 18 tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfttrain.data.batching import RowBatch
from sfttrain.packed.forward import ForwardMode, scored_outputs

_LENGTHS = (5, 9, 4)
"""Lengths of the three sequences in tokens."""


@dataclass(frozen=True)
class Verdict:
    """Result of a check; distances are in standard deviations of the logits."""

    leak: float
    """How far logits of later sequences move if the first sequence is replaced."""
    difference: float
    """How far logits of a sequence in the row are from those of the sequence alone."""
    error: str
    """The exception of the model; "" if it raised none."""
    tolerance: tuple[float, float]
    """Largest permitted leak and difference."""

    @property
    def is_isolated(self) -> bool:
        """Whether packed rows are exact; False if a distance is NaN."""
        return (
            not self.error
            and self.leak <= self.tolerance[0]
            and self.difference <= self.tolerance[1]
        )

    def __str__(self) -> str:
        if self.error:
            return self.error
        return (
            f"logits move by {self.leak:.1e} sigma with another sequence before them, "
            f"and differ by {self.difference:.1e} from the sequence alone"
        )


class IsolationGuard:
    """A checker of one model, by forwards on random tokens.

    The reference is taken when the checker is created. The checker raises no exception of the
    model: a model that cannot run the sequence alone gets a verdict with an error in every mode.

    Args:
        model: The model, on its device.
        vocabulary: The number of rows of its embedding.
        autocast: The dtype of mixed precision; None without mixed precision.
    """

    def __init__(
        self, model: nn.Module, vocabulary: int, autocast: torch.dtype | None = None
    ) -> None:
        self._model, self._autocast = model, autocast
        parameter = next(model.parameters())
        self._device = parameter.device
        # Random tokens; the first and last ids are often special tokens, such as padding.
        generator = torch.Generator().manual_seed(0)
        low, high = (5, vocabulary - 5) if vocabulary > 20 else (0, vocabulary)
        self._ids = torch.randint(low, high, (sum(_LENGTHS),), generator=generator)
        # The same row with another first sequence.
        self._changed_ids = self._ids.clone()
        self._changed_ids[: _LENGTHS[0]] = torch.randint(
            low, high, (_LENGTHS[0],), generator=generator
        )
        # The precision, which decides on the tolerance.
        dtypes = {p.dtype for p in model.parameters()}
        self._has_low_precision = autocast is not None or any(
            dtype.itemsize < 4 for dtype in dtypes
        )
        self._in_int8 = torch.int8 in dtypes
        # Logits of the middle sequence alone, or the exception that the model raised.
        middle = slice(_LENGTHS[0], _LENGTHS[0] + _LENGTHS[1])
        self._alone, self._alone_error = self._run(lambda: self._run_alone(self._ids[middle]))

    @property
    def is_finite_alone(self) -> bool:
        """Whether the logits of a sequence alone are finite; True if they are not known."""
        return self._alone is None or bool(self._alone.isfinite().all())

    def check(self, mode: ForwardMode) -> Verdict:
        """Compare rows in a mode with each other and with the sequence alone."""
        # Rounding in 16 bits differs between kernels and may send a token to another expert, so the
        # median position must agree. A leak is larger by orders of magnitude (0.5 to 5 sigma where
        # it was observed), and rounding does not cause one.
        tolerance = (2e-2, 1.5e-1) if self._has_low_precision else (1e-3, 1e-3)
        if self._in_int8:
            # bitsandbytes multiplies in 8 bits only the columns in which no token of the row has an
            # outlier, so the rest of the row influences how a token is rounded.
            tolerance = (2e-1, 2e-1)
        if self._alone is None:
            return Verdict(0.0, 0.0, self._alone_error, tolerance)
        first, error = self._run(lambda: self._run_row(self._ids, mode))
        second, second_error = self._run(lambda: self._run_row(self._changed_ids, mode))
        if first is None or second is None:
            return Verdict(0.0, 0.0, error or second_error, tolerance)
        scale = first.std()
        leak = ((first - second)[_LENGTHS[0] :].abs().amax(-1).max() / scale).item()
        middle = first[_LENGTHS[0] : _LENGTHS[0] + _LENGTHS[1]]
        by_position = (middle - self._alone).abs().amax(-1) / scale
        difference = by_position.median() if self._has_low_precision else by_position.max()
        return Verdict(leak, difference.item(), "", tolerance)

    def _run(self, forward: Callable[[], Tensor]) -> tuple[Tensor | None, str]:
        """Return the result of a forward in eval mode; None and the error if it failed."""
        was_training = self._model.training
        self._model.eval()
        mixed = (
            torch.autocast(self._device.type, self._autocast)
            if self._autocast is not None
            else contextlib.nullcontext()
        )
        try:
            with torch.no_grad(), mixed:
                return forward().float(), ""
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any exception means that the mode does not suit the model
            return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            self._model.train(was_training)

    def _run_alone(self, ids: Tensor) -> Tensor:
        """Return the logits of one sequence in a row of its own: [tokens, V]."""
        arguments: dict[str, Any] = {"input_ids": ids[None].to(self._device)}
        if ForwardMode.from_model(self._model, "").accepts("use_cache"):
            arguments["use_cache"] = False
        logits: Tensor = self._model(**arguments).logits
        return logits[0]

    def _run_row(self, ids: Tensor, mode: ForwardMode) -> Tensor:
        """Return the logits of every position of a row, in its order: [tokens, V]."""
        offsets = torch.tensor([0, *_LENGTHS]).cumsum(0)
        batch = RowBatch(
            input_ids=ids[None].to(self._device),
            position_ids=torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(self._device),
            labels=ids[None].to(self._device),
            cu_seq_lens_q=offsets.to(self._device, torch.int32),
            cu_seq_lens_k=offsets.to(self._device, torch.int32),
            max_length_q=max(_LENGTHS),
            max_length_k=max(_LENGTHS),
            seq_lens=_LENGTHS,
            scored=torch.arange(len(ids), device=self._device),
            # The target of a position is its own index. It is returned with the logits, which may
            # be in another order.
            targets=torch.arange(len(ids), device=self._device),
            origins=(),
            weights=None,
            total_weight=float(len(ids)),
        )
        logits, positions, _ = scored_outputs(self._model, batch, mode)
        return logits[positions.argsort()]

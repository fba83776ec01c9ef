"""Does this model, as it is set up now, keep the sequences of a packed row apart? Asked of the
model itself, not of a list."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfttrain.data.batching import RowBatch
from sfttrain.packed.forward import ForwardMode, scored_outputs

_LENGTHS = (5, 9, 4)


@dataclass(frozen=True)
class Verdict:
    """What the guard saw. leak, difference: in standard deviations of the logits; error: what the
    model raised, or ''."""

    leak: float
    """How far logits of later sequences move when the first sequence is another one."""
    difference: float
    """How far logits of a sequence in the row are from those of the sequence alone."""
    error: str
    tolerance: tuple[float, float]

    @property
    def isolated(self) -> bool:
        """Whether packed rows are safe (a NaN is not)."""
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
    """Three short forwards on random tokens; the reference is taken once, before the model's
    attention is changed.

    model: on its device; autocast: dtype of mixed precision, or None. Raises nothing: a model that
    cannot be run alone gives a verdict with an error, for every feeding.
    """

    def __init__(
        self, model: nn.Module, vocabulary: int, autocast: torch.dtype | None = None
    ) -> None:
        self._model, self._autocast = model, autocast
        parameter = next(model.parameters())
        self._device = parameter.device
        generator = torch.Generator().manual_seed(0)
        low, high = (5, vocabulary - 5) if vocabulary > 20 else (0, vocabulary)
        self._ids = torch.randint(low, high, (sum(_LENGTHS),), generator=generator)
        self._other = self._ids.clone()
        self._other[: _LENGTHS[0]] = torch.randint(low, high, (_LENGTHS[0],), generator=generator)
        kinds = {p.dtype for p in model.parameters()}
        self._half = autocast is not None or any(kind.itemsize < 4 for kind in kinds)
        self._int8 = torch.int8 in kinds
        middle = slice(_LENGTHS[0], _LENGTHS[0] + _LENGTHS[1])
        self._alone, self._alone_error = self._run(lambda: self._plain(self._ids[middle]))

    @property
    def is_finite_alone(self) -> bool:
        """Whether the logits of a sequence alone are finite, or not known."""
        return self._alone is None or bool(self._alone.isfinite().all())

    def ask(self, feeding: ForwardMode) -> Verdict:
        """Compare rows given by `feeding` with each other and with the sequence alone."""
        # Rounding in 16 bits differs between kernels, and may send a token to another expert: there
        # the median position must agree. A leak is of another order (0.5 to 5 sigma where it was
        # seen), and rounding does not cause one.
        tolerance = (2e-2, 1.5e-1) if self._half else (1e-3, 1e-3)
        if self._int8:
            # bitsandbytes multiplies in 8 bits all columns in which no token of the row has an
            # outlier, so what else is in the row decides how a token is rounded.
            tolerance = (2e-1, 2e-1)
        if self._alone is None:
            return Verdict(0.0, 0.0, self._alone_error, tolerance)
        first, error = self._run(lambda: self._row(self._ids, feeding))
        second, error2 = self._run(lambda: self._row(self._other, feeding))
        if first is None or second is None:
            return Verdict(0.0, 0.0, error or error2, tolerance)
        scale = first.std()
        leak = ((first - second)[_LENGTHS[0] :].abs().amax(-1).max() / scale).item()
        by_position = (first[_LENGTHS[0] : _LENGTHS[0] + _LENGTHS[1]] - self._alone).abs().amax(
            -1
        ) / scale
        return Verdict(
            leak, (by_position.median() if self._half else by_position.max()).item(), "", tolerance
        )

    def _run(self, forward: Any) -> tuple[Tensor | None, str]:
        was = self._model.training
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
        except (
            Exception
        ) as error:  # whatever a model raises on a packed row, it means: not this way
            return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            self._model.train(was)

    def _plain(self, ids: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": ids[None].to(self._device)}
        if ForwardMode.of(self._model, "").takes("use_cache"):
            arguments["use_cache"] = False
        logits: Tensor = self._model(**arguments).logits
        return logits[0]

    def _row(self, ids: Tensor, feeding: ForwardMode) -> Tensor:
        """Logits of every position of a row, in the order of the row: [tokens, V]."""
        bounds = torch.tensor([0, *_LENGTHS]).cumsum(0)
        batch = RowBatch(
            input_ids=ids[None].to(self._device),
            position_ids=torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(self._device),
            labels=ids[None].to(self._device),
            cu_seq_lens_q=bounds.to(self._device, torch.int32),
            cu_seq_lens_k=bounds.to(self._device, torch.int32),
            max_length_q=max(_LENGTHS),
            max_length_k=max(_LENGTHS),
            seq_lens=_LENGTHS,
            scored=torch.arange(len(ids), device=self._device),
            # The target of a position is its own place: it comes back with the logits, whatever
            # their order.
            targets=torch.arange(len(ids), device=self._device),
            origins=(),
            weights=None,
            total_weight=float(len(ids)),
        )
        logits, places, _ = scored_outputs(self._model, batch, feeding)
        return logits[places.argsort()]

"""The loss of trained positions: from logits, or fused with the head so that the logits are never
kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sfttrain.finite import reject_not_finite
from sfttrain.models.unwrap import unwrap_peft

LossType = Literal["nll", "dft"]

_CHUNK_BYTES = 64 * 2**20


class LossSums(NamedTuple):
    """Sums over the scored positions of a row, all on the device: nothing here waits for it."""

    loss: Tensor
    """float32 scalar, differentiable: what is minimised, summed"""
    nll: Tensor
    """float32 scalar: negative log likelihood, summed"""
    correct: Tensor
    """int64 scalar: positions at which no token is more likely than the right one"""
    tokens: Tensor
    """int64 scalar: positions that count"""
    weight: Tensor
    """float32 scalar: what those positions weigh together; without weights, how many they are"""


@dataclass(frozen=True)
class LossPlan:
    """How the loss of one model is made. head: the plain linear head to fuse with, or None for
    losses from logits."""

    kind: LossType = "nll"
    head: nn.Linear | None = None

    def outputs_are_hidden(self) -> contextlib.AbstractContextManager[None]:
        """While this is open, the model returns what goes into its head, in place of logits (only
        where the loss is fused)."""
        return contextlib.nullcontext() if self.head is None else _passing_through(self.head)

    def sums(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> LossSums:
        """Loss of `outputs`, [n, V] logits or [n, H] inputs of the head, for int64 [n] targets;
        -100 counts nothing.

        weights: float32 [n], what each position weighs, or None where all weigh 1. A mean is `loss
        / weight`.
        """
        if self.head is None:
            return loss_from_logits(outputs, targets, self.kind, weights)
        return fused_loss(outputs, self.head.weight, self.head.bias, targets, self.kind, weights)


def loss_from_logits(
    logits: Tensor, targets: Tensor, kind: LossType = "nll", weights: Tensor | None = None
) -> LossSums:
    """Sums over n positions. logits: [n, V]; targets: int64 [n], -100 counts nothing; weights:
    float32 [n] or None.

    dft weighs each token by its own probability, held constant (https://arxiv.org/abs/2508.05629).
    """
    nll = F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=-100)
    weighted = nll * torch.exp(-nll.detach()) if kind == "dft" else nll
    weighted = weighted if weights is None else weighted * weights
    valid = targets != -100
    scores = logits.detach()
    correct = (
        (scores.gather(1, targets.clamp(min=0)[:, None])[:, 0] >= scores.amax(-1)) & valid
    ).sum()
    return LossSums(
        weighted.sum(), nll.detach().sum(), correct, valid.sum(), _weight_of(valid, weights)
    )


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kind: LossType = "nll",
    weights: Tensor | None = None,
) -> LossSums:
    """Sums over n positions of a linear head. hidden: [n, H]; weight: [V, H]; bias: [V] or None;
    targets: int64 [n].

    weights: float32 [n], what each position weighs, or None where all weigh 1.

    The idea: the gradient of cross-entropy is softmax minus one-hot, known as soon as a chunk of
    logits is, and what stands before it is known too, but for one factor that all positions share
    (the incoming gradient of the sum). So the forward makes, chunk by chunk of some 64 MiB, the
    logits, their loss and the gradients of hidden, weight and bias; the backward only multiplies.
    Three matrix products instead of four (two where the head is frozen), and no logits of all
    positions ever. Tested against `loss_from_logits`.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        # Inside a custom function autocast does not act: what a linear layer would have cast is
        # cast here.
        narrow = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(narrow), weight.to(narrow)
        bias = None if bias is None else bias.to(narrow)
    apply: Any = _FusedHeadLoss.apply
    loss, nll, correct = apply(
        hidden, weight, bias, targets, weights, kind, torch.is_grad_enabled()
    )
    valid = targets != -100
    return LossSums(loss, nll, correct, valid.sum(), _weight_of(valid, weights))


def plan_loss(model: nn.Module, asked: str, kind: LossType, *, fusable: bool = True) -> LossPlan:
    """Choose between logits and the fused head. asked: auto | logits | fused; fusable=False where
    weights are sharded.

    auto fuses on CPUs and under frozen heads, where it was measured to be the faster, if the
    model's head turns out to be a plain linear layer with nothing after it that matters: a short
    forward compares. A scale of the logits does not (it is applied to what goes into the head,
    which is the same), softcapping does. Raises ConfigError where `fused` is asked for and that is
    not so.
    """
    if asked == "logits":
        return LossPlan(kind)
    inner = unwrap_peft(model)
    head = inner.get_output_embeddings()
    device = next(model.parameters()).device
    if (
        asked == "auto"
        and type(head) is nn.Linear
        and head.weight.requires_grad
        and device.type != "cpu"
    ):
        return LossPlan(kind)
    reason = (
        "its weights are sharded or compiled"
        if not fusable
        else _why_not_plain(inner, head, device)
    )
    if not reason:
        return LossPlan(kind, head)
    if asked == "fused":
        from sftprep.errors import ConfigError

        raise ConfigError(
            f"--loss_impl fused is not possible with {type(inner).__name__}: {reason}",
            remedy="use --loss_impl auto",
        )
    return LossPlan(kind)


def _weight_of(valid: Tensor, weights: Tensor | None) -> Tensor:
    """What the valid positions weigh together: a float32 scalar."""
    return valid.sum().float() if weights is None else (weights * valid).sum()


def _why_not_plain(model: Any, head: Any, device: torch.device) -> str:
    """Why logits are not `head(hidden)`, of a plain linear head; '' where they are."""
    if type(head) is not nn.Linear or head.weight.dtype.itemsize < 2:
        return f"its head is a {type(head).__name__}, not a plain linear layer"
    ids = torch.arange(4, device=device)[None] % head.weight.shape[0]
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            with _passing_through(head):
                hidden = model(input_ids=ids).logits
            if hidden.shape[-1] != head.in_features:
                return "its head is not the last thing it does"
            again = head(hidden)
    finally:
        model.train(was)
    if not bool(logits.isfinite().all()):
        reject_not_finite(model)  # training cannot succeed, whatever the head is
        return "its logits are not finite"
    same = torch.allclose(
        logits.float(), again.float(), rtol=1e-3, atol=1e-3 * float(logits.float().std())
    )
    return "" if same else "something is done to the logits after the head, such as softcapping"


@contextlib.contextmanager
def _passing_through(head: nn.Linear) -> Iterator[None]:
    """Make the head return what goes into it."""
    touch: Any = _Touch.apply

    def forward(hidden: Tensor) -> Tensor:
        passed: Tensor = touch(hidden, head.weight, head.bias)
        return passed

    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]


class _Touch(torch.autograd.Function):
    """Returns `hidden`, with the head's parameters in its history but without a gradient for them.

    DistributedDataParallel looks through the history of what a model returns for parameters that
    had no part in it, and declares them done; the head has its part after that, in the loss, and
    would be done twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0], None, None


class _FusedHeadLoss(torch.autograd.Function):
    """See `fused_loss`. Gradients are kept in the dtype of what they belong to; the head's are
    summed in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        kind: LossType,
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Under no_grad needs_input_grad still says what the inputs ask for, hence `training`.
        need_hidden, need_weight, need_bias = (
            training and needed for needed in ctx.needs_input_grad[:3]
        )
        loss = hidden.new_zeros((), dtype=torch.float32)
        nll_sum = loss.clone()
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if need_bias else None
        rows = max(16, _CHUNK_BYTES // (4 * weight.shape[0]))
        # One block of memory for the logits of all chunks, which become probabilities and then
        # gradients in place.
        room = (
            weight.new_empty((min(rows, len(targets)), weight.shape[0]))
            if hidden.dtype == torch.float32
            else None
        )
        for begin in range(0, len(targets), rows):
            h, y = hidden[begin : begin + rows], targets[begin : begin + rows]
            valid = y != -100
            place = y.clamp(min=0)[:, None]
            logits = _head_outputs(h, weight, bias, None if room is None else room[: len(y)])
            of_target, largest = logits.gather(1, place)[:, 0], logits.amax(-1)
            correct += ((of_target >= largest) & valid).sum()
            gradient = torch.softmax(
                logits, -1, out=logits if logits.device.type == "cpu" else None
            )
            # The largest probability is exp(largest - logsumexp) and never near 0: the logarithm of
            # the sum comes from it.
            nll = (largest - gradient.amax(-1).log() - of_target) * valid
            factor = valid.float() if kind == "nll" else torch.exp(-nll) * valid
            if weights is not None:
                factor = factor * weights[begin : begin + rows]
            nll_sum += nll.sum()
            loss += (nll * factor).sum()
            if not any((need_hidden, need_weight, need_bias)):
                continue
            gradient.scatter_add_(1, place, torch.full_like(place, -1, dtype=gradient.dtype))
            # Each row of it has its factor still to come: it is put to the smaller matrix of each
            # product.
            if d_bias is not None:
                d_bias += gradient.T @ factor
            gradient, factor = gradient.to(h.dtype), factor[:, None].to(h.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[begin : begin + rows])
                d_hidden[begin : begin + rows] *= factor
            if d_weight is not None and h.dtype == torch.float32:
                d_weight.addmm_(gradient.T, h * factor)
            elif d_weight is not None:
                d_weight += gradient.T @ (h * factor)
        # Not saved as tensors of the graph: so that backward may change them in place, and give
        # them away.
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype
        ctx.mark_non_differentiable(nll_sum, correct)
        return loss, nll_sum, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, *upstream: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were taken before; compute it again")
        (d_hidden, d_weight, d_bias), ctx.gradients = ctx.gradients, None
        factor = upstream[0]
        return (
            None if d_hidden is None else d_hidden.mul_(factor),
            None if d_weight is None else d_weight.mul_(factor).to(ctx.dtypes),
            None if d_bias is None else d_bias.mul_(factor).to(ctx.dtypes),
            None,
            None,
            None,
            None,
        )


def _head_outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """Logits in float32, written into `out` where it is given."""
    if bias is None:
        return torch.mm(hidden, weight.T, out=out).float()
    return torch.addmm(bias, hidden, weight.T, out=out).float()

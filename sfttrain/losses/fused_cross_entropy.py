"""Loss of scored positions: from logits, or fused with the head without logits.

The idea of the fused loss: the gradient of cross-entropy with respect to the logits is softmax
minus one-hot, which is known as soon as the logits are. The gradients of the head's inputs, weight
and bias follow from it, except for one factor that all positions share: the incoming gradient of
the summed loss.

1. The forward computes the logits of a chunk of positions (about 64 MiB), and their loss.
2. If gradients are needed, it turns these logits in place into their gradient, and adds the
   gradients of the head's inputs, weight and bias.
3. The backward multiplies these gradients by the incoming gradient.

The cost is three matrix products with the head (two if the head is frozen); recomputing the logits
in the backward would cost four. The logits of all positions are never in memory together. The slow
reference is `loss_from_logits`, against which tests/sfttrain/test_loss.py tests the fused loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sftprep.errors import ConfigError, setting
from sfttrain.finite import reject_not_finite
from sfttrain.models.unwrap import unwrap_peft

LossType = Literal["nll", "dft"]

_CHUNK_BYTES = 64 * 2**20
"""Size of the float32 logits of a chunk."""


class LossSums(NamedTuple):
    """Sums over the scored positions of a row, on the device and not yet read."""

    loss: Tensor
    """Sum of the loss that is minimised; float32 scalar, differentiable."""
    nll: Tensor
    """Sum of the negative log likelihood; float32 scalar."""
    correct: Tensor
    """Number of positions at which no token is more likely than the target; int64 scalar."""
    tokens: Tensor
    """Number of positions whose target is not -100; int64 scalar."""
    weight: Tensor
    """Sum of the weights of these positions; without weights, their number. float32 scalar."""


@dataclass(frozen=True)
class LossPlan:
    """How the loss of one model is computed."""

    kind: LossType = "nll"
    head: nn.Linear | None = None
    """The plain linear head that is fused with the loss; None for a loss from logits."""

    def outputs_are_hidden(self) -> contextlib.AbstractContextManager[None]:
        """Make the model return the inputs of its head as logits, in this context.

        Without a fused head, the model is not changed.
        """
        return contextlib.nullcontext() if self.head is None else _bypass_head(self.head)

    def sums(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> LossSums:
        """Return the sums of the loss; the mean is `loss / weight`.

        Args:
            outputs: Logits [n, V]; with a fused head, its inputs [n, H].
            targets: Correct tokens, int64 [n]; -100 is not counted.
            weights: Weight of each position, float32 [n]; None if all weights are 1.
        """
        if self.head is None:
            return loss_from_logits(outputs, targets, self.kind, weights)
        return fused_loss(outputs, self.head.weight, self.head.bias, targets, self.kind, weights)


def loss_from_logits(
    logits: Tensor, targets: Tensor, kind: LossType = "nll", weights: Tensor | None = None
) -> LossSums:
    """Return the sums of the loss over n positions.

    Args:
        logits: [n, V].
        targets: Correct tokens, int64 [n]; -100 is not counted.
        kind: `dft` multiplies the loss of each token by its own probability, held constant
            (https://arxiv.org/abs/2508.05629).
        weights: Weight of each position, float32 [n]; None if all weights are 1.
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
        weighted.sum(), nll.detach().sum(), correct, valid.sum(), _sum_weights(valid, weights)
    )


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kind: LossType = "nll",
    weights: Tensor | None = None,
) -> LossSums:
    """Return the sums of the loss over n positions of a linear head; see the module.

    Args:
        hidden: Inputs of the head, [n, H].
        weight: Weight of the head, [V, H].
        bias: Bias of the head, [V]; None without a bias.
        targets: Correct tokens, int64 [n]; -100 is not counted.
        kind: As in `loss_from_logits`.
        weights: Weight of each position, float32 [n]; None if all weights are 1.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        # Autocast has no effect inside a custom function, so the tensors that it would cast in a
        # linear layer are cast here.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    apply: Any = _FusedHeadLoss.apply
    loss, nll, correct = apply(
        hidden, weight, bias, targets, weights, kind, torch.is_grad_enabled()
    )
    valid = targets != -100
    return LossSums(loss, nll, correct, valid.sum(), _sum_weights(valid, weights))


def plan_loss(
    model: nn.Module, requested: str, kind: LossType, *, fusable: bool = True
) -> LossPlan:
    """Choose between the loss from logits and the fused loss.

    Fusing requires a plain linear head whose outputs are the logits, which a short forward
    verifies. A scale of the logits is permitted: while the head is bypassed it is applied to the
    inputs of the head, which has the same effect. Softcapping is not permitted.

    Args:
        model: The model.
        requested: auto, logits or fused. `auto` fuses on CPUs and with frozen heads, where fusing
            was measured to be faster, if it is possible.
        kind: The kind of loss.
        fusable: False if the weights of the model are sharded or compiled.

    Raises:
        ConfigError: If `fused` is requested and not possible.
    """
    if requested == "logits":
        return LossPlan(kind)
    inner = unwrap_peft(model)
    head = inner.get_output_embeddings()
    device = next(model.parameters()).device
    if (
        requested == "auto"
        and type(head) is nn.Linear
        and head.weight.requires_grad
        and device.type != "cpu"
    ):
        return LossPlan(kind)
    reason = (
        "its weights are sharded or compiled"
        if not fusable
        else _explain_not_plain(inner, head, device)
    )
    if not reason:
        return LossPlan(kind, head)
    if requested == "fused":
        raise ConfigError(
            f"{setting('loss_impl', 'fused')} is not possible with {type(inner).__name__}:"
            f" {reason}",
            remedy=f"use {setting('loss_impl', 'auto')}",
        )
    return LossPlan(kind)


def _sum_weights(valid: Tensor, weights: Tensor | None) -> Tensor:
    """Return the sum of the weights of the valid positions: a float32 scalar."""
    return valid.sum().float() if weights is None else (weights * valid).sum()


def _explain_not_plain(model: Any, head: Any, device: torch.device) -> str:
    """Return why logits are not `head(hidden)` of a plain linear head, or ""."""
    if type(head) is not nn.Linear or head.weight.dtype.itemsize < 2:
        return f"its head is a {type(head).__name__}, not a plain linear layer"
    ids = torch.arange(4, device=device)[None] % head.weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            with _bypass_head(head):
                hidden = model(input_ids=ids).logits
            if hidden.shape[-1] != head.in_features:
                return "its head is not its last layer"
            recomputed = head(hidden)
    finally:
        model.train(was_training)
    if not bool(logits.isfinite().all()):
        reject_not_finite(model)  # training cannot succeed, whatever the head is
        return "its logits are not finite"
    is_equal = torch.allclose(
        logits.float(), recomputed.float(), rtol=1e-3, atol=1e-3 * float(logits.float().std())
    )
    return "" if is_equal else "the logits are changed after the head, for example by softcapping"


@contextlib.contextmanager
def _bypass_head(head: nn.Linear) -> Iterator[None]:
    """Make the head return its inputs while the context is open."""
    keep_in_graph: Any = _KeepInGraph.apply

    def forward(hidden: Tensor) -> Tensor:
        passed: Tensor = keep_in_graph(hidden, head.weight, head.bias)
        return passed

    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]


class _KeepInGraph(torch.autograd.Function):
    """Identity of `hidden` with the head's parameters in its graph.

    The parameters get no gradients from it.

    DistributedDataParallel searches the graph of a model's outputs for parameters without a part in
    it, and marks their gradients as ready. The head takes part only later, in the loss, so without
    this function its gradients would be marked as ready twice, which is an error.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0], None, None


class _FusedHeadLoss(torch.autograd.Function):
    """Loss and gradients of a linear head; see the module.

    Gradients have the dtype of their tensors, but those of the head are summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        kind: LossType,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # needs_input_grad ignores no_grad, hence `grad_enabled`.
        need_hidden, need_weight, need_bias = (
            grad_enabled and needed for needed in ctx.needs_input_grad[:3]
        )
        loss = hidden.new_zeros((), dtype=torch.float32)
        nll_sum = loss.clone()
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if need_bias else None
        rows = max(16, _CHUNK_BYTES // (4 * weight.shape[0]))
        # All chunks share one buffer, in which logits become probabilities and then gradients.
        buffer = (
            weight.new_empty((min(rows, len(targets)), weight.shape[0]))
            if hidden.dtype == torch.float32
            else None  # logits of other dtypes are copied to float32 anyway
        )
        for begin in range(0, len(targets), rows):
            h, y = hidden[begin : begin + rows], targets[begin : begin + rows]
            valid = y != -100
            # Loss of the chunk. The factor is the gradient of the loss with respect to the NLL.
            out = None if buffer is None else buffer[: len(y)]
            gradient, nll, is_best = _chunk_nll(h, weight, bias, y, out)
            correct += (is_best & valid).sum()
            nll = nll * valid
            factor = valid.float() if kind == "nll" else torch.exp(-nll) * valid
            if weights is not None:
                factor = factor * weights[begin : begin + rows]
            nll_sum += nll.sum()
            loss += (nll * factor).sum()
            if not any((need_hidden, need_weight, need_bias)):
                continue
            # Softmax minus one-hot. The factor multiplies the smaller matrix of each product.
            index = y.clamp(min=0)[:, None]
            gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
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
        # Not saved with the graph, so that the backward may change them in place and return them.
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.head_dtype = weight.dtype
        ctx.mark_non_differentiable(nll_sum, correct)
        return loss, nll_sum, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, *upstream: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of this loss were used already; compute the loss again"
            )
        (d_hidden, d_weight, d_bias), ctx.gradients = ctx.gradients, None
        factor = upstream[0]
        return (
            None if d_hidden is None else d_hidden.mul_(factor),
            None if d_weight is None else d_weight.mul_(factor).to(ctx.head_dtype),
            None if d_bias is None else d_bias.mul_(factor).to(ctx.head_dtype),
            None,
            None,
            None,
            None,
        )


def _chunk_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the probabilities and the negative log likelihood of a chunk.

    The chunk has r positions.

    Args:
        hidden: Inputs of the head, [r, H].
        weight: Weight of the head, [V, H].
        bias: Bias of the head, [V]; None without a bias.
        targets: Correct tokens, int64 [r]; where it is -100, the results are meaningless.
        out: A buffer for the logits, [r, V]; None to allocate them.

    Returns:
        Probabilities, float32 [r, V]; NLL, float32 [r]; and whether no token is more likely than
        the target, bool [r].
    """
    logits = (
        torch.mm(hidden, weight.T, out=out)
        if bias is None
        else torch.addmm(bias, hidden, weight.T, out=out)
    ).float()
    of_target = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    largest = logits.amax(-1)
    probabilities = torch.softmax(logits, -1, out=logits if logits.device.type == "cpu" else None)
    # The logarithm of the sum of exponentials comes from the largest probability, which is
    # exp(largest - logsumexp) and never near 0.
    nll = largest - probabilities.amax(-1).log() - of_target
    return probabilities, nll, of_target >= largest

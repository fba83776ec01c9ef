"""Forward pass of a packed row, with logits only where the next token is trained.

A row is passed as it is, with the offsets of its sequences, or unpacked into padded batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfttrain.compat import skip_sequence_search
from sfttrain.data.batching import RowBatch
from sfttrain.models.unwrap import unwrap_peft
from sfttrain.packed.padded_fallback import group_by_length


class ScoredOutputs(NamedTuple):
    """Outputs of a model at n scored positions."""

    outputs: Tensor
    """Logits [n, V]; the inputs of the head [n, H] while `LossPlan.outputs_are_hidden` is open."""
    targets: Tensor
    """Correct tokens, int64 [n]; -100 is not counted."""
    weights: Tensor | None
    """Weight of each position in the loss, float32 [n]; None if all weights are 1."""


@dataclass(frozen=True)
class ForwardMode:
    """How rows are passed to one model."""

    attention: str
    """Attention implementation of the model."""
    unpack: bool
    """Whether sequences are passed as padded batches, because the model would mix those of a
    row."""
    parameters: frozenset[str]
    """Names of the parameters of the model's forward."""
    accepts_any: bool
    """Whether the forward has a `**kwargs` parameter."""

    @classmethod
    def from_model(cls, model: nn.Module, attention: str, *, unpack: bool = False) -> ForwardMode:
        """Return the mode for a model; an adapter around it is skipped."""
        parameters = inspect.signature(unwrap_peft(model).forward).parameters
        accepts_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return cls(attention, unpack, frozenset(parameters), accepts_any)

    def accepts(self, name: str) -> bool:
        """Return whether the forward accepts a keyword argument."""
        return self.accepts_any or name in self.parameters


def scored_outputs(model: nn.Module, batch: RowBatch, mode: ForwardMode) -> ScoredOutputs:
    """Run the model on a row and return its logits at the scored positions.

    Logits of other positions are not computed if the forward has a `logits_to_keep` parameter.

    Args:
        model: The model.
        batch: The row, on the device of the model.
        mode: How the row is passed. If `mode.unpack` is set, the positions are in the order of the
            padded batches, and further positions with the target -100 may be among them.
    """
    if not mode.unpack:
        return ScoredOutputs(_run_packed(model, batch, mode), batch["targets"], batch["weights"])
    outputs, targets, weights = zip(*_run_unpacked(model, batch, mode), strict=True)
    return ScoredOutputs(
        torch.cat(outputs),
        torch.cat(targets),
        None if batch["weights"] is None else torch.cat(weights),
    )


def packed_arguments(batch: RowBatch, mode: ForwardMode) -> dict[str, Any]:
    """Return the arguments of the model for a packed row.

    An attention mask is never passed: implementations with a mask ignore the offsets.
    """
    arguments: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "cu_seq_lens_q": batch["cu_seq_lens_q"],
        "cu_seq_lens_k": batch["cu_seq_lens_k"],
        "max_length_q": batch["max_length_q"],
        "max_length_k": batch["max_length_k"],
    }
    if mode.accepts("use_cache"):
        arguments["use_cache"] = False
    if mode.attention == "sft_varlen":
        arguments["seq_lens"] = batch["seq_lens"]  # on the host, so that no forward waits
    return arguments


def _run_packed(model: nn.Module, batch: RowBatch, mode: ForwardMode) -> Tensor:
    arguments = packed_arguments(batch, mode)
    scored = batch["scored"]
    with skip_sequence_search():
        if "logits_to_keep" in mode.parameters:
            kept: Tensor = model(**arguments, logits_to_keep=scored).logits
            return kept[0]
        logits: Tensor = model(**arguments).logits
    return logits[0, scored]


def _run_unpacked(
    model: nn.Module, batch: RowBatch, mode: ForwardMode
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield outputs, targets and weights of one padded batch after the other.

    Batches without a trained token are skipped, but at least one batch is run, so that every rank
    takes part in every step.
    """
    # Spread targets and weights over all T positions of the row.
    ids, device = batch["input_ids"][0], batch["input_ids"].device
    row_targets = torch.full_like(ids, -100)
    row_targets[batch["scored"]] = batch["targets"]
    weights = torch.ones_like(ids, dtype=torch.float32)
    if batch["weights"] is not None:
        weights[batch["scored"]] = batch["weights"]
    groups = list(group_by_length(batch["seq_lens"]))
    done = 0
    for number, group in enumerate(groups):
        index, real = group.index.to(device), group.real.to(device)
        targets = row_targets[index].masked_fill(~real, -100)
        # Keep the columns in which at least one sequence has a target.
        columns = (targets != -100).any(0).nonzero()[:, 0]
        if len(columns) == 0:
            if done or number < len(groups) - 1:
                continue
            columns = columns.new_zeros(1)
        done += 1
        # Run the padded batch.
        arguments: dict[str, Any] = {"input_ids": ids[index].masked_fill(~real, 0)}
        if mode.accepts("attention_mask"):
            arguments["attention_mask"] = real.long()
        if mode.accepts("use_cache"):
            arguments["use_cache"] = False
        if "logits_to_keep" in mode.parameters:
            logits = model(**arguments, logits_to_keep=columns).logits
        else:
            logits = model(**arguments).logits[:, columns]
        # Select the scored positions; without any, one position whose target is -100.
        kept = targets[:, columns]
        scored = kept != -100
        if not bool(scored.any()):
            scored = torch.zeros_like(scored)
            scored[0, 0] = True
        yield logits[scored], kept[scored], weights[index][:, columns][scored]

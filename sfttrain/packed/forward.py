"""How a packed row is given to a model: as it is, with the bounds of its sequences, or unpacked
into padded batches."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfttrain.data.batching import RowBatch
from sfttrain.models.unwrap import unwrap_peft
from sfttrain.packed.padded_fallback import groups_of_like_length


class Scored(NamedTuple):
    """What a model says where it is scored."""

    outputs: Tensor
    """[n, V] logits, or [n, H] inputs of the head while `LossPlan.outputs_are_hidden`"""
    targets: Tensor
    """int64 [n]: the tokens that should have come; -100 counts nothing"""
    weights: Tensor | None
    """float32 [n]: what each weighs, or None where all weigh 1"""


@dataclass(frozen=True)
class ForwardMode:
    """The way rows go into one model."""

    attention: str
    """Attention implementation that the model is set to."""
    unpack: bool
    """Sequences go in as padded batches, because the model would mix them in one row."""
    parameters: frozenset[str]
    """Parameters of the model's forward."""
    takes_any: bool
    """Its forward takes further keyword arguments and passes them on."""

    @classmethod
    def of(cls, model: nn.Module, attention: str, *, unpack: bool = False) -> ForwardMode:
        """Look at the forward of `model` (below an adapter, if there is one)."""
        parameters = inspect.signature(unwrap_peft(model).forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return cls(attention, unpack, frozenset(parameters), takes_any)

    def takes(self, name: str) -> bool:
        """Whether forward takes this keyword argument."""
        return self.takes_any or name in self.parameters


def scored_outputs(model: nn.Module, batch: RowBatch, feeding: ForwardMode) -> Scored:
    """Run the model and return its logits where they are scored, with the tokens that should have
    come.

    Logits are made only there, through the model's own `logits_to_keep`, where its forward has that
    parameter. With `feeding.unpack` the order is that of the padded batches, and n may differ by
    targets of -100.
    """
    if not feeding.unpack:
        return Scored(_packed_outputs(model, batch, feeding), batch["targets"], batch["weights"])
    outputs, targets, weights = zip(*_unpacked_outputs(model, batch, feeding), strict=True)
    return Scored(
        torch.cat(outputs),
        torch.cat(targets),
        None if batch["weights"] is None else torch.cat(weights),
    )


def packed_arguments(batch: RowBatch, feeding: ForwardMode) -> dict[str, Any]:
    """What the model is called with for a packed row. There is never an attention mask: it would
    hide the bounds."""
    arguments: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "cu_seq_lens_q": batch["cu_seq_lens_q"],
        "cu_seq_lens_k": batch["cu_seq_lens_k"],
        "max_length_q": batch["max_length_q"],
        "max_length_k": batch["max_length_k"],
    }
    if feeding.takes("use_cache"):
        arguments["use_cache"] = False
    if feeding.attention == "sft_varlen":
        arguments["seq_lens"] = batch["seq_lens"]
    return arguments


def _packed_outputs(model: nn.Module, batch: RowBatch, feeding: ForwardMode) -> Tensor:
    arguments = packed_arguments(batch, feeding)
    scored = batch["scored"]
    with _bounds_are_known():
        if "logits_to_keep" in feeding.parameters:
            kept: Tensor = model(**arguments, logits_to_keep=scored).logits
            return kept[0]
        every: Tensor = model(**arguments).logits
    return every[0, scored]


@contextlib.contextmanager
def _bounds_are_known() -> Iterator[None]:
    """While this is open, transformers does not look for sequences in the position_ids of a row.

    It would, to build a mask that attention with explicit bounds has no use for, and the program
    would wait for the device at every forward to see whether there are any.
    """
    from transformers import masking_utils

    rooms = vars(masking_utils)
    before = rooms.get("find_packed_sequence_indices")
    if before is None:  # another version, which does it some other way
        yield
        return
    rooms["find_packed_sequence_indices"] = _found_none
    try:
        yield
    finally:
        rooms["find_packed_sequence_indices"] = before


def _found_none(position_ids: Tensor) -> None:
    """In place of transformers' search: one sequence a row, as far as masks go."""


def _unpacked_outputs(
    model: nn.Module, batch: RowBatch, feeding: ForwardMode
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Outputs, targets and weights of one padded batch after another.

    Batches in which nothing is trained are left out, except the last one standing.
    """
    ids, device = batch["input_ids"][0], batch["input_ids"].device
    wanted = torch.full_like(ids, -100)
    wanted[batch["scored"]] = batch["targets"]
    weights = torch.ones_like(ids, dtype=torch.float32)
    if batch["weights"] is not None:
        weights[batch["scored"]] = batch["weights"]
    groups = list(groups_of_like_length(batch["seq_lens"]))
    done = 0
    for number, group in enumerate(groups):
        index, real = group.index.to(device), group.real.to(device)
        targets = wanted[index].masked_fill(~real, -100)
        columns = (targets != -100).any(0).nonzero()[:, 0]
        if len(columns) == 0:
            if done or number < len(groups) - 1:
                continue
            columns = columns.new_zeros(1)
        done += 1
        arguments: dict[str, Any] = {"input_ids": ids[index].masked_fill(~real, 0)}
        if feeding.takes("attention_mask"):
            arguments["attention_mask"] = real.long()
        if feeding.takes("use_cache"):
            arguments["use_cache"] = False
        if "logits_to_keep" in feeding.parameters:
            logits = model(**arguments, logits_to_keep=columns).logits
        else:
            logits = model(**arguments).logits[:, columns]
        kept = targets[:, columns]
        scored = kept != -100
        if not bool(scored.any()):
            scored = torch.zeros_like(scored)
            scored[0, 0] = True
        yield logits[scored], kept[scored], weights[index][:, columns][scored]

"""The central types of pass 1: what the user meant (`Example`), and its tokens in flat buffers
(`TokenBatch`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import edges

_Value = TypeVar("_Value", np.int32, np.bool_, np.float32)

Message = dict[str, Any]
"""One turn, as chat templates take it: `role`, `content`, and whatever else the template reads
(`tool_calls`, ...)."""


@dataclass(slots=True)
class PretokenizedRow:
    """Tokens that a record brings along: ids int32 [n], which of them are trained bool [n], and the
    lengths of the sequences that they are, int64 [s], which sum to n."""

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int64]


@dataclass(slots=True)
class Example:
    """One record, in one of six shapes: text; several texts; prompt + completion text; messages;
    prompt + completion messages; tokens.

    origin: line of the record within its partition, from 0. The fields of the other shapes are
    None. weights: what each message weighs in the loss, None for one that does not say; None where
    no message does. bare: it is known that no message has more than a role and one thing beside it.
    """

    origin: int
    text: str | None = None
    texts: list[str] | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = None
    prompt_messages: list[Message] | None = None
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None
    weights: list[float | None] | None = None
    given: PretokenizedRow | None = None
    bare: bool = False


@dataclass(slots=True)
class Rejected:
    """A record that is set aside. line: from 0 within its partition; column: from 1, 0 where
    unknown."""

    line: int
    column: int
    reason: str
    message: str
    excerpt: str


@dataclass(slots=True)
class TokenBatch:
    """Tokenized sequences, flat.

    input_ids: int32 [tokens]; offsets: int64 [n + 1], sequence k is input_ids[offsets[k]:offsets[k
    + 1]]; completion_mask: bool [tokens], True = trained; origin: int64 [n], line of each
    sequence's record within its partition; loss_weights: float32 [tokens], what a trained token
    weighs in the loss, None where every one weighs 1.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    completion_mask: NDArray[np.bool_]
    origin: NDArray[np.int64]
    rejected: list[Rejected] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    loss_weights: NDArray[np.float32] | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each sequence: int64 [n]."""
        return np.diff(self.offsets)

    def gathered(
        self,
        which: NDArray[np.int64],
        lengths: NDArray[np.int64],
        starts: NDArray[np.int64] | None = None,
    ) -> TokenBatch:
        """Sequence i is `lengths[i]` tokens of sequence `which[i]`, from its token `starts[i]` on,
        or from its first."""
        begins = self.offsets[:-1][which] if starts is None else self.offsets[:-1][which] + starts
        runs = _runs(begins, begins + lengths)
        ids, mask = _taken(self.input_ids, runs), _taken(self.completion_mask, runs)
        weights = None if self.loss_weights is None else _taken(self.loss_weights, runs)
        return TokenBatch(ids, edges(lengths), mask, self.origin[which], loss_weights=weights)


def _runs(begins: NDArray[np.int64], ends: NDArray[np.int64]) -> list[slice]:
    """Ranges of tokens, those that follow each other as one: most do."""
    apart = begins[1:] != ends[:-1]
    first, last = np.r_[True, apart][: len(begins)], np.r_[apart, True][: len(begins)]
    return [*map(slice, begins[first].tolist(), ends[last].tolist())]


def _taken(values: NDArray[_Value], runs: list[slice]) -> NDArray[_Value]:
    return np.concatenate([values[:0], *(values[run] for run in runs)])

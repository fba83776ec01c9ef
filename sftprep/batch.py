"""The two central types of pass 1: what the user meant (`Example`), and its tokens in flat buffers (`TokenBatch`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Message = dict[str, Any]
"""One turn, as chat templates take it: `role`, `content`, and whatever else the template reads (`tool_calls`, ...)."""


@dataclass(slots=True)
class Example:
    """One record, in one of four shapes: text; prompt + completion text; messages; prompt + completion messages.

    origin: line of the record within its partition, from 0. The fields of the other shapes are None.
    """

    origin: int
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = None
    prompt_messages: list[Message] | None = None
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None


@dataclass(slots=True)
class Rejected:
    """A record that is set aside. line: from 0 within its partition; column: from 1, 0 where unknown."""

    line: int
    column: int
    reason: str
    message: str
    excerpt: str


@dataclass(slots=True)
class TokenBatch:
    """Tokenized sequences, flat.

    input_ids: int32 [tokens]; offsets: int64 [n + 1], sequence k is input_ids[offsets[k]:offsets[k + 1]];
    completion_mask: bool [tokens], True = trained; origin: int64 [n], line of each sequence's record within its partition.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    completion_mask: NDArray[np.bool_]
    origin: NDArray[np.int64]
    rejected: list[Rejected] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each sequence: int64 [n]."""
        return np.diff(self.offsets)

"""Central types of pass 1: parsed records and their tokens.

These are `Example` and `TokenBatch`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sftprep.core.ragged import to_offsets

_Value = TypeVar("_Value", np.int32, np.bool_, np.float32)

Message = dict[str, Any]
"""One turn of a conversation, as chat templates read it: `role`, `content`, and any other key that
the template uses (`tool_calls`, ...)."""


def function_of(call: Any) -> Any:
    """Return the function of a call or of a tool.

    It is under the key "function", as in OpenAI's API, or is the object itself.
    """
    function = call.get("function") if isinstance(call, dict) else None
    return call if function is None else function


@dataclass(slots=True)
class PretokenizedRow:
    """Tokens from a pretokenized record.

    Attributes:
        input_ids: int32 [n].
        trained: bool [n], True for the tokens that are trained.
        lengths: int64 [s], the lengths of the sequences; their sum is n.
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int64]


@dataclass(slots=True)
class Example:
    """One record in one of five forms; the fields of the other forms are None.

    The forms are: `text`; `prompt` and `completion`; `messages`; `messages` of which the first are
    `prompt_messages`; `pretokenized` (tokens).

    Attributes:
        line: The line of the record in its partition, from 0.
        weights: The loss weight of each message, None for a message without one; None if no message
            has a weight.
        bare: Whether every message is known to have only a role and one other key, so that the
            template cannot depend on anything else.
        images_dropped: Whether images were removed from the record.
        unread_texts: The texts of the turns that the messages lack.
        unread_switch: Whether a turn has a key that appears to select what is trained, and that is
            not read.
        system_added: Whether the system message is that of the settings.
        replaced: The values of the record that renamed keys replaced, by their original key.
    """

    line: int
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = None
    prompt_messages: list[Message] | None = None
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None
    weights: list[float | None] | None = None
    pretokenized: PretokenizedRow | None = None
    bare: bool = False
    images_dropped: bool = False
    unread_texts: tuple[str, ...] = ()
    unread_switch: bool = False
    system_added: bool = False
    replaced: dict[str, Any] | None = None


@dataclass(slots=True)
class Rejected:
    """A record rejected as unusable.

    Attributes:
        line: The line of the record in its partition, from 0.
        column: The column of the problem, from 1; 0 if it is not known.
        reason: A short stable name such as `bad_json`.
        message: The description of the problem.
        excerpt: The start of the record, escaped for a terminal.
    """

    line: int
    column: int
    reason: str
    message: str
    excerpt: str


class Flag(IntFlag):
    """The changes to a sequence since its record, as stored in shards."""

    TRUNCATED = 1  # only the start or the end of the record's sequence is left
    SPLIT = 2  # it is one of several parts of the record's sequence
    REPEATED = 4  # the build contains the record's sequence before this one
    CONTENT_NOT_SHOWN = 8  # the chat template dropped a part of the record


class Counts(Counter[str]):
    """The counters of a partition by name, with the first line of each warning.

    Attributes:
        first_lines: By the name of a counter, the first line that it counts, from 0.
        unread_columns: The columns with content that the format does not read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first_lines: dict[str, int] = {}
        self.unread_columns: list[str] = []
        self._counted_once: set[tuple[str, int]] = set()

    def warn_once(self, kind: str, line: int) -> None:
        """Count a warning about a record, unless it was counted for this line before."""
        if (kind, line) not in self._counted_once:
            self._counted_once.add((kind, line))
            self.warn(kind, line)

    def warn(self, kind: str, line: int, number: int = 1) -> None:
        """Count a warning.

        Args:
            kind: The kind, which is counted as `warnings.KIND`.
            line: The first line that it concerns, from 0.
            number: The number of its records or sequences.
        """
        name = f"warnings.{kind}"
        self[name] += number
        self.first_lines[name] = min(line, self.first_lines.get(name, line))


@dataclass(slots=True)
class TokenBatch:
    """Tokenized sequences in flat arrays.

    Attributes:
        input_ids: int32 [tokens].
        offsets: int64 [n + 1]; sequence k is `input_ids[offsets[k] : offsets[k + 1]]`.
        completion_mask: bool [tokens], True for the tokens that are trained.
        line_of: int64 [n], the line of the record of each sequence in its partition.
        rejected: The records that cannot be used.
        counts: Counters of the partition by name, such as `records`.
        loss_weights: float32 [tokens], the weight of each token in the loss; None if all are 1.
        record: int64 [n], the number of the record of each sequence among those that a function
            of the user made of the partition; None without a function: it is `line_of` then.
        exact_hashes: uint64 [n], the hash of what is read of the record of each sequence; None if
            records are not compared. Equal hashes are a duplicate.
        near_hashes: uint64 [n], the hash of the same without whitespace. Equal hashes are a near
            duplicate.
        first_lines: By the name of a count, the line of the first record that it counts.
        flags: uint8 [n], what happened to each sequence (`Flag`); None if all are 0.
        unread_columns: The columns with content that the format does not read, of all records.

    Example:
        Two sequences, [5, 6] and [7], of the records in lines 0 and 2:
        input_ids = [5, 6, 7], offsets = [0, 2, 3], line_of = [0, 2]
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    completion_mask: NDArray[np.bool_]
    line_of: NDArray[np.int64]
    rejected: list[Rejected] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    loss_weights: NDArray[np.float32] | None = None
    record: NDArray[np.int64] | None = None
    exact_hashes: NDArray[np.uint64] | None = None
    near_hashes: NDArray[np.uint64] | None = None
    first_lines: dict[str, int] = field(default_factory=dict)
    flags: NDArray[np.uint8] | None = None
    unread_columns: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each sequence: int64 [n]."""
        return np.diff(self.offsets)

    def gather(
        self,
        indices: NDArray[np.int64],
        lengths: NDArray[np.int64],
        starts: NDArray[np.int64] | None = None,
    ) -> TokenBatch:
        """Return a batch of parts of the sequences.

        It has no counts and no rejected records.

        Args:
            indices: int64 [m], the sequence of each part.
            lengths: int64 [m], the number of tokens of each part.
            starts: int64 [m], the first token of each part in its sequence; None for 0.

        Example:
            sequences [[5, 6], [7, 8, 9]], indices = [1, 0], lengths = [2, 2], starts = [1, 0]
            ->  sequences [[8, 9], [5, 6]]
        """
        begins = (
            self.offsets[:-1][indices] if starts is None else self.offsets[:-1][indices] + starts
        )
        runs = _merge_runs(begins, begins + lengths)
        ids = _concatenate_runs(self.input_ids, runs)
        mask = _concatenate_runs(self.completion_mask, runs)
        weights = None if self.loss_weights is None else _concatenate_runs(self.loss_weights, runs)
        flags = None if self.flags is None else self.flags[indices]
        return TokenBatch(
            ids,
            to_offsets(lengths),
            mask,
            self.line_of[indices],
            loss_weights=weights,
            flags=flags,
        )


def _merge_runs(begins: NDArray[np.int64], ends: NDArray[np.int64]) -> list[slice]:
    """Return ranges of tokens as slices, with adjacent ranges merged.

    Most ranges are adjacent.
    """
    is_gap = begins[1:] != ends[:-1]
    first, last = np.r_[True, is_gap][: len(begins)], np.r_[is_gap, True][: len(begins)]
    return [*map(slice, begins[first].tolist(), ends[last].tolist())]


def _concatenate_runs(values: NDArray[_Value], runs: list[slice]) -> NDArray[_Value]:
    # The empty slice gives the result its type if the list of runs is empty.
    return np.concatenate([values[:0], *(values[run] for run in runs)])

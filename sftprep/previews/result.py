"""The result of a preview: records with their tokens, and verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sftprep.core.types import Rejected
from sftprep.shards.ledger import Ledger
from sftprep.shards.length_advice import LengthAdvice

Severity = Literal["major", "minor"]
"""major: a build fails, or trains on something else than the records have; minor: all others."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A finding about the records, and what changes it.

    Attributes:
        severity: How serious it is.
        kind: A short stable name, that of a count of the ledger.
        text: What is wrong.
        number: The number of records or sequences that it concerns.
        counted: What `number` counts, in the singular.
        file: The input with the first of them; "" if it is not known.
        line: The line or row of the first of them, from 1.
        remedy: What changes it; "" if there is nothing to suggest.
    """

    severity: Severity
    kind: str
    text: str
    number: int
    counted: str
    file: str = ""
    line: int = 0
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewSequence:
    """One sequence of a record, as a build stores it.

    Attributes:
        input_ids: int32 [n].
        completion_mask: bool [n], True for the tokens that are trained.
        loss_weights: float32 [n]; None if every trained token has the weight 1.
        pieces: The text of each of the n tokens; "" for a token that completes the character of
            the token before it. Joined, they are the text of the sequence.
        roles: The role that wrote each of the n tokens; "" for text of the template.
        flags: The sum of the flags of the sequence, as in shards.
        cut_before: The number of tokens that were cut before its first one.
        cut_after: The number of tokens that were cut after its last one.
        trained_cut: How many of the cut tokens would be trained.
        dropped: The reason why a build does not contain it; "" if it does.
    """

    input_ids: NDArray[np.int32]
    completion_mask: NDArray[np.bool_]
    loss_weights: NDArray[np.float32] | None
    pieces: tuple[str, ...]
    roles: tuple[str, ...]
    flags: int = 0
    cut_before: int = 0
    cut_after: int = 0
    trained_cut: int = 0
    dropped: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewRecord:
    """A record, and what a build makes of it.

    Attributes:
        file: The input.
        line: The line or row of the record, from 1.
        source: The entry of the mixture.
        sequences: Its sequences.
        rejected: Why it is a bad record; a transform may make several records of one.
        dropped: By the reason, how many of its sequences are left out before they are tokenized.
        verdicts: The verdicts about this record alone.
    """

    file: str
    line: int
    source: str
    sequences: tuple[PreviewSequence, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewSource:
    """How the records of some inputs are read.

    Attributes:
        name: The entry of the mixture; the first of the inputs if those of the entry are read
            differently.
        files: The number of its inputs that are read like this.
        weight: Its weight in a mixture; None without weights.
        format: The format that was detected, or that the settings specify.
        template: The chat template: its file, or the tokenizer that has it; "" without one.
        trained: What is trained, in words.
        not_read: The columns of the first and of the examined records that are not read.
    """

    name: str
    files: int
    weight: float | None
    format: str
    template: str
    trained: str
    not_read: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a build would make of some of its records.

    Attributes:
        sources: How the records are read.
        records: The chosen records, with their tokens; empty in the result of `doctor`.
        verdicts: The verdicts about all records that were examined, the major ones first.
        ledger: The counts of these records, as in a manifest.
        examined_all: Whether these are all records of the inputs.
        tokenizer: The name of the tokenizer.
        encoder: The encoder, and how it was checked, as in a manifest.
        max_length: The limit of the lengths of sequences.
        advice: What the limit cuts, and which one would keep; None if it cuts little.
    """

    sources: tuple[PreviewSource, ...]
    records: tuple[PreviewRecord, ...] = field(repr=False)
    verdicts: tuple[Verdict, ...]
    ledger: Ledger
    examined_all: bool
    tokenizer: str
    encoder: dict[str, Any]
    max_length: int
    advice: LengthAdvice | None = None

    @property
    def ok(self) -> bool:
        """Whether no verdict is major."""
        return all(verdict.severity != "major" for verdict in self.verdicts)

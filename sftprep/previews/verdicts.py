"""Verdicts: the counts and warnings of a build, by how serious they are.

Nothing is checked here. A verdict is major if a build fails, or if it trains on something else than
the records have: messages or calls are lost, nothing is trained, the end of a turn is not trained,
or the sequence starts with two beginning-of-sequence tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sftprep.config.build import BuildConfig
from sftprep.core.omissions import ARGUMENT, CALL, MESSAGE, TEXT_WITH_CALL
from sftprep.core.types import Rejected
from sftprep.errors import (
    PythonNames,
    RecordError,
    SettingNames,
    front_end,
    render_settings,
    setting,
)
from sftprep.pipeline.groups.ledgers import correction_for, remedies_for_rejected
from sftprep.pipeline.passes.overlong import LengthLimit
from sftprep.pipeline.passes.sequence_stats import describe_lengths
from sftprep.previews.result import Severity, Verdict
from sftprep.records.checks.quality_checks import REASONS as SUSPECT_REASONS
from sftprep.shards.ledger import Ledger
from sftprep.shards.length_advice import LengthAdvice, advise_from_counts, describe_advice
from sftprep.shards.warning_kinds import describe_warnings

MAJOR_WARNINGS = frozenset(
    {MESSAGE, CALL, ARGUMENT, TEXT_WITH_CALL, "end_of_turn_not_trained", "double_bos"}
)
"""The kinds of warnings that are major."""
UNTRAINED = "untrained"
"""The count of sequences with an answer of which no token is trained. Others without a trained
token have no answer, which is a warning, or are a part of a sequence that was split."""

Place = tuple[str, int]
"""The name of an input, and a line or row from 1."""


@dataclass(slots=True)
class Findings:
    """The counts of examined records, as pass 1 and the cut make them.

    Attributes:
        counts: The counts, by the names of a ledger.
        firsts: By the name of a count, the first record that it counts.
        rejected: By the reason, the first record that is rejected.
        histograms: The histograms of the lengths before the cut.
    """

    counts: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, Place] = field(default_factory=dict)
    rejected: dict[str, tuple[Place, Rejected]] = field(default_factory=dict)
    histograms: list[NDArray[np.int64]] = field(default_factory=list)

    @property
    def ledger(self) -> Ledger:
        """The counts as a ledger."""
        return Ledger.from_counts(self.counts)

    def advise(self, limit: LengthLimit) -> LengthAdvice | None:
        """Return the advice about the limit of the lengths; None if it cuts little."""
        lengths = describe_lengths(self.histograms, {}, limit)
        return advise_from_counts(self.ledger, lengths, limit.max_length)


def judge(findings: Findings, config: BuildConfig, limit: LengthLimit) -> tuple[Verdict, ...]:
    """Return the verdicts, the major ones first.

    Args:
        findings: The counts of the records.
        config: The settings of the build.
        limit: The limit of the lengths of sequences.
    """
    names = front_end.get(PythonNames())
    verdicts = [
        *_judge_rejected(findings, config, names),
        *_judge_warnings(findings, config, names),
        *_judge_dropped(findings),
        *_judge_cuts(findings, limit),
    ]
    shown = [
        dataclasses.replace(
            verdict,
            text=render_settings(verdict.text, names),
            remedy=render_settings(verdict.remedy, names),
        )
        for verdict in verdicts
    ]
    return tuple(sorted(shown, key=lambda verdict: verdict.severity))


def _judge_rejected(
    findings: Findings, config: BuildConfig, names: SettingNames
) -> Iterator[Verdict]:
    """Yield the verdicts about bad records: major if a build would fail because of them."""
    ledger = findings.ledger
    number = sum(ledger.rejected.values())
    is_quarantined = config.output.on_bad_record == "quarantine"
    fails = not is_quarantined or number > config.output.rejected_limit(ledger.records)
    for reason, count in ledger.rejected.items():
        (file, line), record = findings.rejected[reason]
        correction = correction_for(reason, config.format)
        if is_quarantined:
            suspects = count if reason in SUSPECT_REASONS else 0
            others = remedies_for_rejected({reason: count}, suspects)
            remedy = ", or ".join([correction or "correct the record", *others])
        else:
            # What the build says when it stops at such a record.
            error = RecordError(
                file=file,
                line=line,
                column=record.column,
                reason=reason,
                message=record.message,
                excerpt=record.excerpt,
                correction=correction,
            )
            remedy = error.shown_by(names).remedy
        text = f"{record.message} [{reason}], which makes it a bad record"
        severity: Severity = "major" if fails else "minor"
        yield Verdict(severity, f"rejected.{reason}", text, count, "record", file, line, remedy)


def _judge_warnings(
    findings: Findings, config: BuildConfig, names: SettingNames
) -> Iterator[Verdict]:
    found = {
        name.removeprefix("warnings."): number
        for name, number in findings.counts.items()
        if name.startswith("warnings.") and name != "warnings.suspects_rejected"
    }
    settings = dataclasses.asdict(config.format)
    for warning in describe_warnings(
        found, settings, lambda kind: findings.firsts.get(f"warnings.{kind}")
    ):
        yield Verdict(
            "major" if warning.kind in MAJOR_WARNINGS else "minor",
            warning.kind,
            warning.text,
            warning.number,
            warning.counted,
            warning.file,
            warning.line,
            remedy=warning.remedy_for(names),
        )


def _judge_dropped(findings: Findings) -> Iterator[Verdict]:
    """Yield the verdicts about sequences that a build leaves out."""
    for reason, number in findings.ledger.dropped.items():
        if reason == "no_trained_token":
            continue
        text, counted, remedy = _DROPPED.get(
            reason, (f"the transform leaves out the record [{reason}]", "record", "")
        )
        place = findings.firsts.get(f"dropped.{reason}", ("", 0))
        yield Verdict("minor", reason, text, number, counted, *place, remedy=remedy)
    if findings.counts[UNTRAINED]:
        yield Verdict(
            "major",
            "no_trained_token",
            "no token of it is trained, so a build leaves it out",
            findings.counts[UNTRAINED],
            "sequence",
            *findings.firsts[UNTRAINED],
            remedy=(
                f"raise {setting('max_length')} if its answer is cut, or check"
                f" {setting('train_on')}"
            ),
        )


def _judge_cuts(findings: Findings, limit: LengthLimit) -> Iterator[Verdict]:
    ledger = findings.ledger
    if not ledger.truncated:
        return
    text = (
        f"it is longer than {setting('max_length', limit.max_length)}, and the rest is cut:"
        f" {ledger.tokens_truncated:,} tokens in all, {ledger.trained_truncated:,} of them trained"
    )
    advice = findings.advise(limit)
    split = setting("overlong", "split")
    remedies = [f"raise {setting('max_length')}, or {split} keeps all tokens"]
    if advice is not None:
        _, remedies = describe_advice(advice, limit.max_length)
    place = findings.firsts.get("truncated", ("", 0))
    yield Verdict(
        "minor",
        "truncated",
        text,
        ledger.truncated,
        "sequence",
        *place,
        remedy="; ".join(remedies),
    )


_DROPPED: dict[str, tuple[str, str, str]] = {
    "no_assistant_turn": (
        "it has no turn of the assistant after a prompt, so a build leaves it out",
        "record",
        "",
    ),
    "overlong": (
        "it is too long, so a build leaves it out",
        "sequence",
        f"raise {setting('max_length')}, or cut it with {setting('overlong', 'truncate')}",
    ),
    "of_rejected_record": ("another sequence of its record is too long", "sequence", ""),
    "no_token": ("it has no token", "record", ""),
}
"""For each reason of dropped sequences: what is wrong, what is counted, and the remedy."""

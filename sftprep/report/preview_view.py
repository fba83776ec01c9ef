"""The view of a preview for the terminal, and as JSON.

Each line of the text of a sequence starts with the role that wrote it. A token ends at a middle
dot or where the role changes, a newline is shown as ↵, and trained text is green, or in ⟦ and ⟧
without color.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import numpy as np

from sftprep.errors import escape_control, format_count
from sftprep.previews.result import (
    Preview,
    PreviewRecord,
    PreviewSequence,
    PreviewSource,
    Verdict,
)
from sftprep.report.token_text import (
    BOUNDARY,
    RESET,
    describe_flags,
    describe_weights,
    mark_text,
    wrap_parts,
)

_NEWLINE = "↵"
_ROLE_WIDTH = 11
_INDENTATION = _ROLE_WIDTH + 3
_BRACKETS = 4
"""The columns that are kept free for the signs of trained text."""
_MOST_COLUMNS = {False: 240, True: 4_000}
"""Characters of a stretch of a line, by whether it is trained."""
_FOLDED = {False: (4, 2), True: (40, 10)}
"""The lines at the start and at the end that are shown of a stretch, by whether it is trained."""
_SEVERITY_COLORS = {"major": "\x1b[1;31m", "minor": "\x1b[33m"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewOptions:
    """How a preview is shown.

    Attributes:
        color: Whether to use colors.
        full: Whether to show all text; long stretches are abridged otherwise.
        boundaries: Whether to show where tokens end.
        width: The columns of the terminal, at which lines are wrapped; None: they are not.
    """

    color: bool
    full: bool = False
    boundaries: bool = True
    width: int | None = None


def preview_lines(preview: Preview, options: ViewOptions) -> Iterator[str]:
    """Yield the lines of a preview: how the records are read, the records, and the verdicts."""
    yield from _source_lines(preview)
    for record in preview.records:
        yield ""
        yield from _record_lines(record, options)
    yield ""
    yield from verdict_lines(preview, options)


def verdict_lines(preview: Preview, options: ViewOptions) -> Iterator[str]:
    """Yield the verdicts of a preview, and their number."""
    for verdict in preview.verdicts:
        facts = [format_count(verdict.number, verdict.counted)]
        if verdict.file:
            facts.append(f"first in {escape_control(verdict.file)}:{verdict.line}")
        yield f"{_label(verdict, options)} {escape_control(verdict.text)} ({', '.join(facts)})"
        if verdict.remedy:
            yield f"      → {escape_control(verdict.remedy)}"
    examined = format_count(preview.ledger.records, "record")
    if preview.examined_all:
        scope = f"all {examined}" if preview.ledger.records != 1 else f"the {examined}"
    else:
        scope = f"the {examined} shown" if preview.records else f"a sample of {examined}"
    counts = [
        sum(verdict.severity == severity for verdict in preview.verdicts)
        for severity in _SEVERITY_COLORS
    ]
    numbers = [f"{n} {severity}" for n, severity in zip(counts, _SEVERITY_COLORS, strict=True)]
    noun = "finding" if counts[-1] == 1 else "findings"  # it follows the last number
    yield f"{' and '.join(numbers)} {noun} in {scope}"


def preview_data(preview: Preview) -> dict[str, Any]:
    """Return a preview as JSON values."""
    return {
        "ok": preview.ok,
        "sources": [dataclasses.asdict(source) for source in preview.sources],
        "tokenizer": preview.tokenizer,
        "encoder": preview.encoder,
        "max_length": preview.max_length,
        "records": [_record_data(record) for record in preview.records],
        "verdicts": [dataclasses.asdict(verdict) for verdict in preview.verdicts],
        "accounting": dataclasses.asdict(preview.ledger),
        "examined_all": preview.examined_all,
        "length_advice": None if preview.advice is None else dataclasses.asdict(preview.advice),
    }


def _label(verdict: Verdict, options: ViewOptions) -> str:
    name = "MAJOR" if verdict.severity == "major" else "minor"
    return f"{_SEVERITY_COLORS[verdict.severity]}{name}{RESET}" if options.color else name


# --- the head of a preview ------------------------------------------------------------------------


def _source_lines(preview: Preview) -> Iterator[str]:
    for source in preview.sources:
        yield escape_control(_source_line(source))
        if source.not_read:
            yield escape_control(f"  not read: {', '.join(source.not_read)}")
    yield escape_control(
        f"tokenizer: {preview.tokenizer}, encoder {preview.encoder.get('encoder', '')}; sequences"
        f" of up to {preview.max_length:,} tokens"
    )


def _source_line(source: PreviewSource) -> str:
    facts = [
        *([f"{source.files:,} files"] if source.files > 1 else []),
        *([f"weight {source.weight:g}"] if source.weight is not None else []),
    ]
    inputs = f"{source.name} ({', '.join(facts)})" if facts else source.name
    template = f", rendered by {source.template}" if source.template else ""
    return f"{inputs}: format {source.format}{template}; trained: {source.trained}"


# --- one record -----------------------------------------------------------------------------------


def _record_lines(record: PreviewRecord, options: ViewOptions) -> Iterator[str]:
    place = f"{escape_control(record.file)}:{record.line}"
    if len(record.sequences) != 1:
        yield f"{place}: {format_count(len(record.sequences), 'sequence')}"
    for number, sequence in enumerate(record.sequences, 1):
        head = place if len(record.sequences) == 1 else f"sequence {number}"
        yield f"{head}: {_describe_sequence(sequence)}"
        yield from _text_lines(sequence, options)
    for rejected in record.rejected:
        column = f", column {rejected.column}" if rejected.column else ""
        yield f"  bad record{column}: {escape_control(rejected.message)} [{rejected.reason}]"
        if not record.sequences:
            yield f"  {escape_control(rejected.excerpt)}"
    for verdict in record.verdicts:
        if not verdict.kind.startswith("rejected."):
            yield f"  {_label(verdict, options)} {escape_control(verdict.text)}"


def _describe_sequence(sequence: PreviewSequence) -> str:
    mask = sequence.completion_mask
    # The first token of a sequence is never a target, because nothing predicts it.
    trained = f"{np.count_nonzero(mask[1:]):,} trained"
    weights = describe_weights(sequence.loss_weights, mask)
    dropped = f", LEFT OUT ({sequence.dropped.replace('_', ' ')})" if sequence.dropped else ""
    return (
        f"{format_count(len(mask), 'token')}, {trained}{weights}"
        f"{describe_flags(sequence.flags)}{dropped}"
    )


def _text_lines(sequence: PreviewSequence, options: ViewOptions) -> Iterator[str]:
    cut = sequence.cut_before + sequence.cut_after
    if sequence.cut_before:
        yield f"  … {sequence.cut_before:,} tokens before this are cut …"
    lines = [*_split_lines(sequence, options)]
    turns = accumulate(bool(line.role) for line in lines)
    stretches = groupby(
        zip(turns, lines, strict=True), key=lambda each: (each[0], each[1].is_trained)
    )
    for (_, trained), stretch in stretches:
        yield from _fold([line for _, line in stretch], trained, options)
    if sequence.cut_after:
        yield f"  … {sequence.cut_after:,} tokens after this are cut …"
    if cut:
        yield f"  {sequence.trained_cut:,} of the {cut:,} cut tokens would be trained"


@dataclass(slots=True)
class _Line:
    """A line of the text of a sequence."""

    role: str  # the role that wrote it, where its stretch starts; "" otherwise
    parts: list[tuple[bool, str]] = field(default_factory=list)  # (is trained, text)

    @property
    def is_trained(self) -> bool:
        return any(trained for trained, _ in self.parts)

    def add(self, trained: bool, text: str) -> None:
        if self.parts and self.parts[-1][0] == trained:
            self.parts[-1] = trained, self.parts[-1][1] + text
        else:
            self.parts.append((trained, text))

    def draw(self, options: ViewOptions) -> Iterator[str]:
        shown = []
        for trained, text in self.parts:
            omitted = 0 if options.full else len(text) - _MOST_COLUMNS[trained]
            rest = f" … {omitted:,} more characters"
            shown.append((trained, text[:-omitted] + rest if omitted > 0 else text))
        lines = [shown]
        if options.width is not None:
            lines = wrap_parts(shown, max(20, options.width - _INDENTATION - _BRACKETS))
        role = self.role[:_ROLE_WIDTH]
        for line in lines:
            drawn = [
                mark_text(text, trained=trained, color=options.color) for trained, text in line
            ]
            yield f"  {role:<{_ROLE_WIDTH}} {''.join(drawn)}".rstrip()
            role = ""


def _split_lines(sequence: PreviewSequence, options: ViewOptions) -> list[_Line]:
    """Return the lines of a sequence; a line ends at a newline and where the role changes."""
    lines: list[_Line] = []
    role_before: str | None = None
    tokens = zip(sequence.pieces, sequence.roles, sequence.completion_mask.tolist(), strict=True)
    for piece, role, trained in tokens:
        if role != role_before:
            lines.append(_Line(escape_control(role or "(template)")))
        elif options.boundaries:
            # A token that ends with a newline ends in the line before.
            ended = lines[-1] if lines[-1].parts else lines[-2]
            ended.add(ended.parts[-1][0], BOUNDARY)
        role_before = role
        *whole, rest = _escape(piece).split("\n")
        for text in whole:
            lines[-1].add(trained, text + _NEWLINE)
            lines.append(_Line(""))
        if rest:
            lines[-1].add(trained, rest)
    return [line for line in lines if line.parts]


def _escape(piece: str) -> str:
    return escape_control(piece.replace("\t", "\\t"))


def _fold(lines: list[_Line], trained: bool, options: ViewOptions) -> Iterator[str]:
    """Yield the lines of a stretch, without its middle if it is long."""
    head, tail = _FOLDED[trained]
    omitted = len(lines) - head - tail
    if options.full or omitted <= 1:
        head, tail = len(lines), 0
    for line in lines[:head]:
        yield from line.draw(options)
    if tail:
        what = "trained " if trained else ""
        note = f"… {omitted:,} {what}lines omitted (--full shows them) …"
        yield f"{'':<{_INDENTATION}}{note}"
        for line in lines[-tail:]:
            yield from line.draw(options)


# --- JSON -----------------------------------------------------------------------------------------


def _record_data(record: PreviewRecord) -> dict[str, Any]:
    return {
        "file": record.file,
        "line": record.line,
        "source": record.source,
        "sequences": [_sequence_data(sequence) for sequence in record.sequences],
        "rejected": [
            {name: getattr(each, name) for name in ("column", "reason", "message", "excerpt")}
            for each in record.rejected
        ],
        "dropped": record.dropped,
        "verdicts": [dataclasses.asdict(verdict) for verdict in record.verdicts],
    }


def _sequence_data(sequence: PreviewSequence) -> dict[str, Any]:
    """Return a sequence as JSON values; its arrays have one value per token."""
    names = ("pieces", "roles", "flags", "cut_before", "cut_after", "trained_cut", "dropped")
    data: dict[str, Any] = {
        "input_ids": sequence.input_ids.tolist(),
        "completion_mask": sequence.completion_mask.tolist(),
        **{name: getattr(sequence, name) for name in names},
    }
    if sequence.loss_weights is not None:
        data["loss_weights"] = sequence.loss_weights.tolist()
    return data

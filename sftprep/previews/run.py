"""Previews of builds: the first passes over some records, with nothing written.

1. The setup of a build detects the formats, loads the tokenizer and checks the settings.
2. Some records are chosen (sample.py).
3. Pass 1 and the cut of a build make sequences of them.
4. The tokens get their texts and roles (tokens.py), and the counts become verdicts (verdicts.py).

Steps 1 and 3 are the functions of the build itself, so a preview shows what a build stores. Only
the spot check of the encoder on the data is left out.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from sftprep.config.build import BuildConfig
from sftprep.core.mask_arrays import TargetRuns, find_targets
from sftprep.core.types import Flag, TokenBatch
from sftprep.pipeline.passes.overlong import FittedSequences, LengthLimit, fit_lengths
from sftprep.pipeline.passes.preprocess import Preprocessor, begin_preprocess
from sftprep.pipeline.passes.sequence_stats import count_lengths
from sftprep.pipeline.prepare.setup import Setup, prepare_reading
from sftprep.previews.result import (
    Preview,
    PreviewRecord,
    PreviewSequence,
    PreviewSource,
)
from sftprep.previews.sample import ChosenRecord, RecordChoice, choose_records, sample_records
from sftprep.previews.tokens import TokenTexts
from sftprep.previews.verdicts import UNTRAINED, Findings, judge
from sftprep.records.inspection.source_reading import SourceReading
from sftprep.sources.partition import Source

SAMPLE_RECORDS = 10_000
_CHUNK_BYTES = 4 << 20
"""The most bytes of records that are tokenized together."""


def preview_records(
    config: BuildConfig, choice: RecordChoice, *, data: Sequence[Source] = ()
) -> Preview:
    """Return what a build would make of some records.

    Args:
        config: The settings of the build; those about its output have no effect.
        choice: Which records are shown.
        data: Records in memory, used instead of the inputs in the settings.

    Raises:
        SftprepError: The build could not start, or an input cannot be read.
    """
    setup = prepare_reading(config, data, skips_columns=False)
    sources, entries = _training_sources(setup)
    records = choose_records(sources, entries, choice, SAMPLE_RECORDS)
    examiner = _Examiner(config, setup, sources)
    shown = tuple(examiner.show_record(record) for record in records)
    return examiner.report(shown, examined_all=False)


def examine_sample(
    config: BuildConfig, *, data: Sequence[Source] = (), count: int = SAMPLE_RECORDS
) -> Preview:
    """Return the verdicts about a sample of all records.

    Args:
        config: The settings of the build; those about its output have no effect.
        data: Records in memory, used instead of the inputs in the settings.
        count: The largest number of records to examine.

    Raises:
        SftprepError: The build could not start, or an input cannot be read.
    """
    setup = prepare_reading(config, data, skips_columns=False)
    sources, _ = _training_sources(setup)
    records, is_complete = sample_records(sources, count)
    examiner = _Examiner(config, setup, sources)
    for chunk in _chunks(records):
        examiner.add(chunk)
    return examiner.report((), examined_all=is_complete)


def _training_sources(setup: Setup) -> tuple[list[Source], list[int]]:
    """Return the training inputs, which are first, and the index of the entry of each."""
    training = [each for each in setup.inputs if not each.evaluation]
    return [each.source for each in training], [each.entry for each in training]


def _chunks(records: Sequence[ChosenRecord]) -> Iterator[list[ChosenRecord]]:
    """Yield the records of each input in chunks of a limited size."""
    for _, of_input in groupby(records, key=lambda record: record.source):
        chunk: list[ChosenRecord] = []
        size = 0
        for record in of_input:
            if chunk and size + len(record.data) > _CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
            chunk.append(record)
            size += len(record.data)
        yield chunk


@dataclass(frozen=True, slots=True)
class _Examined:
    """Records that pass 1 and the cut have processed.

    Attributes:
        whole: The whole sequences.
        targets: Their targets.
        fitted: The ranges of them that a build uses.
        texts: The texts of their tokens.
    """

    whole: TokenBatch
    targets: TargetRuns
    fitted: FittedSequences
    texts: TokenTexts


class _Examiner:
    """The first passes of a build over chosen records, and the counts of all of them.

    Args:
        config: The settings of the build.
        setup: Its setup.
        sources: The training inputs.
    """

    def __init__(self, config: BuildConfig, setup: Setup, sources: Sequence[Source]) -> None:
        self._config, self._setup, self._sources = config, setup, sources
        self._findings = Findings()
        # By the index of the input: the columns of the examined records that are not read.
        self._unread_columns: defaultdict[int, dict[str, None]] = defaultdict(dict)
        # By the index of the recipe; a mixture may have several.
        self._stages: dict[int, tuple[Preprocessor, TokenTexts]] = {}

    def add(self, records: Sequence[ChosenRecord]) -> None:
        """Examine records of one input, and count what is found."""
        self._count(self._findings, records, self._examine(records))

    def show_record(self, record: ChosenRecord) -> PreviewRecord:
        """Examine a record alone, count what is found, and return its tokens."""
        examined = self._examine([record])
        alone = Findings()
        for findings in (self._findings, alone):
            self._count(findings, [record], examined)
        source = self._setup.inputs[record.source]
        return PreviewRecord(
            file=source.source.name,
            line=record.line(self._sources),
            source=self._setup.entries[source.entry].name,
            sequences=tuple(_show_sequences(examined, self._setup.limit)),
            rejected=tuple(examined.fitted.rejected),
            dropped=alone.ledger.dropped,
            verdicts=judge(alone, self._config, self._setup.limit),
        )

    def report(self, records: tuple[PreviewRecord, ...], *, examined_all: bool) -> Preview:
        """Return the result for all records that were examined."""
        setup, findings = self._setup, self._findings
        return Preview(
            sources=_describe_sources(setup, self._unread_columns),
            records=records,
            verdicts=judge(findings, self._config, setup.limit),
            ledger=findings.ledger,
            examined_all=examined_all,
            tokenizer=setup.recipe.tokenizer.name,
            encoder=setup.encoder,
            max_length=setup.limit.max_length,
            advice=findings.advise(setup.limit),
        )

    def _examine(self, records: Sequence[ChosenRecord]) -> _Examined:
        source = records[0].source
        number = self._setup.recipe_of[source]
        if number not in self._stages:
            recipe = self._setup.recipes[number]
            texts = TokenTexts(recipe)
            stages = Preprocessor(recipe, threads=True, observer=texts.observe)
            self._stages[number] = stages, texts
        stages, texts = self._stages[number]
        texts.forget()
        lines = b"".join(record.data + b"\n" for record in records)
        whole = begin_preprocess(stages, lines, self._setup.formats[source], seed=None)()
        self._unread_columns[source].update(dict.fromkeys(whole.unread_columns))
        targets = find_targets(whole.completion_mask, whole.offsets)
        fitted = fit_lengths(whole, targets, lines, self._setup.limit)
        return _Examined(whole, targets, fitted, texts)

    def _count(
        self, findings: Findings, records: Sequence[ChosenRecord], examined: _Examined
    ) -> None:
        """Add what was found in records of one input."""

        def place(line: int) -> tuple[str, int]:
            return self._sources[records[0].source].name, records[line].line(self._sources)

        whole, fitted = examined.whole, examined.fitted
        findings.counts.update(fitted.counts)
        for name, line in fitted.first_lines.items():
            if name not in findings.firsts:
                findings.firsts[name] = place(line)
        for rejected in fitted.rejected:
            findings.counts[f"rejected.{rejected.reason}"] += 1
            if rejected.reason not in findings.rejected:
                findings.rejected[rejected.reason] = place(rejected.line), rejected
        for row in _untrained_rows(examined).tolist():
            if examined.texts.has_answer(row):
                findings.counts[UNTRAINED] += 1
                if UNTRAINED not in findings.firsts:
                    findings.firsts[UNTRAINED] = place(int(whole.line_of[row]))
        findings.histograms.append(count_lengths(whole, examined.targets, self._setup.limit))


def _untrained_rows(examined: _Examined) -> NDArray[np.int64]:
    """Return the sequences of which the build uses no range, although they are not rejected."""
    whole = examined.whole
    rejected = [record.line for record in examined.fitted.rejected]
    is_left_out = ~np.isin(np.arange(len(whole.line_of)), examined.fitted.ranges.rows)
    return np.flatnonzero(is_left_out & ~np.isin(whole.line_of, rejected))


def _show_sequences(examined: _Examined, limit: LengthLimit) -> Iterator[PreviewSequence]:
    """Yield the sequences of one record: the ranges that a build uses, and what it leaves out."""
    whole, (rows, starts, lengths) = examined.whole, examined.fitted.ranges
    rejected = {record.line for record in examined.fitted.rejected}
    for row in range(len(whole.line_of)):
        first, end = int(whole.offsets[row]), int(whole.offsets[row + 1])
        described = examined.texts.describe(row, whole.input_ids[first:end])
        ranges = [(int(starts[k]), int(lengths[k])) for k in np.flatnonzero(rows == row)]
        dropped = ""
        if not ranges:
            is_long = end - first > limit.max_length and limit.overlong == "drop"
            dropped = "overlong" if is_long else "no_trained_token"
            if int(whole.line_of[row]) in rejected:
                dropped = "rejected"
            ranges = [_truncated_range(end - first, limit)]
        for start, length in ranges:
            yield _cut_sequence(examined, row, start, length, limit, described, dropped)


def _truncated_range(length: int, limit: LengthLimit) -> tuple[int, int]:
    """Return the first token and the number of tokens that the limit leaves of a sequence."""
    if limit.overlong != "truncate" or length <= limit.max_length:
        return 0, length
    return length - limit.max_length if limit.truncate_side == "left" else 0, limit.max_length


def _cut_sequence(
    examined: _Examined,
    row: int,
    start: int,
    length: int,
    limit: LengthLimit,
    described: tuple[list[str], list[str]],
    dropped: str,
) -> PreviewSequence:
    """Return a range of a sequence; `described` has the texts and the roles of all its tokens."""
    whole = examined.whole
    first, end = int(whole.offsets[row]), int(whole.offsets[row + 1])
    kept = slice(first + start, first + start + length)
    pieces, roles = described
    flags = 0 if whole.flags is None else int(whole.flags[row])
    if length < end - first:
        flags |= Flag.SPLIT if limit.overlong == "split" else Flag.TRUNCATED
    # The first token of a sequence is not a target, because nothing predicts it.
    trained = np.count_nonzero(whole.completion_mask[first + 1 : end])
    kept_trained = np.count_nonzero(whole.completion_mask[kept][1:])
    weights = whole.loss_weights
    return PreviewSequence(
        input_ids=whole.input_ids[kept],
        completion_mask=whole.completion_mask[kept],
        loss_weights=None if weights is None else weights[kept],
        pieces=tuple(pieces[start : start + length]),
        roles=tuple(roles[start : start + length]),
        flags=flags,
        cut_before=start,
        cut_after=end - kept.stop,
        trained_cut=int(trained - kept_trained),
        dropped=dropped,
    )


def _describe_sources(
    setup: Setup, unread_columns: Mapping[int, Iterable[str]]
) -> tuple[PreviewSource, ...]:
    """Return how the training inputs are read, once for each distinct reading of an entry.

    Args:
        setup: The setup of the build.
        unread_columns: By the index of the input, the columns that were found not to be read.
    """
    columns: dict[tuple[int, SourceReading], dict[str, None]] = {}
    files: dict[tuple[int, SourceReading], list[str]] = {}
    for number, (each, reading) in enumerate(zip(setup.inputs, setup.readings, strict=True)):
        if each.evaluation:
            continue
        key = each.entry, dataclasses.replace(reading, not_read=(), notices=())
        columns.setdefault(key, {}).update(dict.fromkeys(reading.not_read))
        columns[key].update(dict.fromkeys(unread_columns.get(number, ())))
        files.setdefault(key, []).append(each.source.name)
    readings_of = Counter(entry for entry, _ in files)
    return tuple(
        PreviewSource(
            # The first file distinguishes those of one entry that are read differently.
            name=names[0] if readings_of[entry] > 1 else setup.entries[entry].name,
            files=len(names),
            weight=setup.entries[entry].weight,
            format=reading.shown_format,
            template=reading.template,
            trained=reading.trained,
            not_read=tuple(columns[entry, reading]),
        )
        for (entry, reading), names in files.items()
    )

"""Ledgers of a build: counts of each input, rejected records, and their limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import orjson
import xxhash

from sftprep.config.build import BuildConfig, FormatConfig
from sftprep.config.validation import SeriousOmission
from sftprep.core.atomic_write import create_folder, write_file
from sftprep.core.types import Rejected
from sftprep.errors import EmptyInput, RecordError, TooManyRejected, setting, source_name
from sftprep.pipeline.groups.selection import BuildSplit
from sftprep.pipeline.groups.task import GroupTask
from sftprep.pipeline.passes.tokenize_pass import PartitionResult
from sftprep.records.transform import is_transform_reason
from sftprep.shards.group import InputInfo
from sftprep.shards.ledger import Ledger
from sftprep.sources.partition import Source
from sftprep.sources.readers.lines import convert_os_errors, open_regular

_REJECTED_FIELDS = ("column", "reason", "message", "excerpt")
_DUPLICATE_REASONS = ("duplicate", "near_duplicate")


def first_record_error(parts: list[PartitionResult], task: GroupTask) -> RecordError:
    """Return the error for the first rejected record of a group.

    Args:
        parts: The results of partitions in the order of the input. At least one of them has a
            rejected record, and no partition before that one is missing.
        task: The group.
    """
    input_number, line, first = next(_locate_rejected(parts, {}))
    source = task.inputs[input_number].source
    return RecordError(
        file=source.name,
        line=line + lines_before(source),
        column=first.column,
        reason=first.reason,
        message=first.message,
        excerpt=first.excerpt,
        correction=correction_for(first.reason, task.settings.config.format),
    )


def correction_for(reason: str, settings: FormatConfig) -> str:
    """Return what to correct where a record is not at fault; "" if it is.

    Args:
        reason: The reason for which records are rejected.
        settings: The settings of how records are read.
    """
    if reason == "transform_failed":
        value = _shown_function(settings.transform)
        return f"correct the function of {setting('transform', value)}"
    if reason in ("function_failed", "bad_function_result"):
        value = _shown_function(settings.formatting_func)
        return f"correct the function of {setting('formatting_func', value)}"
    if reason == "other_text_field":
        return f"leave out {setting('text_field', settings.text_field)}"
    if reason == "other_schema":
        pattern = "FOLDER/*.txt" if settings.format == "text" else "FOLDER/*.jsonl"
        return f"of a folder with several formats, name the files of one by a pattern ({pattern})"
    if settings.transform is not None:  # the record is a result of the function
        value = _shown_function(settings.transform)
        return f"correct the record, or the function of {setting('transform', value)}"
    return ""


def _shown_function(function: object) -> str:
    """Return a function as the setting names it."""
    return function if isinstance(function, str) else "FILE.py:NAME"


def make_input_infos(split: BuildSplit, task: GroupTask) -> tuple[InputInfo, ...]:
    """Return the manifest entries for the inputs of a group, in order.

    Args:
        split: The part of the build for which the records are counted.
        task: The group.
    """
    parts_of_input = {
        number: list(parts)
        for number, parts in groupby(split.parts, key=lambda part: part.partition.input)
    }
    infos = []
    for number, (each, ledger) in enumerate(zip(task.inputs, split.ledgers, strict=True)):
        parts = parts_of_input.get(number, [])  # an empty file has no partition
        # The digest is that of the partition digests, so that no file is read a second time.
        contents = "".join(part.content for part in parts)
        infos.append(
            InputInfo(
                path=each.source.name,
                bytes=sum(part.bytes for part in parts),
                digest=xxhash.xxh3_128_hexdigest(contents.encode()),
                format=each.format,
                lines=ledger.lines,
                records=ledger.records,
                source=task.settings.entries[each.entry].name,
                accounting=ledger,
                limit=each.source.limit,
                first_lines=_first_lines(parts, ledger),
                slices=tuple(part.counts["lines"] for part in parts),
                start=each.source.start,
            )
        )
    return tuple(infos)


def _first_lines(parts: list[PartitionResult], ledger: Ledger) -> dict[str, int]:
    """Return the first line of an input for each count, by name, from 1.

    Args:
        parts: The partitions of the input, in order.
        ledger: The counts of the input.
    """
    counts = ledger.to_counts()
    found: dict[str, int] = {}
    lines_before = 0
    for part in parts:
        for name, line in part.first_lines.items():
            if counts[name]:
                found.setdefault(name, lines_before + line + 1)
        lines_before += part.counts["lines"]
    return found


def sum_ledgers(ledgers: Iterable[Ledger]) -> Ledger:
    """Return the sum of the ledgers of several inputs, and check that it balances."""
    summed = Ledger.sum(ledgers)
    wrong = summed.check()
    if wrong:
        raise RuntimeError(
            "the accounting of this build does not balance, which is a bug in sftprep:"
            f" {'; '.join(wrong)}"
        )
    return summed


def write_rejected(
    parts: Iterable[PartitionResult],
    duplicates: dict[int, list[Rejected]],
    names: Sequence[str],
    path: Path,
) -> None:
    """Write the rejected records and the duplicates of a group to a file.

    Args:
        parts: The results of its partitions, in order.
        duplicates: By the index of its partition, the records that equal an earlier record.
        names: The name of each input.
        path: The file; it is removed if there is nothing to write.

    Raises:
        StorageError: The file cannot be written.
    """
    lines = [
        orjson.dumps({"file": names[number], "line": line, **_describe_rejected(record)}) + b"\n"
        for number, line, record in _locate_rejected(parts, duplicates)
    ]
    if lines:
        create_folder(path.parent)
        write_file(path, lambda file: file.writelines(lines))
    else:
        path.unlink(missing_ok=True)


def _describe_rejected(record: Rejected) -> dict[str, Any]:
    return {name: getattr(record, name) for name in _REJECTED_FIELDS}


def check_rejected(ledger: Ledger, files: Sequence[Path], config: BuildConfig) -> None:
    """Enforce the limit of rejected records.

    Args:
        ledger: The ledger of the build. Duplicates do not count towards the limit.
        files: The files of rejected records, in the order of the groups; some may not exist.
        config: The settings of the build.

    Raises:
        TooManyRejected: More records were rejected than `max_rejected` allows.
    """
    rejected = Counter(ledger.rejected)
    # A function of the user may make several records of one.
    records = ledger.records + sum(ledger.extra.get(name, 0) for name in ("transform", "texts"))
    if rejected.total() <= config.output.rejected_limit(records):
        return
    found = [file for file in files if file.exists()]
    listing = str(found[0]) if len(found) == 1 else f"the files in {found[0].parent} list"
    remedies = [
        *corrections_for(rejected, config.format),
        f"correct the records that {listing}{' lists' * (len(found) == 1)}",
        f"raise {setting('max_rejected')}",
    ]
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in rejected.most_common())
    suspects = ledger.warnings.get("suspects_rejected", 0)
    raise TooManyRejected(
        f"{rejected.total():,} of {records:,} records were rejected ({reasons}), more than"
        f" {setting('max_rejected', config.output.max_rejected)} allows"
        + first_of_each_reason(_read_rejected(found)),
        remedy=[*remedies, *remedies_for_rejected(rejected, suspects)],
    )


def _read_rejected(files: Iterable[Path]) -> Iterator[tuple[str, int, Rejected]]:
    """Yield the rejected records in files, like `first_of_each_reason` takes them."""
    for path in files:
        with open(path, "rb") as file:
            for line in file:
                entry = orjson.loads(line)
                record = Rejected(**{name: entry[name] for name in _REJECTED_FIELDS}, line=0)
                if record.reason not in _DUPLICATE_REASONS:
                    yield entry["file"], entry["line"], record


def first_of_each_reason(rejected: Iterable[tuple[str, int, Rejected]]) -> str:
    """Return the first record of each reason, each on its own line of an error text.

    Args:
        rejected: Rejected records in the order of the input, with the name of their input and their
            line, 1-based.
    """
    firsts: dict[str, str] = {}
    for name, line, record in rejected:
        if record.reason not in firsts:
            firsts[record.reason] = (
                f"\n  {source_name(name)}:{line}: {record.message} [{record.reason}]"
            )
    return "".join(firsts.values())


def first_of_each_drop(dropped: Iterable[tuple[str, int, str]]) -> str:
    """Return the first dropped record of each reason, each on its own line of an error text.

    Args:
        dropped: The name of the input and the line, 1-based, of dropped records, in the order of
            the input, with the reason.
    """
    firsts: dict[str, str] = {}
    for name, line, reason in dropped:
        what = "the transform dropped it" if is_transform_reason(reason) else "dropped"
        firsts.setdefault(reason, f"\n  {source_name(name)}:{line}: {what} [{reason}]")
    return "".join(firsts.values())


def remedies_for_transform(dropped: int, records: int) -> Iterator[str]:
    """Yield the remedy if a transform dropped records.

    Args:
        dropped: How many it dropped.
        records: The number of all records.
    """
    if dropped:
        yield (
            f"check the function of {setting('transform')}, which dropped {dropped:,} of"
            f" {records:,} records"
        )


def check_not_empty(
    ledger: Ledger,
    inputs: Sequence[InputInfo],
    files: Sequence[Path],
    settings: FormatConfig,
    *,
    evaluation: bool,
) -> None:
    """Check that a build has at least one sequence.

    Args:
        ledger: Its ledger.
        inputs: Its inputs.
        files: The files of its rejected records; some may not exist.
        settings: The settings of how records are read.
        evaluation: Whether it is an evaluation build.

    Raises:
        EmptyInput: It has none.
    """
    if ledger.sequences:
        return
    groups = {"rejected": ledger.rejected, "dropped": ledger.dropped, "left out": ledger.left_out}
    reasons = "; ".join(
        f"{name}: {', '.join(f'{reason} {number:,}' for reason, number in group.items())}"
        for name, group in groups.items()
        if group
    )
    by_transform = sum(n for reason, n in ledger.dropped.items() if is_transform_reason(reason))
    corrections = [*corrections_for(ledger.rejected, settings)]
    # If no record is at fault, the settings and the inputs are not to be checked.
    is_explained = bool(corrections) and not ledger.dropped and len(ledger.rejected) == 1
    checks = [
        "check that the inputs are the intended files",
        f"check {setting('format')}",
        f"check {setting('train_on')} and {setting('max_length')}",
    ]
    problem = f"no usable record{' to evaluate on' if evaluation else ''}"
    if not reasons:
        where = inputs[0].path if len(inputs) == 1 else f"the {len(inputs):,} input files"
        raise EmptyInput(f"{problem}: no records in {where}", remedy=checks[0])
    raise EmptyInput(
        f"{problem} in {len(inputs)} input file{'s' * (len(inputs) != 1)} ({reasons})"
        + first_of_each_reason(_read_rejected([f for f in files if f.exists()]))
        + first_of_each_drop(_locate_dropped(inputs)),
        remedy=[
            *remedies_for_transform(by_transform, ledger.records),
            *corrections,
            *_remedies_for_cuts(ledger),
            *([] if is_explained else checks),
            *remedies_for_rejected(ledger.rejected, ledger.warnings.get("suspects_rejected", 0)),
        ],
    )


def corrections_for(rejected: Iterable[str], settings: FormatConfig) -> Iterator[str]:
    """Yield what to correct for some reasons of rejected records."""
    yield from filter(None, (correction_for(reason, settings) for reason in sorted(rejected)))


def _remedies_for_cuts(ledger: Ledger) -> Iterator[str]:
    """Yield the remedy if the limit of the lengths left nothing to train."""
    if ledger.trained_truncated or ledger.dropped.get("overlong"):
        yield f"raise {setting('max_length')}, which cuts all trained tokens"


def remedies_for_rejected(rejected: Mapping[str, int], suspects: int) -> Iterator[str]:
    """Yield the remedies for some reasons of rejected records.

    Args:
        rejected: The numbers of rejected records, by reason.
        suspects: How many of them only look wrong.
    """
    if "template_error" in rejected:
        yield f"specify another template with {setting('chat_template')}"
    for kind in get_args(SeriousOmission):
        if kind in rejected:
            yield f"accept the loss with {setting('allow_loss', kind)}"
    if suspects:
        keep = setting("quality_checks", "keep")
        yield f"train on the records that fail only a quality check with {keep}"


def _locate_dropped(inputs: Iterable[InputInfo]) -> Iterator[tuple[str, int, str]]:
    """Yield the first dropped record of each input and reason, with the name of the input."""
    for info in inputs:
        for count, line in info.first_lines.items():
            if count.startswith("dropped."):
                yield info.path, line, count.removeprefix("dropped.")


def _locate_rejected(
    parts: Iterable[PartitionResult], duplicates: dict[int, list[Rejected]]
) -> Iterator[tuple[int, int, Rejected]]:
    """Yield rejected records and duplicates in the order of the input.

    Each comes with the number of its input and its line in the group, 1-based.
    """
    for part, first_line in _with_lines_before(parts):
        # Partitions count their lines from 0, the file counts those of the input from 1.
        records = [*part.rejected, *duplicates.get(part.partition.index, ())]
        for record in sorted(records, key=lambda record: record.line):
            yield part.partition.input, first_line + record.line + 1, record


def _with_lines_before(parts: Iterable[PartitionResult]) -> Iterator[tuple[PartitionResult, int]]:
    """Yield the partitions with the number of lines of their input before them."""
    lines_before, current_input = 0, -1
    for part in parts:
        if part.partition.input != current_input:
            lines_before, current_input = 0, part.partition.input
        yield part, lines_before
        lines_before += part.counts["lines"]


def lines_before(source: Source) -> int:
    """Return the number of lines, or of rows, of a file before the range of a source.

    Raises:
        InputUnreadable: The file cannot be read.
    """
    if source.start == 0 or source.kind != "lines":
        return source.start
    # A line belongs to the range in which it starts, so the newline before its first byte counts.
    position, newlines = 0, 0
    with convert_os_errors(source.file), open_regular(source.file) as file:
        while position < source.start - 1:
            chunk = file.read(min(1 << 20, source.start - 1 - position))
            if not chunk:
                break
            position, newlines = position + len(chunk), newlines + chunk.count(b"\n")
    return newlines + 1

"""The summary of a build: the fate of all records and tokens, and warnings."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from sftprep.errors import FlagNames, escape_control, format_count
from sftprep.pipeline.build import BuildReport
from sftprep.pipeline.kept_work import KeptWork
from sftprep.records.inspection.source_reading import SourceReading
from sftprep.report.source_summary import share_lines, source_data, source_lines
from sftprep.report.tokenizer_lines import tokenizer_lines
from sftprep.shards.length_advice import advise_length, length_warning
from sftprep.shards.manifest import Manifest
from sftprep.shards.warning_kinds import data_warnings

_Row = tuple[str, int, str]
"""A row of the table: its name, a number, and a note."""

_MOST_COLUMNS = 100


def summary_lines(report: BuildReport) -> list[str]:
    """Return the summary as lines of plain text."""
    manifest = report.manifest
    if report.is_up_to_date:
        return [
            f"up to date: {report.folder} has the finished build of this command; nothing was done",
            manifest_line(manifest),
        ]
    rows = [*_record_rows(report), *_token_rows(manifest)]
    # Rows of the total numbers are always shown; of their parts, those that are not 0.
    table = [
        f"{name:<34}{number:>14,}   {note}".rstrip()
        for name, number, note in rows
        if number or not name.startswith("  ")
    ]
    return [
        *table,
        *_reading_lines(report),
        *_date_lines(manifest),
        *_function_lines(manifest),
        *tokenizer_lines(manifest),
        *_mask_lines(manifest),
        *source_lines(manifest),
        *share_lines(manifest),
        *_warning_lines(manifest),
        *(f"warning: {warning}" for warning in length_warning(manifest, FlagNames())),
        *_evaluation_lines(report),
        _output_line(report),
    ]


def summary_data(report: BuildReport) -> dict[str, Any]:
    """Return the summary as JSON values."""
    manifest = report.manifest
    advice = advise_length(manifest)
    return {
        "status": "up_to_date" if report.is_up_to_date else "built",
        "resumed": None if report.resumed is None else dataclasses.asdict(report.resumed),
        "output": str(report.folder),
        "manifest_digest": manifest.digest,
        "accounting": dataclasses.asdict(manifest.accounting),
        "mix_by": manifest.config.get("mix_by", "records"),
        "sources": source_data(manifest),
        "inputs": [dataclasses.asdict(info) for info in manifest.inputs],
        "reading": _reading_data(report),
        "evaluation": None if report.evaluation is None else _evaluation_data(report.evaluation),
        "packs": manifest.rows,
        "fill": manifest.plan["fill"],
        "shards": manifest.num_shards,
        "shard_bytes": manifest.shard_bytes,
        "max_length": manifest.max_length,
        "layout": manifest.layout,
        "lengths": manifest.lengths,
        "length_advice": None if advice is None else dataclasses.asdict(advice),
        "encoder": manifest.encoder,
        "template": manifest.template,
        "functions": manifest.functions,
        "seconds": round(report.seconds, 3),
        "bytes_read": report.bytes_read,
        "mb_per_second": round(report.bytes_read / 1e6 / report.seconds, 2),
        "reused_partitions": report.reused,
        "workers": report.workers,
    }


def resume_line(kept: KeptWork) -> str:
    """Return what a build does not repeat of an earlier run, and what is left, in one line.

    Example:
        resuming: kept 3 of 8 groups and 57 partitions, 412.0 of 1,648.0 MB; 1,236.0 MB are left
    """
    found = []
    if kept.groups_total > 1 or kept.groups:
        found.append(f"{kept.groups:,} of {format_count(kept.groups_total, 'group')}")
    if kept.partitions:
        found.append(format_count(kept.partitions, "partition"))
    amount, total = f"{kept.bytes / 1e6:,.1f}", kept.bytes_total
    if total is None:
        return f"resuming: kept {' and '.join(found)}, {amount} MB of records"
    left = f"{(total - kept.bytes) / 1e6:,.1f} MB are left"
    return f"resuming: kept {' and '.join(found)}, {amount} of {total / 1e6:,.1f} MB; {left}"


def manifest_line(manifest: Manifest) -> str:
    """Return a description of a build in one line."""
    name = escape_control(str(manifest.tokenizer["name"]))
    return (
        f"{format_count(manifest.rows, 'pack')} of up to {manifest.max_length:,} tokens,"
        f" {format_count(manifest.accounting.sequences, 'sequence')}, {manifest.tokens:,} tokens"
        f" ({manifest.trained_tokens:,} trained), tokenizer {name}"
    )


# --- the table ------------------------------------------------------------------------------------


def _record_rows(report: BuildReport) -> list[_Row]:
    """Return the rows about records and the resulting sequences."""
    manifest, ledger = report.manifest, report.manifest.accounting
    files = format_count(len(manifest.inputs), "file")
    share = _percent(ledger.sequences, ledger.records)
    return [
        ("records", ledger.records, f"from {files}, {report.bytes_read / 1e6:,.1f} MB"),
        (f"  {_verb(manifest)}", ledger.sequences, f"sequences, {share} of the records"),
        *_reason_rows("rejected", ledger.rejected, "see the files in rejected/"),
        *_dropped_rows(manifest),
        *_reason_rows("left out", ledger.left_out),
        *_reason_rows("added", ledger.extra),
    ]


def _dropped_rows(manifest: Manifest) -> Iterator[_Row]:
    """Yield the rows of dropped records, with the first one for each reason."""
    first: dict[str, str] = {}
    for info in manifest.inputs:
        for name, line in info.first_lines.items():
            first.setdefault(name, f"first: {escape_control(info.path)}:{line}")
    for reason, number in manifest.accounting.dropped.items():
        yield from _reason_rows("dropped", {reason: number}, first.get(f"dropped.{reason}", ""))


def _first_of(manifest: Manifest, name: str) -> str:
    """Return the first line of a count, for the end of a row; "" if it is not known."""
    found = manifest.locate_first(name)
    return f", first: {escape_control(found[0])}:{found[1]}" if found else ""


def _token_rows(manifest: Manifest) -> list[_Row]:
    """Return the rows about tokens and packs."""
    ledger = manifest.accounting
    truncated = format_count(ledger.truncated, "sequence")
    is_planned = manifest.layout == "sequences"
    num_trained = ledger.trained_tokens if is_planned else manifest.trained_tokens
    trained = _percent(num_trained, ledger.tokens)
    trained_truncated = _percent(ledger.trained_truncated, ledger.trained_in)
    return [
        ("tokens", ledger.tokens_in, ""),
        (
            f"  {_verb(manifest)}",
            ledger.tokens,
            f"{_percent(ledger.tokens, ledger.tokens_in)} of the tokens",
        ),
        (
            "  truncated",
            ledger.tokens_truncated,
            f"from {truncated} longer than {manifest.max_length:,} tokens"
            + _first_of(manifest, "truncated"),
        ),
        *_reason_rows("dropped", ledger.tokens_dropped),
        *_reason_rows("left out", ledger.tokens_left_out),
        *_reason_rows("added", ledger.tokens_extra),
        ("trained tokens", num_trained, f"{trained} of the {_verb(manifest)} tokens"),
        (
            "  truncated",
            ledger.trained_truncated,
            f"{trained_truncated} of the trained tokens of all records",
        ),
        *_reason_rows("dropped", ledger.trained_dropped),
        (
            "packs",
            manifest.rows,
            f"of up to {manifest.max_length:,} tokens, {manifest.plan['fill']:.2%} full"
            f" ({manifest.plan['strategy']}){_planned_note(manifest)}",
        ),
    ]


def _verb(manifest: Manifest) -> str:
    """Return what the build did with the sequences that it did not leave out."""
    return "stored" if manifest.layout == "sequences" else "packed"


def _planned_note(manifest: Manifest) -> str:
    """Return what the numbers of packs mean if packs are planned when they are read."""
    if manifest.layout == "packs":
        return ""
    kept = _percent(manifest.tokens, manifest.accounting.tokens)
    return f", planned when they are read, with {kept} of the tokens"


def _reason_rows(what: str, group: dict[str, int], note: str = "") -> Iterator[_Row]:
    return (
        (f"  {what}: {reason.replace('_', ' ')}", number, note) for reason, number in group.items()
    )


def _reading_data(report: BuildReport) -> list[dict[str, Any]]:
    return [
        {
            "format": reading.shown_format,
            "template": reading.template,
            "trained": reading.trained,
            "not_read": list(reading.not_read),
        }
        for reading in report.readings
    ]


# --- the lines below the table --------------------------------------------------------------------


def _reading_lines(report: BuildReport) -> Iterator[str]:
    """Yield how the records were read, once for each distinct reading.

    The files that are read alike may have different columns.
    """
    columns: dict[SourceReading, dict[str, None]] = {}
    numbers: Counter[SourceReading] = Counter()
    for each in report.readings:
        reading = dataclasses.replace(each, not_read=(), notices=())
        columns.setdefault(reading, {}).update(dict.fromkeys(each.not_read))
        numbers[reading] += 1
    for reading, number in numbers.items():
        files = f" ({format_count(number, 'file')})" if len(numbers) > 1 else ""
        template = f", rendered by {reading.template}" if reading.template else ""
        yield escape_control(
            f"format: {reading.shown_format}{files}{template}; trained: {reading.trained}"
        )
        if columns[reading]:
            shown = ", ".join(map(_column_name, list(columns[reading])[:_MOST_COLUMNS]))
            rest = len(columns[reading]) - _MOST_COLUMNS
            more = f" and {rest} more: see --json" if rest > 0 else ""
            yield escape_control(f"not read: {shown}{more}")


def _column_name(name: str) -> str:
    """Return a name for a list of names; in quotes if the list would be ambiguous."""
    return repr(name) if not name or name != name.strip() or "," in name else name


def _date_lines(manifest: Manifest) -> Iterator[str]:
    """Yield the date visible to the chat template, if any."""
    if manifest.config.get("date"):
        yield f"date: the chat template sees {manifest.config['date']} as today (see --date)"


def _function_lines(manifest: Manifest) -> Iterator[str]:
    """Yield the functions without reusable results."""
    for function in manifest.functions.get("used", ()):
        if not function["reused"]:
            yield (
                f"note: the {function['setting']} {function['name']} has no stable digest, so no"
                " other process reuses what was made with it; transform_id names its version"
            )


def _mask_lines(manifest: Manifest) -> Iterator[str]:
    """Yield why masks took the slower path, if more than a tenth of them did."""
    # Builds of older versions store no masks.
    masks = manifest.template.get("masks", {})
    slow, fast = masks.get("by_characters", 0), masks.get("by_ids", 0)
    if 10 * slow > slow + fast:
        because = masks["because"] or {"unknown": 0}  # builds of older versions
        reason = max(because, key=because.__getitem__)
        yield (
            f"note: the loss masks of {slow:,} of {slow + fast:,} conversations were computed from"
            f" characters, which is slower; the most frequent reason: {reason}"
        )


def _warning_lines(manifest: Manifest) -> Iterator[str]:
    """Yield the warnings, and which records they count.

    Pass 1 counts them for each record, before any record is left out.
    """
    warnings = data_warnings(manifest)
    for found in warnings:
        yield f"{found.severity}: {escape_control(found.render(FlagNames()))}"
    left_out = [
        f"{name.replace('_', ' ')} {n:,}" for name, n in manifest.accounting.left_out.items()
    ]
    if warnings and left_out:
        yield (
            "note: the warnings count all records that were read, including those left out"
            f" ({', '.join(left_out)})"
        )


def _evaluation_lines(report: BuildReport) -> list[str]:
    manifest = report.evaluation
    if manifest is None:
        return []
    # Held-out records are from the same partitions, whose lengths are counted once.
    warnings = (
        length_warning(manifest, FlagNames()) if manifest.lengths != report.manifest.lengths else []
    )
    return [
        f"evaluation: {format_count(manifest.accounting.sequences, 'sequence')},"
        f" {manifest.tokens:,} tokens in {format_count(manifest.rows, 'pack')}"
        f" ({manifest.plan['strategy']}), in {report.folder / 'eval'}",
        *(f"evaluation: warning: {warning}" for warning in warnings),
    ]


def _evaluation_data(manifest: Manifest) -> dict[str, Any]:
    return {
        "manifest_digest": manifest.digest,
        "accounting": dataclasses.asdict(manifest.accounting),
        "packs": manifest.rows,
        "packing": manifest.plan["strategy"],
    }


def _output_line(report: BuildReport) -> str:
    """Return what was written where, and how fast."""
    manifest = report.manifest
    size = manifest.shard_bytes
    reused = f", {format_count(report.reused, 'partition')} reused" if report.reused else ""
    tokens = manifest.tokens if manifest.layout == "packs" else manifest.accounting.tokens
    return (
        f"wrote {format_count(manifest.num_shards, 'shard')} ({size / 1e6:,.1f} MB,"
        f" {size / max(1, tokens):.2f} bytes per token) to {report.folder} in"
        f" {report.seconds:.1f} s ({report.bytes_read / 1e6 / report.seconds:,.1f} MB/s,"
        f" {format_count(report.workers, 'process', 'es')},"
        f" encoder {manifest.encoder.get('encoder', '')}{reused})"
    )


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"

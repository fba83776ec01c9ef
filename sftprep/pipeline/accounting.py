"""What was read and set aside: the inputs of a build, each with its accounts, and the file of
rejected records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import orjson
import xxhash

from sftprep.config.build import BuildConfig
from sftprep.core.atomic_write import write_file
from sftprep.core.types import Rejected
from sftprep.errors import EmptyInput, RecordError, TooManyRejected
from sftprep.pipeline.selection import BuildSplit
from sftprep.pipeline.setup import Setup
from sftprep.pipeline.tokenize_pass import PartitionResult
from sftprep.records.quality_checks import REASONS
from sftprep.shards.manifest import Accounting, InputInfo


def first_bad_record(parts: list[PartitionResult], names: list[str]) -> RecordError:
    """The error about the first bad record of the input, of parts that hold one. names: of the
    inputs."""
    bad = next(part for part in parts if part.rejected)
    first = bad.rejected[0]
    before = sum(
        p.counts["lines"]
        for p in parts
        if p.partition.input == bad.partition.input and p.partition.index < bad.partition.index
    )
    return RecordError(
        file=names[bad.partition.input],
        line=before + first.line + 1,
        column=first.column,
        reason=first.reason,
        message=first.message,
        excerpt=first.excerpt,
    )


def input_infos(side: BuildSplit, setup: Setup) -> tuple[InputInfo, ...]:
    """What each input of a side held, in order."""
    found = {
        number: list(own)
        for number, own in groupby(side.parts, key=lambda part: part.partition.input)
    }
    infos, ordinal = [], 0
    for number, accounts in zip(side.inputs, side.accounts, strict=True):
        own, each = found.get(number, []), setup.inputs[number]
        infos.append(
            InputInfo(
                path=each.source.name,
                bytes=sum(part.bytes for part in own),
                digest=xxhash.xxh3_128_hexdigest("".join(part.content for part in own).encode()),
                format=setup.formats[number],
                first_ordinal=ordinal,
                lines=accounts.lines,
                records=accounts.records,
                source=setup.entries[each.entry].name,
                accounting=accounts,
                limit=each.source.limit,
            )
        )
        ordinal += accounts.lines
    return tuple(infos)


def total(accounts: list[Accounting]) -> Accounting:
    """The sum of accounts, checked."""
    counts: Counter[str] = Counter()
    for own in accounts:
        counts.update(own.to_counts())
    summed = Accounting.from_counts(counts)
    wrong = summed.check()
    assert not wrong, (
        "the accounts of this build do not balance, which is a defect of sftprep:"
        f" {'; '.join(wrong)}"
    )
    return summed


def check_rejected(
    parts: list[PartitionResult],
    sides: list[BuildSplit],
    setup: Setup,
    config: BuildConfig,
    path: Path,
) -> None:
    """Write what was set aside. Raises TooManyRejected above the limit; duplicates do not count
    against it."""
    rejected = Counter(r.reason for part in parts for r in part.rejected)
    records = sum(part.counts["records"] for part in parts)
    aside = sides[-1].aside
    if rejected or aside:
        write_file(path, lambda file: file.writelines(_rejected_lines(parts, aside, setup.names)))
    else:
        path.unlink(missing_ok=True)
    if rejected.total() > config.output.rejected_limit(records):
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in rejected.most_common())
        raise TooManyRejected(
            f"{rejected.total():,} of {records:,} records were rejected ({reasons}), "
            f"more than --max-rejected {config.output.max_rejected}",
            remedy=f"look at {path}; mend the records, or raise --max-rejected"
            + (
                ", or give another template with --chat-template"
                if rejected["template_error"]
                else ""
            )
            + (
                ", or train on what only looks wrong: --quality-checks keep"
                if rejected.keys() & REASONS
                else ""
            ),
        )


def check_not_empty(side: BuildSplit, accounting: Accounting) -> None:
    """Raises EmptyInput where a side has no sequence."""
    if accounting.sequences:
        return
    groups = {
        "rejected": accounting.rejected,
        "dropped": accounting.dropped,
        "left out": accounting.left_out,
    }
    what = "; ".join(
        f"{name}: {', '.join(f'{r} {n:,}' for r, n in group.items())}"
        for name, group in groups.items()
        if group
    )
    raise EmptyInput(
        f"no usable record{' to evaluate on' if side.evaluation else ''} in {len(side.inputs)}"
        f" input file{'s' * (len(side.inputs) != 1)} ({what or 'there is no record at all'})",
        remedy=(
            "check --format, --train-on and --max-length, and that the files are those you meant"
        ),
    )


def _rejected_lines(
    parts: list[PartitionResult], aside: dict[int, list[Rejected]], names: list[str]
) -> Iterator[bytes]:
    line, current = 0, -1
    for part in parts:
        if part.partition.input != current:
            line, current = 0, part.partition.input
        for r in sorted(
            [*part.rejected, *aside.get(part.partition.index, ())], key=lambda r: r.line
        ):
            where = {
                "file": names[part.partition.input],
                "line": line + r.line + 1,
                "column": r.column,
            }
            yield (
                orjson.dumps(
                    {**where, "reason": r.reason, "message": r.message, "excerpt": r.excerpt}
                )
                + b"\n"
            )
        line += part.counts["lines"]

"""The part of the summary about the sources of a build: their balances and their shares."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from sftprep.errors import escape_control
from sftprep.shards.ledger import Ledger
from sftprep.shards.manifest import Manifest

_MOST_SOURCES = 20


def source_ledgers(manifest: Manifest) -> list[tuple[str, Ledger]]:
    """Return the name and the ledger of each source, in order.

    In a build of an older version, which stores no sources, each file is a source.
    """
    sums: dict[str, Counter[str]] = {}
    for info in manifest.inputs:
        sums.setdefault(info.source or info.path, Counter()).update(info.accounting.to_counts())
    return [(name, Ledger.from_counts(counts)) for name, counts in sums.items()]


def equations(ledger: Ledger) -> tuple[str, str]:
    """Return the balances of records and tokens, as two equations.

    Example:
        "records 40 + repeated 8 = packed 45 + held out 3"
    """
    # Pairs, since a transform may name its reasons as it likes.
    records = [
        ("packed", ledger.sequences),
        *((f"rejected ({reason})", number) for reason, number in ledger.rejected.items()),
        *((f"dropped ({reason})", number) for reason, number in ledger.dropped.items()),
        *ledger.left_out.items(),
    ]
    tokens = [
        ("packed", ledger.tokens),
        ("truncated", ledger.tokens_truncated),
        *((f"dropped ({reason})", number) for reason, number in ledger.tokens_dropped.items()),
        *ledger.tokens_left_out.items(),
    ]
    return (
        f"{_sum('records', ledger.records, ledger.extra)} = {_terms(records)}",
        f"{_sum('tokens', ledger.tokens_in, ledger.tokens_extra)} = {_terms(tokens)}",
    )


def source_lines(manifest: Manifest) -> list[str]:
    """Return the balance of each source, if there are several or one has a limit."""
    sources = source_ledgers(manifest)
    limits = {info.source or info.path: info.limit for info in manifest.inputs}
    if len(sources) < 2 and not any(limits.values()):
        return []
    lines = []
    for name, ledger in sources[:_MOST_SOURCES]:
        records, tokens = equations(ledger)
        if ledger.records == limits[name]:
            records += f" (limit {ledger.records:,}: the rest was not read)"
        lines.append(f"{name}\n  {records}\n  {tokens}")
    rest = len(sources) - len(lines)
    return ["", *lines, *([f"... and {rest} more sources: see --json"] if rest else []), ""]


def source_data(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the sources as JSON values."""
    found = {source.name: source for source in manifest.sources}
    return [
        {
            "source": name,
            "weight": found[name].weight if name in found else None,
            "shares": found[name].shares if name in found else {},
            "accounting": dataclasses.asdict(ledger),
        }
        for name, ledger in source_ledgers(manifest)
    ]


def share_lines(manifest: Manifest) -> list[str]:
    """Return a table with the share of each source in the build, if there are several."""
    sources = [source for source in manifest.sources if source.shares]
    if len(sources) < 2:
        return []
    shown = sources[:_MOST_SOURCES]
    names = [escape_control(source.name) for source in shown]
    width = max(map(len, ("share in %", *names)))
    is_weighted = any(source.weight is not None for source in sources)
    mix_by = manifest.config.get("mix_by", "records").replace("_", " ")
    weight = f"   weight (by {mix_by})" if is_weighted else ""
    lines = [f"{'share in %':<{width}}  sequences   tokens  trained tokens{weight}"]
    for name, source in zip(names, shown, strict=True):
        shares = source.shares
        row = f"{name:<{width}}  {shares['sequences']:9.2f}{shares['tokens']:9.2f}"
        row += f"{shares['trained_tokens']:16.2f}"
        lines.append(row + ("" if source.weight is None else f"   {source.weight:g}"))
    return [*lines, ""]


def _terms(numbers: Iterable[tuple[str, int]]) -> str:
    """Return the right side of an equation, without zero terms."""
    terms = [
        f"{name.replace('_', ' ')} {number:,}"
        for name, number in numbers
        if number or name == "packed"
    ]
    return " + ".join(terms)


def _sum(name: str, number: int, extra: dict[str, int]) -> str:
    """Return the left side of an equation."""
    added = (f"{reason.replace('_', ' ')} {count:,}" for reason, count in extra.items())
    return " + ".join([f"{name} {number:,}", *added])

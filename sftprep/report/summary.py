"""A build in one screen: where every row and token went."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from sftprep.pipeline.build import BuildReport
from sftprep.shards.manifest import Accounting, Manifest


def summary_lines(report: BuildReport) -> list[str]:
    """The summary as lines of plain text."""
    manifest, accounts = report.manifest, report.manifest.accounting
    rows = [
        (
            "records",
            accounts.records,
            "from " + some(len(manifest.inputs), "file") + f", {report.bytes_read / 1e6:,.1f} MB",
        ),
        (
            "  packed",
            accounts.sequences,
            f"{_percent(accounts.sequences, accounts.records)} as sequences",
        ),
        *(
            (f"  rejected: {reason}", n, "set aside in rejected.jsonl")
            for reason, n in accounts.rejected.items()
        ),
        *_reasons("dropped", accounts.dropped),
        *_reasons("left out", accounts.left_out),
        *_reasons("more", accounts.extra),
        ("tokens", accounts.tokens_in, ""),
        ("  packed", accounts.tokens, _percent(accounts.tokens, accounts.tokens_in)),
        (
            "  truncated",
            accounts.tokens_truncated,
            f"of {some(accounts.truncated, 'sequence')} beyond {manifest.max_length:,}",
        ),
        *_reasons("dropped", accounts.tokens_dropped),
        *_reasons("left out", accounts.tokens_left_out),
        *_reasons("more", accounts.tokens_extra),
        (
            "trained tokens",
            manifest.trained_tokens,
            f"{_percent(manifest.trained_tokens, accounts.tokens)} of those packed",
        ),
        (
            "packs",
            manifest.rows,
            (
                f"of {manifest.max_length:,} tokens, {manifest.plan['fill']:.2%} full"
                f" ({manifest.plan['strategy']})"
            ),
        ),
    ]
    table = [
        f"{name:<34}{number:>14,}   {note}".rstrip()
        for name, number, note in rows
        if number or not name.startswith("  ")
    ]
    warned = [
        f"warning: {_WARNINGS.get(name, name)} ({some(n, 'record')})"
        for name, n in accounts.warnings.items()
    ]
    return [
        *table,
        *_mask_lines(manifest),
        *_source_lines(manifest),
        *warned,
        *_evaluation_lines(report),
        _speed(report),
    ]


def _mask_lines(manifest: Manifest) -> Iterator[str]:
    """Why masks took the slower path, if more than a tenth of them did."""
    masks = manifest.template.get("masks", {})
    slow, fast = masks.get("by_characters", 0), masks.get("by_ids", 0)
    if 10 * slow > slow + fast:
        reason = max(masks["because"], key=masks["because"].__getitem__)
        yield (
            f"masks of {slow:,} of {slow + fast:,} conversations were set by characters, which is"
            f" slower: mostly because {reason}"
        )


def summary_data(report: BuildReport) -> dict[str, Any]:
    """The summary as JSON values."""
    manifest = report.manifest
    return {
        "output": str(report.folder),
        "manifest_digest": manifest.digest,
        "accounting": dataclasses.asdict(manifest.accounting),
        "sources": [
            {"source": name, "accounting": dataclasses.asdict(own)}
            for name, own in source_accounts(manifest)
        ],
        "inputs": [dataclasses.asdict(info) for info in manifest.inputs],
        "evaluation": None if report.evaluation is None else _evaluation_data(report.evaluation),
        "packs": manifest.rows,
        "fill": manifest.plan["fill"],
        "shards": len(manifest.shards),
        "shard_bytes": sum(shard.bytes for shard in manifest.shards),
        "max_length": manifest.max_length,
        "encoder": manifest.encoder,
        "template": manifest.template,
        "seconds": round(report.seconds, 3),
        "bytes_read": report.bytes_read,
        "mb_per_second": round(report.bytes_read / 1e6 / report.seconds, 2),
        "reused_partitions": report.reused,
        "workers": report.workers,
    }


def source_accounts(manifest: Manifest) -> list[tuple[str, Accounting]]:
    """The accounts of each source, by name, in order; those of a file where a build of an older
    version names no source."""
    sums: dict[str, Counter[str]] = {}
    for info in manifest.inputs:
        sums.setdefault(info.source or info.path, Counter()).update(info.accounting.to_counts())
    return [(name, Accounting.from_counts(counts)) for name, counts in sums.items()]


def equations(accounts: Accounting) -> tuple[str, str]:
    """Rows and tokens of a source, in = out and every reason."""
    rejected = {f"rejected ({reason})": n for reason, n in accounts.rejected.items()}
    rows = {"packed": accounts.sequences, **rejected, **accounts.dropped, **accounts.left_out}
    truncated = {"packed": accounts.tokens, "truncated": accounts.tokens_truncated}
    tokens = {**truncated, **accounts.tokens_dropped, **accounts.tokens_left_out}
    return (
        f"{_sum('records', accounts.records, accounts.extra)} = {_terms(rows)}",
        f"{_sum('tokens', accounts.tokens_in, accounts.tokens_extra)} = {_terms(tokens)}",
    )


def some(number: int, thing: str, plural: str = "s") -> str:
    """So many of a thing, in words. plural: what its name ends with where it is not one."""
    return f"{number:,} {thing}{plural if number != 1 else ''}"


def manifest_line(manifest: Manifest) -> str:
    """A build in a line."""
    return (
        f"{some(manifest.rows, 'pack')} of up to {manifest.max_length:,} tokens,"
        f" {some(manifest.accounting.sequences, 'sequence')}, {manifest.tokens:,} tokens"
        f" ({manifest.trained_tokens:,} trained), tokenizer {manifest.tokenizer['name']}"
    )


_WARNINGS = {
    "encoder_failed_over": (
        "the fast encoder gave other ids than tokenizers, which encoded these partitions instead"
    ),
    "mask_failed_over": (
        "a mask by token ids differed from that by characters, which set the masks of these"
        " partitions instead"
    ),
    "prompt_not_prefix": (
        "the tokens of a prompt are no start of those of prompt + completion; training starts where"
        " they differ"
    ),
    "tool_calls_not_shown": "the chat template shows no tool calls, so they are not in the text",
    "tools_not_shown": "the chat template shows no tools, so their schemas are not in the text",
    "end_of_turn_not_trained": (
        "no token that ends a turn is at the end of what is trained; the model may not learn to"
        " stop"
    ),
    "double_bos": (
        "a sequence starts with two start tokens; take those in the text out, or those of the"
        " template"
    ),
    "empty_target": "the completion says nothing",
    "special_token_in_content": (
        "texts spell special tokens, which they become, unless --escape-special makes them plain"
        " text"
    ),
}


_MOST_SOURCES = 20


def _reasons(what: str, group: dict[str, int]) -> Iterator[tuple[str, int, str]]:
    return ((f"  {what}: {reason.replace('_', ' ')}", n, "") for reason, n in group.items())


def _source_lines(manifest: Manifest) -> list[str]:
    sources = source_accounts(manifest)
    limits = {info.source or info.path: info.limit for info in manifest.inputs}
    if len(sources) < 2 and not any(limits.values()):
        return []
    lines = []
    for name, own in sources[:_MOST_SOURCES]:
        rows, tokens = equations(own)
        limited = (
            f" (limit {own.records:,}: what follows was not read)"
            if own.records == limits[name]
            else ""
        )
        lines.append(f"{name}\n  {rows}{limited}\n  {tokens}")
    rest = len(sources) - len(lines)
    return ["", *lines, *([f"... and {rest} more sources: see --json"] if rest else []), ""]


def _terms(numbers: dict[str, int]) -> str:
    shown = [
        f"{name.replace('_', ' ')} {n:,}" for name, n in numbers.items() if n or name == "packed"
    ]
    return " + ".join(shown)


def _sum(name: str, number: int, extra: dict[str, int]) -> str:
    return " + ".join(
        [
            f"{name} {number:,}",
            *(f"{reason.replace('_', ' ')} {n:,}" for reason, n in extra.items()),
        ]
    )


def _evaluation_lines(report: BuildReport) -> list[str]:
    held = report.evaluation
    if held is None:
        return []
    return [
        f"evaluation: {some(held.accounting.sequences, 'sequence')}, {held.tokens:,} tokens in"
        f" {some(held.rows, 'pack')} ({held.plan['strategy']}), in {report.folder / 'eval'}"
    ]


def _evaluation_data(held: Manifest) -> dict[str, Any]:
    return {
        "manifest_digest": held.digest,
        "accounting": dataclasses.asdict(held.accounting),
        "packs": held.rows,
        "packing": held.plan["strategy"],
    }


def _speed(report: BuildReport) -> str:
    manifest = report.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    reused = f", {some(report.reused, 'partition')} reused" if report.reused else ""
    return (
        f"{some(len(manifest.shards), 'shard')} ({size / 1e6:,.1f} MB,"
        f" {size / max(1, manifest.tokens):.2f} bytes a token) in {report.folder}:"
        f" {report.seconds:.1f} s, {report.bytes_read / 1e6 / report.seconds:,.1f} MB/s,"
        f" {some(report.workers, 'process', 'es')}, {manifest.encoder.get('encoder', '')}{reused}"
    )


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"

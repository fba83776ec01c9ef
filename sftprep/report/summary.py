"""A build in one screen: where every row and token went."""

from __future__ import annotations

import dataclasses
from typing import Any

from sftprep.engine.build import BuildReport
from sftprep.shards.manifest import Manifest


def summary_lines(report: BuildReport) -> list[str]:
    """The summary as lines of plain text."""
    manifest, accounts = report.manifest, report.manifest.accounting
    rows = [
        ("records", accounts.records, "from " + _count(len(manifest.inputs), "file") + f", {report.bytes_read / 1e6:,.1f} MB"),
        ("  packed", accounts.sequences, f"{_percent(accounts.sequences, accounts.records)} as sequences"),
        *((f"  rejected: {reason}", n, "set aside in rejected.jsonl") for reason, n in accounts.rejected.items()),
        *((f"  dropped: {reason.replace('_', ' ')}", n, "") for reason, n in accounts.dropped.items()),
        ("tokens", accounts.tokens_in, ""),
        ("  packed", accounts.tokens, _percent(accounts.tokens, accounts.tokens_in)),
        ("  truncated", accounts.tokens_truncated, f"of {_count(accounts.truncated, 'sequence')} beyond {manifest.max_length:,}"),
        *((f"  dropped: {reason.replace('_', ' ')}", n, "") for reason, n in accounts.tokens_dropped.items()),
        ("trained tokens", accounts.trained_tokens, f"{_percent(accounts.trained_tokens, accounts.tokens)} of those packed"),
        (
            "packs",
            manifest.rows,
            f"of {manifest.max_length:,} tokens, {manifest.plan['fill']:.2%} full ({manifest.plan['strategy']})",
        ),
    ]
    table = [f"{name:<34}{number:>14,}   {note}".rstrip() for name, number, note in rows if number or not name.startswith("  ")]
    warned = [f"warning: {_WARNINGS.get(name, name)} ({_count(n, 'record')})" for name, n in accounts.warnings.items()]
    return [*table, *warned, _speed(report)]


def summary_data(report: BuildReport) -> dict[str, Any]:
    """The summary as JSON values."""
    manifest = report.manifest
    return {
        "output": str(report.folder),
        "manifest_digest": manifest.digest,
        "accounting": dataclasses.asdict(manifest.accounting),
        "packs": manifest.rows,
        "fill": manifest.plan["fill"],
        "shards": len(manifest.shards),
        "shard_bytes": sum(shard.bytes for shard in manifest.shards),
        "max_length": manifest.max_length,
        "encoder": manifest.encoder,
        "seconds": round(report.seconds, 3),
        "bytes_read": report.bytes_read,
        "mb_per_second": round(report.bytes_read / 1e6 / report.seconds, 2),
        "reused_partitions": report.reused,
        "workers": report.workers,
    }


def manifest_line(manifest: Manifest) -> str:
    """A build in a line."""
    return (
        f"{manifest.rows:,} packs of up to {manifest.max_length:,} tokens, {manifest.accounting.sequences:,} sequences, "
        f"{manifest.tokens:,} tokens ({manifest.trained_tokens:,} trained), tokenizer {manifest.tokenizer['name']}"
    )


_WARNINGS = {
    "encoder_failed_over": "the fast encoder gave other ids than tokenizers, which encoded these partitions instead",
    "prompt_not_prefix": "the tokens of a prompt are no start of those of prompt + completion; training starts where they differ",
    "tool_calls_not_shown": "the chat template shows no tool calls, so they are not in the text",
}


def _speed(report: BuildReport) -> str:
    manifest = report.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    reused = f", {_count(report.reused, 'partition')} reused" if report.reused else ""
    return (
        f"{_count(len(manifest.shards), 'shard')} ({size / 1e6:,.1f} MB, {size / max(1, manifest.tokens):.2f} bytes a token) "
        f"in {report.folder}: {report.seconds:.1f} s, {report.bytes_read / 1e6 / report.seconds:,.1f} MB/s, "
        f"{_count(report.workers, 'process', 'es')}, {manifest.encoder.get('encoder', '')}{reused}"
    )


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def _count(n: int, thing: str, plural: str = "s") -> str:
    return f"{n:,} {thing}{plural if n != 1 else ''}"

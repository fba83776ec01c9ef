"""The summary of a verification: its totals, the problems, and what was not checked."""

from __future__ import annotations

import dataclasses
from typing import Any

from sftprep.errors import escape_control, format_count
from sftprep.pipeline.verify import Verification

_MOST_LINES = 100
"""The most problems that are printed; the JSON has more of them."""


def problem_lines(result: Verification) -> list[str]:
    """Return the problems as lines of plain text."""
    lines = [f"problem: {escape_control(text)}" for text in result.problems[:_MOST_LINES]]
    more = len(result.problems) - len(lines) + result.more_problems
    return [*lines, f"and {format_count(more, 'more problem')}"] if more else lines


def verification_lines(result: Verification) -> list[str]:
    """Return the totals, and what was not checked, as lines of plain text."""
    numbers = {
        "shard": result.shards,
        "pack" if result.layout == "packs" else "stored sequence": result.rows,
        "sequence": result.sequences,
        "token": result.tokens,
    }
    counted = ", ".join(format_count(number, noun) for noun, number in numbers.items())
    place = f"part {result.part} of {result.folder}" if result.part else str(result.folder)
    if result.ok:
        lines = [f"ok: {counted} in {place}"]
    else:
        problems = format_count(len(result.problems) + result.more_problems, "problem")
        lines = [f"DAMAGED: {problems} in {place}; intact: {counted}"]
    if result.quick:
        lines.append(f"read {result.blocks_read:,} of {format_count(result.blocks, 'block')}")
    if result.unchecked:
        lines.append(f"not checked: {'; '.join(result.unchecked)}")
    return lines


def verification_data(result: Verification) -> dict[str, Any]:
    """Return the result as JSON values."""
    return {**dataclasses.asdict(result), "folder": str(result.folder), "ok": result.ok}

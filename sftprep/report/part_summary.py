"""The summary of a part of a build: what was done, and what is next."""

from __future__ import annotations

import dataclasses
from typing import Any

from sftprep.errors import format_count
from sftprep.pipeline.part import PartReport


def part_lines(report: PartReport) -> list[str]:
    """Return the summary of a part as lines of plain text."""
    if report.is_up_to_date:
        return [
            f"part {report.part}: {report.folder} is up to date: it has the finished build",
            f"next: {_NEXT_STEPS['nothing']}",
        ]
    done = f"{report.groups_done:,} of {format_count(report.groups_total, 'group')} done in all"
    own = "first round" if report.waiting_for else format_count(report.groups, "group")
    return [
        f"part {report.part}: {own} in {report.folder}, {report.seconds:.1f} s; {done}",
        f"next: {_NEXT_STEPS[next_step(report)]}",
    ]


def part_data(report: PartReport) -> dict[str, Any]:
    """Return the summary of a part as JSON values."""
    values = dataclasses.asdict(report)
    is_up_to_date = values.pop("is_up_to_date")
    return {
        "status": "up_to_date" if is_up_to_date else "done",
        **values,
        "folder": str(report.folder),
        "waiting_for": list(report.waiting_for),
        "seconds": round(report.seconds, 3),
        "next": next_step(report),
    }


def next_step(report: PartReport) -> str:
    """Return what is next, as a key of `_NEXT_STEPS`."""
    if report.is_up_to_date:
        return "nothing"
    if report.waiting_for:
        return "run_parts_again"
    return "finish" if report.groups_done == report.groups_total else "run_other_parts"


_NEXT_STEPS = {
    "run_parts_again": (
        "run all parts once more when all of them have ended: what this build selects depends on"
        " all groups"
    ),
    "run_other_parts": "when all parts have ended, run the same command without --part",
    "nothing": "the build is finished",
    "finish": "all groups are done: run the same command without --part",
}

"""What an earlier run of a build has left in the work folder: where the build resumes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from sftprep.pipeline.groups.receipts import find_kept
from sftprep.pipeline.groups.task import GroupTask
from sftprep.pipeline.passes.spill import read_origin
from sftprep.shards.layout import SPILL_PATTERN
from sftprep.sources.readers.lines import compression

_MOST_SPILLS = 2_000
"""The most spills whose origin is read, which takes a fraction of a millisecond for each."""


@dataclass(frozen=True, slots=True)
class KeptWork:
    """The work of an earlier run that a build does not repeat.

    Attributes:
        groups: The number of groups that are done.
        groups_total: The number of groups.
        partitions: The number of partitions of the other groups that are tokenized.
        bytes: The size of the records of both.
        bytes_total: The size of all records; None if it is not known, as for compressed files.
    """

    groups: int
    groups_total: int
    partitions: int
    bytes: int
    bytes_total: int | None


OnResume = Callable[[KeptWork], None]
"""A callback that receives what is kept, before the build continues."""


def report_kept_work(
    tasks: list[GroupTask], input_bytes: int | None, on_resume: OnResume
) -> KeptWork | None:
    """Report what a build finds in its work folder, and return it; None if there is nothing.

    A file that turns out to be damaged, or to belong to an input that has changed, is made again.

    Args:
        tasks: The groups of the build, as `find_last_round` returns them.
        input_bytes: The size of all input files; None for a part of a build. It counts its groups
            only, since it is not known which of the partitions in the folder are its own.
        on_resume: Called with the result, unless there is nothing.
    """
    work = tasks[0].settings.work
    done = [receipt for receipt in map(find_kept, tasks) if receipt is not None]
    kept = sum(receipt.bytes for receipt in done)
    partitions, total = 0, None
    if input_bytes is not None:
        counted = {key for receipt in done for key in receipt.spills}
        recipes = {each.recipe_key for task in tasks for each in task.inputs}
        partitions, size = _measure_spills(work, counted, recipes)
        kept += size
        total = max(kept, input_bytes) if _has_plain_inputs(tasks) else None
    if not done and not partitions:
        return None
    found = KeptWork(len(done), len(tasks), partitions, kept, total)
    on_resume(found)
    return found


def _measure_spills(work: Path, counted: Set[str], recipes: Set[str]) -> tuple[int, int]:
    """Return the number of usable spills, and the size of the records in them.

    Args:
        work: The work folder.
        counted: The keys of spills that are not counted.
        recipes: The keys of the recipes of the build.
    """
    names = [name for name in os.listdir(work) if re.fullmatch(SPILL_PATTERN, name)]
    spills = sorted(name for name in names if Path(name).stem not in counted)
    # The names are digests, so the first ones are a random sample.
    origins = [read_origin(work / name) for name in spills[:_MOST_SPILLS]]
    sizes = [each.bytes for each in origins if each is not None and each.recipe_key in recipes]
    scale = len(spills) / max(1, len(origins))
    return round(scale * len(sizes)), round(scale * sum(sizes))


def _has_plain_inputs(tasks: list[GroupTask]) -> bool:
    """Return whether the size of all records is that of the files."""
    sources = (each.source for task in tasks for each in task.inputs)
    return all(
        each.kind == "lines"
        and each.blocks is None
        and each.limit is None
        and compression(each.file) is None
        for each in sources
    )

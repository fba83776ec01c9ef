"""Which spills stay after the groups that they were made for are done."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sftprep.core.atomic_write import storage_errors
from sftprep.pipeline.groups.receipt_files import read_receipt
from sftprep.pipeline.groups.task import GroupDone
from sftprep.pipeline.passes.spill import spill_path
from sftprep.shards.layout import SPILL_PATTERN, receipt_name

_MOST_OTHER_SPILLS = 3
"""The size of the spills of other builds, as a multiple of the size of those of this build."""


def remove_spills(work: Path, key: str) -> None:
    """Remove the spills of a group that is done, except those of its evaluation records.

    If another group has an equal partition, its spill is made again.

    Args:
        work: The work folder, in which no other group runs.
        key: The key of the receipt of the group.

    Raises:
        StorageError: A spill cannot be removed.
    """
    receipt = read_receipt(work / receipt_name(key))
    if receipt is None:
        return
    names = {spill_path(Path(), spill).name for spill in receipt.spills}
    with storage_errors(work):
        for name in names.difference(receipt.other_files):
            (work / name).unlink(missing_ok=True)


def limit_spills(work: Path, done: Iterable[GroupDone]) -> None:
    """Remove the oldest of the spills that a build did not use, above a limit.

    Builds with other recipes reuse them, but they must not fill the disk: they may have three times
    the size of those that this build used.

    Args:
        work: The work folder.
        done: The groups of the build.
    """
    used: set[str] = set()
    for each in done:
        receipt = read_receipt(work / receipt_name(each.receipt))
        used.update(() if receipt is None else receipt.spills)
    spills = [path for path in work.glob("*.arrow") if re.fullmatch(SPILL_PATTERN, path.name)]
    others = [path for path in spills if path.stem not in used]
    left = _MOST_OTHER_SPILLS * sum(path.stat().st_size for path in spills if path.stem in used)
    for path in sorted(others, key=lambda path: -path.stat().st_mtime_ns):
        left -= path.stat().st_size
        if left < 0:
            path.unlink(missing_ok=True)

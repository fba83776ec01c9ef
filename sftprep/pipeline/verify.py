"""The verification of a build, on the executors of a build.

The shards are cut into ranges, which are checked in any order; the result is in the order of the
manifest. Part I of K checks the groups I, I + K, ... and part 1 also checks what concerns all
groups, so that the build is intact if all parts find it intact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sftprep.config.validation import ExecutorChoice, check_choice, check_integer, parse_part
from sftprep.errors import ConfigError, ManifestError, WorkerError, setting
from sftprep.pipeline.executors.base import Executor, map_checked
from sftprep.pipeline.executors.local import available_cores, make_executor
from sftprep.pipeline.executors.ray_tasks import RayExecutor
from sftprep.shards.manifest import Manifest, read_manifest
from sftprep.shards.schema import BLOCK_PACKS
from sftprep.shards.verification.shard_range import (
    Findings,
    Totals,
    check_range,
    count_shards,
    cut_ranges,
)
from sftprep.shards.verification.whole_build import find_build_problems, find_manifest_problems
from sftprep.stores.folder import BuildFolder, StoreFolder

_MOST_PROBLEMS = 1000
"""The most problems that a result names."""
_BYTES_PER_WORKER = 256 << 20
"""A spawned worker that reads less than this spends longer on its imports than on its work."""
_RANGES_PER_CORE = 16
"""Enough for an even load at the end, and few enough that a driver of many machines keeps up."""
_SAMPLED_BLOCKS = 3


@dataclass(slots=True, kw_only=True)
class Verification(Totals):
    """The result of `verify`: the totals of the intact shards, and the problems.

    Attributes:
        folder: The folder of the build.
        part: The part that was checked, as `I/K`; None for the whole build.
        quick: Whether only some blocks of each shard were read.
        layout: The layout of the build, which decides what a row is.
        problems: A description of each problem: those of the whole build, and then those of the
            groups in the order of the manifest. Empty if the build is intact; at most 1,000.
        more_problems: The number of further problems.
        unchecked: What was not checked, in words.
    """

    folder: BuildFolder
    part: str | None
    quick: bool
    layout: str = "packs"
    problems: list[str] = field(default_factory=list)
    more_problems: int = 0
    unchecked: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Return whether no problem was found."""
        return not self.problems


def verify(
    folder: str | os.PathLike[str],
    *,
    quick: bool = False,
    part: str | None = None,
    workers: int | None = None,
    executor: str | Executor = "local",
    ray_address: str | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Verification:
    """Check all of a build, or a part of it.

    Args:
        folder: The output folder of the build, or its URL in a store, whose cache is not used for
            shards.
        quick: Whether to read only the manifest, the files and indexes of the groups, and of each
            shard its size, its end, and its first, middle and last block.
        part: I/K checks the groups I, I + K, ... of the manifest. Part 1 also checks what concerns
            all groups: their sums, files that no manifest lists, and the evaluation build.
        workers: The number of processes; None for one for each 256 MiB that is read, and at most
            one for each core.
        executor: "local", "ray", or an object that runs the tasks (docs/scale.md), which the caller
            closes. The result does not depend on it.
        ray_address: The address of the Ray cluster; None to start one on this machine.
        progress: Called with the number of shards that were checked, and the number of all of them.

    Returns:
        The totals and the problems; damage inside a build is a problem and not an exception.

    Raises:
        ManifestError: The folder is not a build, or its manifest is damaged.
        ConfigError: A setting is invalid.
        StorageError: The store cannot be reached.
        WorkerError: A worker died repeatedly, or does not reach the build.

    Example:
        result = verify("shards", workers=8)
        print("intact" if result.ok else result.problems)
    """
    first, step = _parse_settings(part, workers, executor, ray_address) or (1, 1)
    manifest = read_manifest(folder)
    root = manifest.folder
    assert root is not None
    groups = range(first - 1, len(manifest.groups), step)
    count = workers or _count_workers(manifest, groups, quick=quick)
    with _open_executor(executor, count, ray_address) as opened:
        findings = _check_groups(root, manifest, groups, opened, progress, quick=quick)
    problems = find_manifest_problems(manifest)
    if first == 1:
        problems += find_build_problems(root, manifest)
    unchecked = _unchecked(root, manifest, groups, quick=quick)
    result = Verification(
        folder=root, part=part, quick=quick, layout=manifest.layout, unchecked=unchecked
    )
    for found in findings:
        result.add(found.totals)
        problems += found.problems
    result.problems = problems[:_MOST_PROBLEMS]
    result.more_problems = len(problems) - len(result.problems)
    return result


def _check_groups(
    root: BuildFolder,
    manifest: Manifest,
    groups: range,
    executor: Executor,
    progress: Callable[[int, int], None],
    *,
    quick: bool,
) -> list[Findings]:
    """Check groups on an executor; return the findings in the order of the manifest."""
    reached = root.absolute() if executor.far and isinstance(root, Path) else root
    num_ranges = _RANGES_PER_CORE * executor.capacity
    ranges = cut_ranges(reached, manifest, groups, num_ranges, quick=quick)
    findings, done = [], 0
    total = count_shards(manifest, groups)
    try:
        for found in map_checked(executor, check_range, ranges):
            findings.append(found)
            done += found.range.stop - found.range.start
            progress(done, total)
    except ManifestError as error:
        if not executor.far:
            raise
        raise WorkerError(
            f"a worker cannot read the build: {error.message}",
            remedy="all machines must reach it under the same path",
        ) from error
    return sorted(findings, key=lambda found: found.range)


def _parse_settings(
    part: str | None, workers: int | None, executor: str | Executor, ray_address: str | None
) -> tuple[int, int] | None:
    """Check the settings, and return the part.

    Raises:
        ConfigError: One is invalid, or two contradict each other.
    """
    check_integer(workers, setting("workers"), 1, 4096)
    if isinstance(executor, str):
        check_choice(setting("executor"), executor, ExecutorChoice)
    if workers is not None and executor != "local":
        raise ConfigError(
            f"{setting('workers')} is for processes on this machine",
            remedy=[f"leave it out, or leave out {setting('executor')}"],
        )
    if ray_address is not None and executor != "ray":
        raise ConfigError(
            f"{setting('ray_address')} is without {setting('executor', 'ray')}",
            remedy=f"add {setting('executor', 'ray')}",
        )
    return parse_part(part, setting("part", part))


@contextmanager
def _open_executor(
    executor: str | Executor, workers: int, ray_address: str | None
) -> Iterator[Executor]:
    """Yield the executor of the settings, which is closed at the end if it was named."""
    if not isinstance(executor, str):
        yield executor
        return
    opened = RayExecutor(ray_address) if executor == "ray" else make_executor(workers)
    try:
        yield opened
    finally:
        opened.close()


def _count_workers(manifest: Manifest, groups: range, *, quick: bool) -> int:
    """Return the number of processes that shards of this size are worth."""
    size = 0.0
    for entry in (manifest.groups[number] for number in groups):
        sampled = sum(min(rows, _SAMPLED_BLOCKS * BLOCK_PACKS) for rows in entry.packs)
        size += entry.bytes * (sampled / max(1, sum(entry.packs)) if quick else 1)
    return min(available_cores(), max(1, int(size) // _BYTES_PER_WORKER))


def _unchecked(root: BuildFolder, manifest: Manifest, groups: range, *, quick: bool) -> list[str]:
    """Return what is not checked, in words."""
    found = []
    if groups.step > 1:
        found.append("the groups of other parts")
    if groups.start:
        found.append("the sums of all groups, which part 1 checks")
    if quick:
        found += [
            "the other blocks of the shards",
            "the values in the packs",
            "the SHA-256 of the shards",
            "the content of the rejected records",
        ]
    if manifest.eval:
        found.append(f"the shards of the evaluation build in {root / str(manifest.eval['folder'])}")
    if isinstance(root, StoreFolder):
        found.append("files that no manifest lists")
    return found

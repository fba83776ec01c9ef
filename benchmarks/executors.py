"""Cost of a task, and of a whole build, in a pool of processes and on Ray.

    pip install "sftprep[ray]"
    python -m benchmarks.executors --tokenizer HuggingFaceTB/SmolLM2-135M
    python -m benchmarks.executors --tokenizer DIR --data chats.jsonl --group-bytes 1048576

Both executors run on this machine, with as many workers as it has cores. The first columns are the
milliseconds of an empty task, once all workers are warm; the others are the seconds of a build on
the clock, the median of several rounds in which the executors alternate. The builds of both must
have the same `data_digest`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.corpora import SHARED, add_corpus_arguments, make_corpus, positive_int
from benchmarks.packing import machine_line
from sftprep import build
from sftprep.errors import MissingDependency
from sftprep.pipeline.executors.base import Executor
from sftprep.pipeline.executors.local import Processes, available_cores
from sftprep.pipeline.executors.ray_tasks import RayExecutor

_WARM_UP = 200
"""The tasks before those that are measured: all workers are started, and have loaded sftprep."""


def milliseconds_per_task(executor: Executor, tasks: int) -> float:
    """Return the time of an empty task on the clock, in milliseconds.

    Args:
        executor: The executor.
        tasks: The number of tasks.
    """
    for _ in executor.map_unordered(abs, range(_WARM_UP)):
        pass
    start = time.perf_counter()
    results = sum(1 for _ in executor.map_unordered(abs, range(tasks)))
    assert results == tasks
    return 1000 * (time.perf_counter() - start) / tasks


def timed_build(
    source: Path, output: Path, executor: Executor, **settings: Any
) -> tuple[float, str]:
    """Return the seconds of a build on the clock, and its digest.

    Args:
        source: The input.
        output: The folder of the build, which does not exist.
        executor: The executor.
        settings: Those of the build.
    """
    start = time.perf_counter()
    manifest = build(source, output=output, executor=executor, **settings).manifest
    return time.perf_counter() - start, manifest.data_digest


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_arguments(parser, megabytes=48)
    parser.add_argument("--tokenizer", default="smollm2", help="folder or name on the Hub")
    parser.add_argument("--group-bytes", type=positive_int, default=1 << 22)
    parser.add_argument("--tasks", type=positive_int, default=2_000)
    parser.add_argument("--rounds", type=positive_int, default=3)
    options = parser.parse_args()
    cores = available_cores()
    try:
        executors: dict[str, Executor] = {
            "ray": RayExecutor(),
            "pool": Processes(cores, include_this_process=False),
        }
    except MissingDependency as error:
        raise SystemExit(f"{error.message}: {error.remedy}") from error
    folder = SHARED / "tokenizers" / options.tokenizer
    tokenizer = str(folder if folder.is_dir() else options.tokenizer)
    print(machine_line())
    print(f"{cores} workers; groups of {options.group_bytes:,} bytes")
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as scratch, ExitStack() as stack:
        for executor in executors.values():
            stack.callback(executor.close)
        os.environ["SFTPREP_CACHE"] = str(Path(scratch, "cache"))
        source, renames = make_corpus(options.data, Path(scratch), options.megabytes)
        cost = {
            name: milliseconds_per_task(each, options.tasks) for name, each in executors.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in executors}
        digests = set()
        for number in range(options.rounds + 1):
            for name, executor in executors.items():
                taken, digest = timed_build(
                    source,
                    Path(scratch, f"{name}-{number}"),
                    executor,
                    tokenizer=tokenizer,
                    map=renames,
                    group_bytes=options.group_bytes,
                )
                digests.add(digest)
                if number:  # the first round loads the tokenizer in all workers
                    seconds[name].append(taken)
    print(f"{'executor':<10}{'ms per task':>12}{'build s':>9}{'times the pool':>16}")
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, median in medians.items():
        ratio = median / medians["pool"]
        print(f"{name:<10}{cost[name]:>12.2f}{median:>9.2f}{ratio:>16.2f}")
    if len(digests) > 1:
        raise SystemExit(f"the builds differ: {', '.join(sorted(digests))}")
    print("all builds have the same data_digest")
    return 0


if __name__ == "__main__":
    sys.exit(main())

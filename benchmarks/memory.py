"""Peak memory of a build of 2 GB: the largest resident set of any of its processes.

    python -m benchmarks.memory                        # chitchat, repeated until it is 2 GB
    python -m benchmarks.memory --gigabytes 0.3 --workers 1

The claim is that the peak does not depend on the size of the corpus, except for a few bytes per
sequence in the planner, and that a finished build leaves no spill. The resident sets are sampled
ten times per second in /proc, so the benchmark runs on Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.corpora import make_corpus, positive_int, repeat_records, tokenizer_folder

_LIMIT = 2**30
"""Largest permitted resident set in bytes."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="chitchat", help="chitchat, gsm8k, or a JSONL file")
    parser.add_argument("--tokenizer", default="qwen3", help="folder of a tokenizer")
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="repeat the data until it has this size"
    )
    parser.add_argument("--workers", type=positive_int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--scratch", help="folder for the corpus and the build; needs three times --gigabytes"
    )
    arguments = parser.parse_args()
    row = measure(arguments)
    print(json.dumps(row, indent=1) if arguments.json else _table(row))
    if row["peak_bytes"] > _LIMIT:
        raise SystemExit("a process used more than 1 GiB")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one build, and sample the memory of the command and all its descendants."""
    if arguments.scratch:
        Path(arguments.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-", dir=arguments.scratch) as scratch:
        path, renames = make_corpus(arguments.data, Path(scratch))
        copies = max(1, round(arguments.gigabytes * 1e9 / path.stat().st_size))
        path = (
            repeat_records(path, copies, Path(scratch) / "repeated.jsonl") if copies > 1 else path
        )
        output = Path(scratch) / "out"
        command = [
            sys.executable,
            "-c",
            "from sftprep.cli import main; main()",
            "build",
            str(path),
            "--output",
            str(output),
            "--json",
        ]
        command += [
            "--tokenizer",
            str(tokenizer_folder(arguments.tokenizer)),
            "--workers",
            str(arguments.workers),
        ]
        command += ["--max-length", "4096", *(["--map", ",".join(renames)] if renames else [])]
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peaks: dict[int, int] = {}
        while child.poll() is None:
            for process in _process_tree(child.pid):
                peaks[process] = max(peaks.get(process, 0), _resident(process))
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        if child.returncode:
            raise SystemExit("the build failed")
        spills = sum(
            file.stat().st_size
            for file in output.rglob("*")
            if "shards" not in file.parts and file.suffix == ".arrow"
        )
        return {
            "megabytes": path.stat().st_size / 1e6,
            "seconds": seconds,
            "peak_bytes": max(peaks.values(), default=0),
            "peaks": sorted(peaks.values(), reverse=True),
            "shard_bytes": sum(file.stat().st_size for file in output.rglob("shard-*.arrow")),
            "spill_bytes_left": spills,
        }


def _process_tree(process: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [process]
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            for child in Path(f"/proc/{process}/task/{thread}/children").read_text().split():
                found += _process_tree(int(child))
    except OSError:  # the process ended in the meantime
        pass
    return found


def _resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _table(row: dict[str, Any]) -> str:
    others = ", ".join(f"{peak / 1e6:,.0f}" for peak in row["peaks"][1:4])
    return "\n".join(
        [
            (
                f"{row['megabytes']:,.0f} MB of JSONL in {row['seconds']:.0f} s:"
                f" {row['megabytes'] / row['seconds']:.0f} MB/s"
            ),
            (
                f"largest resident set of a process: {row['peak_bytes'] / 1e6:,.0f} MB (the others:"
                f" {others or 'none'})"
            ),
            (
                f"on the disk afterwards: {row['shard_bytes'] / 1e6:,.0f} MB of shards,"
                f" {row['spill_bytes_left']:,} bytes of spills"
            ),
        ]
    )


if __name__ == "__main__":
    main()

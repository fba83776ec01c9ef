"""Cost of a record and peak memory of builds of 10^4, 10^5 and 10^6 records.

    python -m benchmarks.growth                       # gsm8k, repeated
    python -m benchmarks.growth --sizes 10000 100000 --tokenizer DIR

The claim is that the cost of a record does not grow with the corpus: the microseconds per record in
the last column are constant. Each build runs in a process of its own with two workers. A build of
100 records measures the cost of starting, which is subtracted in the last column. The peak is the
largest of any process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.corpora import make_corpus, positive_int, repeat_records, tokenizer_folder
from benchmarks.plots import plot_over_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="gsm8k", help="chitchat, gsm8k, or a JSONL file")
    parser.add_argument("--tokenizer", default="qwen3", help="folder of a tokenizer")
    parser.add_argument(
        "--sizes",
        type=positive_int,
        nargs="+",
        default=[10_000, 100_000, 1_000_000],
        help="approximate numbers of records",
    )
    parser.add_argument("--workers", type=positive_int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot", type=Path, help="plot cost and memory over the number of records to this file"
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(_build(json.loads(arguments.task))))
        return
    start = measure(arguments, 100)["seconds"]
    rows = [measure(arguments, size) for size in arguments.sizes]
    for row in rows:
        row["net_us_per_record"] = 1e6 * (row["seconds"] - start) / row["records"]
    print(json.dumps(rows, indent=1)) if arguments.json else print(_table(rows))
    if arguments.plot:
        series = {name: [row[key] for row in rows] for name, key in _PLOTTED.items()}
        plot_over_size(arguments.plot, [row["records"] for row in rows], series, size="records")


def measure(arguments: argparse.Namespace, records: int) -> dict[str, Any]:
    """Run one build of about `records` records and return its row of the table."""
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as scratch:
        path, renames = make_corpus(arguments.data, Path(scratch))
        with open(path, "rb") as file:
            lines = sum(1 for _ in file)
        path = repeat_records(
            path, max(1, round(records / lines)), Path(scratch) / "repeated.jsonl", limit=records
        )
        task = {
            "inputs": str(path),
            "map": renames,
            "tokenizer": str(tokenizer_folder(arguments.tokenizer)),
            "output": f"{scratch}/out",
            "workers": arguments.workers,
            "max_length": 4096,
        }
        command = [sys.executable, "-m", "benchmarks.growth", "--task", json.dumps(task)]
        child = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
            check=True,
        )
        row: dict[str, Any] = json.loads(child.stdout.strip().split("\n")[-1])
        return row


def _build(task: dict[str, Any]) -> dict[str, Any]:
    from sftprep import BuildConfig, build

    report = build(BuildConfig.of(**task))
    peak = 1024 * max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    accounts = report.manifest.accounting
    return {
        "records": accounts.records,
        "megabytes": report.bytes_read / 1e6,
        "seconds": report.seconds,
        "us_per_record": 1e6 * report.seconds / accounts.records,
        "mb_per_second": report.bytes_read / 1e6 / report.seconds,
        "tokens_per_second": accounts.tokens / report.seconds,
        "peak_mb": peak / 1e6,
    }


_PLOTTED = {
    "µs a record, without the start": "net_us_per_record",
    "MB per second": "mb_per_second",
    "peak MB of a process": "peak_mb",
}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'records':>10}{'MB':>9}{'seconds':>9}{'us/record':>11}{'MB/s':>8}"
        f"{'tokens/s':>13}{'peak MB':>9}{'net us/record':>15}"
    ]
    lines += [
        f"{r['records']:>10,}{r['megabytes']:>9,.0f}{r['seconds']:>9.2f}{r['us_per_record']:>11.1f}{r['mb_per_second']:>8.1f}"
        f"{r['tokens_per_second']:>13,.0f}{r['peak_mb']:>9,.0f}{r['net_us_per_record']:>15.1f}"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

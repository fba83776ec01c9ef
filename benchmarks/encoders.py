"""Speed of each encoder: by itself, and in a whole build.

    python -m benchmarks.encoders                               # 24 MB of varied chats, smollm2
    python -m benchmarks.encoders --tokenizer HuggingFaceTB/SmolLM2-135M --megabytes 60
    python -m benchmarks.encoders --train-on all --encoders fastokens tokenizers

For each encoder that can be used for the tokenizer:

- bare: reading the file, parsing each line with orjson, and encoding the rendered texts with the
  library in the form that it processes fastest, on one thread, with everything loaded;
- build: `sftprep.build` with one worker in a process of its own, with everything that it starts
  (the reference encoder that checks samples, too), from an empty output folder.

Both are the median CPU seconds of several rounds, in which the encoders alternate; the seconds of a
build on the clock are shown as well. The shards of all builds are compared.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson

from benchmarks.corpora import SHARED, add_corpus_arguments, make_corpus, positive_int
from benchmarks.stages import RawEncoder, render_texts
from sftprep.config import BuildConfig
from sftprep.errors import SftprepError
from sftprep.pipeline.passes.preprocess import Preprocessor
from sftprep.pipeline.prepare.setup import Setup, prepare_setup
from sftprep.sources.partition import cut, read_partition
from sftprep.tokenize.encoders.load import ENCODERS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_arguments(parser, megabytes=24)
    parser.add_argument("--tokenizer", default="smollm2", help="folder or name on the Hub")
    parser.add_argument("--train-on", default="assistant", help="as for `sftprep build`")
    parser.add_argument("--encoders", nargs="+", default=[*ENCODERS], choices=[*ENCODERS])
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(_build(json.loads(arguments.task))))
        return
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as scratch:
        rows = measure(arguments, Path(scratch))
    print(json.dumps(rows, indent=1)) if arguments.json else print(_table(rows))


def measure(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Return a row of the table for each encoder, in the order of `ENCODERS`."""
    path, renames = make_corpus(arguments.data, scratch, arguments.megabytes)
    folder = SHARED / "tokenizers" / arguments.tokenizer
    task = {
        "inputs": str(path),
        "map": renames,
        "tokenizer": str(folder if folder.is_dir() else arguments.tokenizer),
        "output": str(scratch / "out"),
        "workers": 1,
        "max_length": 4096,
        "train_on": arguments.train_on,
    }
    floors: dict[str, Floor] = {}
    refused: dict[str, str] = {}
    for name in arguments.encoders:
        try:
            floors[name] = Floor(prepare_setup(BuildConfig.of(**task, encoder=name)))
        except SftprepError as error:
            refused[name] = error.message
    bare: dict[str, list[float]] = {name: [] for name in floors}
    builds: dict[str, list[dict[str, Any]]] = {name: [] for name in floors}
    for _ in range(arguments.rounds):
        for name, floor in floors.items():
            bare[name].append(floor.run())
            builds[name].append(_run_build({**task, "encoder": name}, scratch))
    megabytes = path.stat().st_size / 1e6
    rows: list[dict[str, Any]] = [
        {
            "encoder": name,
            "bare_seconds": statistics.median(bare[name]),
            "build_seconds": statistics.median(build["cpu"] for build in builds[name]),
            "build_clock": statistics.median(build["clock"] for build in builds[name]),
            "megabytes": megabytes,
            "digests": sorted({build["digest"] for build in builds[name]}),
        }
        for name in floors
    ]
    return [*rows, *({"encoder": name, "refused": reason} for name, reason in refused.items())]


class Floor:
    """The work that no build can avoid: reading, parsing and the raw encoder."""

    def __init__(self, setup: Setup) -> None:
        stages = Preprocessor(setup.recipe, threads=False)
        self._partitions = list(cut(setup.files))
        self._encoder = RawEncoder(stages)
        self._texts = [
            self._encoder.prepare(render_texts(stages, read_partition(each), setup.formats[0]))
            for each in self._partitions
        ]
        self._encoder.run(self._texts[0])

    def run(self) -> float:
        """Return the CPU seconds."""
        started = time.process_time()
        for partition, texts in zip(self._partitions, self._texts, strict=True):
            for line in read_partition(partition).split(b"\n"):
                if line:
                    orjson.loads(line)
            self._encoder.run(texts)
        return time.process_time() - started


def _run_build(task: dict[str, Any], scratch: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as output:
        started = time.perf_counter()
        build = json.dumps({**task, "output": f"{output}/out"})
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.encoders", "--task", build],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
            check=True,
        )
        clock = time.perf_counter() - started
    found: dict[str, Any] = json.loads(child.stdout.strip().split("\n")[-1])
    return {**found, "clock": clock}


def _build(task: dict[str, Any]) -> dict[str, Any]:
    """Run one build; return its digest, and the CPU seconds of this process and its children."""
    from sftprep import build

    manifest = build(BuildConfig.of(**task)).manifest
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    return {"digest": manifest.data_digest, "cpu": cpu}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'encoder':<12}{'bare CPU s':>11}{'MB/s':>7}{'build CPU s':>13}{'MB/s':>7}{'clock s':>9}"
        f"{'of bare':>9}{'bare':>8}{'build':>8}{'clock':>8}  (the last three: times tokenizers)"
    ]
    measured = [row for row in rows if "refused" not in row]
    slowest = next((row for row in measured if row["encoder"] == "tokenizers"), None)
    for row in measured:
        bare, build, clock = row["bare_seconds"], row["build_seconds"], row["build_clock"]
        ratios = "".join(
            f"{slowest[key] / row[key]:>8.2f}" if slowest else f"{'-':>8}"
            for key in ("bare_seconds", "build_seconds", "build_clock")
        )
        size = row["megabytes"]
        lines.append(
            f"{row['encoder']:<12}{bare:>11.2f}{size / bare:>7.1f}{build:>13.2f}"
            f"{size / build:>7.1f}{clock:>9.2f}{bare / build:>9.2f}{ratios}"
        )
    lines += [f"{row['encoder']}: {row['refused']}" for row in rows if "refused" in row]
    num_digests = len({digest for row in measured for digest in row["digests"]})
    lines.append(
        "all builds have the same shards" if num_digests == 1 else "THE SHARDS OF THE BUILDS DIFFER"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Where the time of a build goes, beside the floor: reading, parsing, the raw encoder and writing
cannot be saved.

    python -m benchmarks.stages                      # chitchat with qwen3
    python -m benchmarks.stages --data my.jsonl --tokenizer DIR --copies 4

The raw encoder encodes the finished texts, and the prompts where they are encoded too, by the
library's own call for many texts; a build may be better at it, where it need not encode what is the
same in many. One process, everything loaded and warm; each stage runs over all partitions, and the
fastest of several rounds counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import orjson

from benchmarks.corpora import corpus, positive, repeated, tokenizer_folder
from benchmarks.plots import bars
from sftprep.config import BuildConfig
from sftprep.engine.build import build
from sftprep.engine.prepare import Preparer
from sftprep.engine.recipe import Recipe
from sftprep.engine.setup import prepare_setup
from sftprep.engine.spill import write_spill
from sftprep.sources.partition import cut, read_partition
from sftprep.tokenize.hf import HfEncoder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="chitchat", help="chitchat, gsm8k, or a JSONL file")
    parser.add_argument("--tokenizer", default="qwen3", help="folder of a tokenizer")
    parser.add_argument(
        "--copies", type=positive, default=1, help="repeat the data so often, each record numbered"
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, help="draw the seconds of each stage into this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as scratch:
        path, renames = corpus(arguments.data, Path(scratch))
        if arguments.copies > 1:
            path = repeated(path, arguments.copies, Path(scratch) / "repeated.jsonl")
        settings = {
            "tokenizer": str(tokenizer_folder(arguments.tokenizer)),
            "output": f"{scratch}/build",
            "max_length": 4096,
        }
        config = BuildConfig.of(
            inputs=str(path), map=tuple(renames), workers=1, overwrite=True, **settings
        )
        rows = stages(config, Path(scratch), arguments.rounds)
    print(json.dumps(rows, indent=1)) if arguments.json else print(_table(rows))
    if arguments.plot:
        ours = [not r["stage"].startswith(("orjson", "raw encoder", "floor")) for r in rows]
        bars(
            arguments.plot,
            [r["stage"] for r in rows],
            [r["seconds"] for r in rows],
            ours=ours,
            measure="seconds",
        )


def stages(config: BuildConfig, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds and MB/s of each stage of pass 1, of pass 1 as a whole, and of the floor."""
    setup = prepare_setup(config)
    preparer = Preparer(setup.recipe, threads=True)  # as a build of one process has it
    partitions = list(cut(setup.files))
    blocks = [read_partition(partition) for partition in partitions]
    size = sum(map(len, blocks))
    name = setup.formats[0]
    # The stages are the steps of Preparer.prepare, each fed with what the one before it made.
    texts = [preparer._texts(block, name, [], Counter()).rendered() for block in blocks]
    raw = _raw_encoder(setup.recipe)
    batches = [preparer.prepare(block, name, seed=0) for block in blocks]

    def spill(number: int, batch: Any) -> None:
        write_spill(folder / f"{number}.arrow", batch)

    work: dict[str, Callable[[], Any]] = {
        "read": lambda: [read_partition(partition) for partition in partitions],
        "orjson alone": lambda: [
            orjson.loads(line) for block in blocks for line in block.split(b"\n") if line
        ],
        "lines to texts": lambda: [preparer._texts(block, name, [], Counter()) for block in blocks],
        "raw encoder": lambda: [
            raw(part) for own in texts for part in (own.texts, own.prompts) if part
        ],
        "write spill": lambda: [spill(number, batch) for number, batch in enumerate(batches)],
        "pass 1, all of it": lambda: [
            spill(number, preparer.prepare(read_partition(p), name, seed=0))
            for number, p in enumerate(partitions)
        ],
        # In one process, which keeps its tokenizer from the first round to the others.
        "whole build": lambda: build(config),
    }
    seconds = {stage: _fastest(run, rounds) for stage, run in work.items()}
    seconds["floor: read + orjson + raw encoder + write"] = sum(
        seconds[stage] for stage in ("read", "orjson alone", "raw encoder", "write spill")
    )
    tokens = int(np.sum([batch.offsets[-1] for batch in batches]))
    return [
        {
            "stage": stage,
            "seconds": taken,
            "mb_per_second": size / 1e6 / taken,
            "tokens_per_second": tokens / taken,
        }
        for stage, taken in seconds.items()
    ]


def _raw_encoder(recipe: Recipe) -> Callable[[list[str]], Any]:
    """The library that encodes, by its own call for many texts, on one thread."""
    if recipe.encoder != "gigatoken":
        return HfEncoder(recipe.tokenizer, threads=False).encode
    return partial(
        gigatoken.Tokenizer.from_json(recipe.tokenizer.json).encode_batch, parallel=False
    )


def _fastest(run: Callable[[], Any], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def _table(rows: list[dict[str, Any]]) -> str:
    encoder = next(row for row in rows if row["stage"] == "raw encoder")["seconds"]
    first = next(row for row in rows if row["stage"].startswith("pass 1"))["seconds"]
    whole = next(row for row in rows if row["stage"] == "whole build")["seconds"]
    lines = [f"{'stage':<46}{'seconds':>9}{'MB/s':>9}{'tokens/s':>14}"]
    lines += [
        f"{r['stage']:<46}{r['seconds']:>9.3f}{r['mb_per_second']:>9,.0f}{r['tokens_per_second']:>14,.0f}"
        for r in rows
    ]
    return "\n".join(
        [
            *lines,
            (
                f"of the raw encoder's throughput: pass 1 {encoder / first:.2f}, whole build"
                f" {encoder / whole:.2f}"
            ),
        ]
    )


if __name__ == "__main__":
    main()

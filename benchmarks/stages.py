"""The cost of pass 1 compared with its floor: reading, parsing and the raw encoder.

    python -m benchmarks.stages                                  # 120 MB of varied chats, qwen3
    python -m benchmarks.stages --data short --megabytes 60      # records of about 220 bytes
    python -m benchmarks.stages --data my.jsonl --tokenizer DIR --chat-template FILE

Pass 1 is measured where every token is trained (`all`), and where only the assistant's are: derived
from the tokenizer's own template (`assistant`), and by the marks of a training template, if one is
found in the package trl or specified. One process with one thread, everything loaded and warm,
nothing written. CPU seconds, the median of several rounds; the stages alternate in each round.

The floor reads the file, parses each line with orjson, and encodes the rendered texts, joined with
a separator, by one call of the encoder for each partition (`tokenizers`: one call for each text).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from benchmarks.corpora import CORPORA, corpus, positive, tokenizer_folder, training_template
from benchmarks.plots import bars
from sftprep.config import BuildConfig
from sftprep.core.byte_search import ByteSearcher
from sftprep.pipeline.preprocess import Preprocessor, preprocess, read_examples
from sftprep.pipeline.setup import Setup, prepare_setup
from sftprep.sources.partition import cut, read_partition
from sftprep.tokenize.encoders.gigatoken import load_gigatoken
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.encoders.separators import between_texts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="varied", help=f"{', '.join(CORPORA)}, or a JSONL file")
    parser.add_argument("--megabytes", type=positive, default=120, help="of varied or short chats")
    parser.add_argument("--tokenizer", default="qwen3", help="folder of a tokenizer")
    parser.add_argument("--chat-template", help="instead of the tokenizer's own")
    parser.add_argument("--encoder", default="auto", choices=("auto", "gigatoken", "tokenizers"))
    parser.add_argument("--train-on", nargs="+", default=["all", "assistant"])
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, help="draw the seconds of each stage into this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as scratch:
        path, renames = corpus(arguments.data, Path(scratch), arguments.megabytes)
        folder = tokenizer_folder(arguments.tokenizer)
        modes = {mode: (mode, arguments.chat_template) for mode in arguments.train_on}
        marked = arguments.chat_template or training_template(folder)
        if "assistant" in modes and marked != arguments.chat_template:
            modes["assistant, marked"] = ("assistant", str(marked))
        setups = {
            name: prepare_setup(
                BuildConfig.of(
                    inputs=str(path),
                    map=tuple(renames),
                    tokenizer=str(folder),
                    output=f"{scratch}/build",
                    max_length=4096,
                    workers=1,
                    train_on=mode,
                    encoder=arguments.encoder,
                    **({"chat_template": template} if template else {}),
                )
            )
            for name, (mode, template) in modes.items()
        }
        rows = stages(setups, arguments.rounds)
    print(json.dumps(rows, indent=1)) if arguments.json else print(_table(rows))
    if arguments.plot:
        bars(
            arguments.plot,
            [row["stage"] for row in rows],
            [row["seconds"] for row in rows],
            ours=[row["stage"].startswith("pass 1") for row in rows],
            measure="CPU seconds",
        )


def stages(setups: dict[str, Setup], rounds: int) -> list[dict[str, Any]]:
    """CPU seconds and MB/s of each part of the floor, of the floor, and of pass 1 in each mode."""
    loaded = {name: Preprocessor(setup.recipe, threads=False) for name, setup in setups.items()}
    first, setup = next(iter(loaded.values())), next(iter(setups.values()))
    partitions = list(cut(setup.files))
    blocks = [read_partition(partition) for partition in partitions]
    megabytes = sum(map(len, blocks)) / 1e6
    encode = RawEncoder(first)
    texts = [encode.prepared(_texts_of(first, block, setup.formats[0])) for block in blocks]
    work: dict[str, Callable[[], Any]] = {
        "read": lambda: [read_partition(partition) for partition in partitions],
        "orjson": lambda: [
            orjson.loads(line) for block in blocks for line in block.split(b"\n") if line
        ],
        "raw encoder": lambda: [encode.run(own) for own in texts],
    }
    for name, own in loaded.items():
        work[f"pass 1, {name}"] = lambda own=own: [  # type: ignore[misc]
            preprocess(own, read_partition(partition), setup.formats[0], seed=None)
            for partition in partitions
        ]
    for run in work.values():
        run()
    taken: dict[str, list[float]] = {stage: [] for stage in work}
    for _ in range(rounds):
        for stage, run in work.items():
            started = time.process_time()
            run()
            taken[stage].append(time.process_time() - started)
    seconds = {stage: statistics.median(each) for stage, each in taken.items()}
    floor = sum(seconds[stage] for stage in ("read", "orjson", "raw encoder"))
    order = ["read", "orjson", "raw encoder", "floor", *(s for s in work if s.startswith("pass"))]
    seconds["floor"] = floor
    return [
        {
            "stage": stage,
            "seconds": seconds[stage],
            "mb_per_second": megabytes / seconds[stage],
            "of_floor": floor / seconds[stage],
            "of_first_mode": seconds[order[4]] / seconds[stage],
            "paths": _paths(loaded, stage, blocks, setup.formats[0]),
        }
        for stage in order
    ]


class RawEncoder:
    """The library that encodes, called in the form that it processes fastest."""

    def __init__(self, stages: Preprocessor) -> None:
        spec, self._separator = stages.recipe.tokenizer, between_texts(stages.recipe.tokenizer)
        self._fast = stages.recipe.encoder == "gigatoken"
        if self._fast:
            self._encode: Callable[[Any], Any] = load_gigatoken(spec).encode
        else:
            self._encode = HfEncoder(spec, threads=False).encode

    def prepared(self, texts: list[str]) -> Any:
        if not self._fast:
            return texts
        encoded = [text.encode() for text in texts]
        if self._separator is None:
            return encoded
        return [self._separator.text.encode().join(encoded)]

    def run(self, prepared: Any) -> None:
        if not self._fast:
            self._encode(prepared)
        else:
            for text in prepared:
                self._encode(text)


def _texts_of(stages: Preprocessor, block: bytes, format_name: str) -> list[str]:
    counts: Counter[str] = Counter()
    examples = read_examples(stages, ByteSearcher(block), format_name, [], counts)
    return stages.renderer.render(examples, [], counts).texts


def _paths(
    loaded: dict[str, Preprocessor], stage: str, blocks: list[bytes], format_name: str
) -> dict[str, int]:
    """How many conversations took which path, of pass 1."""
    counts: Counter[str] = Counter()
    stages = loaded.get(stage.removeprefix("pass 1, "))
    for block in blocks if stages is not None else ():
        assert stages is not None
        counts.update(preprocess(stages, block, format_name, seed=None).counts)
    return {key: number for key, number in counts.items() if key.startswith(("masks.", "template"))}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'stage':<28}{'CPU s':>8}{'MB/s':>8}{'of the floor':>14}{'of the first mode':>19}"]
    for row in rows:
        own = row["stage"].startswith("pass")
        ratios = f"{row['of_floor']:>14.2f}{row['of_first_mode']:>19.2f}" if own else ""
        lines.append(
            f"{row['stage']:<28}{row['seconds']:>8.3f}{row['mb_per_second']:>8,.0f}{ratios}"
        )
        lines += [f"    {key}: {number:,}" for key, number in row["paths"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

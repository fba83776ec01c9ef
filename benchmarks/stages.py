"""Cost of pass 1 compared with its floor: reading, parsing and the raw encoder.

    python -m benchmarks.stages                                  # 120 MB of varied chats, qwen3
    python -m benchmarks.stages --data short --megabytes 60      # records of about 220 bytes
    python -m benchmarks.stages --data my.jsonl --tokenizer DIR --chat-template FILE

Pass 1 is measured with all tokens trained (`all`), and with only those of the assistant, which are
derived from the tokenizer's own template (`assistant`), or marked by a training template if one is
specified or is in the package trl (`assistant, marked`). There is one process with one thread;
everything is loaded and warm, and nothing is written. The result is the median CPU time of several
rounds, in each of which the stages alternate.

The floor reads the file, parses each line with orjson, and encodes the rendered texts, joined with
a separator, in one call of the encoder per partition (`tokenizers`: one call per text; fastokens:
one call per 16,384 characters).
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

from benchmarks.corpora import (
    add_corpus_arguments,
    make_corpus,
    positive_int,
    tokenizer_folder,
    training_template,
)
from benchmarks.plots import plot_bars
from sftprep.config import BuildConfig
from sftprep.core.byte_search import ByteSearcher
from sftprep.core.chunking import in_groups
from sftprep.core.types import Counts
from sftprep.pipeline.passes.preprocess import Preprocessor, preprocess, read_examples
from sftprep.pipeline.prepare.setup import Setup, prepare_setup
from sftprep.sources.partition import cut, read_partition
from sftprep.tokenize.encoders.fastokens import load_fastokens
from sftprep.tokenize.encoders.gigatoken import load_gigatoken
from sftprep.tokenize.encoders.load import ENCODERS
from sftprep.tokenize.encoders.reference import HfEncoder
from sftprep.tokenize.encoders.separators import find_separator


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_arguments(parser, megabytes=120)
    parser.add_argument("--tokenizer", default="qwen3", help="folder of a tokenizer")
    parser.add_argument("--chat-template", help="template to use instead of the tokenizer's own")
    parser.add_argument("--encoder", default="auto", choices=("auto", *ENCODERS))
    parser.add_argument("--train-on", nargs="+", default=["all", "assistant"])
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, help="plot the seconds of each stage to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as scratch:
        path, renames = make_corpus(arguments.data, Path(scratch), arguments.megabytes)
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
        rows = measure_stages(setups, arguments.rounds)
    print(json.dumps(rows, indent=1)) if arguments.json else print(_table(rows))
    if arguments.plot:
        plot_bars(
            arguments.plot,
            [row["stage"] for row in rows],
            [row["seconds"] for row in rows],
            ours=[row["stage"].startswith("pass 1") for row in rows],
            measure="CPU seconds",
        )


def measure_stages(setups: dict[str, Setup], rounds: int) -> list[dict[str, Any]]:
    """Return CPU seconds and MB/s of the floor, of its parts, and of pass 1 in each mode."""
    loaded = {name: Preprocessor(setup.recipe, threads=False) for name, setup in setups.items()}
    first, setup = next(iter(loaded.values())), next(iter(setups.values()))
    partitions = list(cut(setup.files))
    blocks = [read_partition(partition) for partition in partitions]
    megabytes = sum(map(len, blocks)) / 1e6
    encode = RawEncoder(first)
    texts = [encode.prepare(render_texts(first, block, setup.formats[0])) for block in blocks]
    work: dict[str, Callable[[], Any]] = {
        "read": lambda: [read_partition(partition) for partition in partitions],
        "orjson": lambda: [
            orjson.loads(line) for block in blocks for line in block.split(b"\n") if line
        ],
        "raw encoder": lambda: [encode.run(prepared) for prepared in texts],
    }
    for name, preprocessor in loaded.items():
        work[f"pass 1, {name}"] = lambda preprocessor=preprocessor: [  # type: ignore[misc]
            preprocess(
                preprocessor, read_partition(partition), setup.formats[0], setup.limit, seed=None
            )
            for partition in partitions
        ]
    for run in work.values():
        run()
    measured: dict[str, list[float]] = {stage: [] for stage in work}
    for _ in range(rounds):
        for stage, run in work.items():
            started = time.process_time()
            run()
            measured[stage].append(time.process_time() - started)
    seconds = {stage: statistics.median(times) for stage, times in measured.items()}
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
            "paths": _count_paths(loaded, stage, blocks, setup),
        }
        for stage in order
    ]


class RawEncoder:
    """Library of the encoder, called in the form that it processes fastest."""

    def __init__(self, stages: Preprocessor) -> None:
        spec, self._name = stages.recipe.tokenizer, stages.recipe.encoder
        self._separator = find_separator(spec)
        if self._name == "gigatoken":
            self._encode: Callable[[Any], Any] = load_gigatoken(spec).encode
        elif self._name == "fastokens":
            encode_batch = load_fastokens(spec).encode_batch_flat
            self._encode = lambda text: encode_batch([text])
        else:
            self._encode = HfEncoder(spec, threads=False).encode

    def prepare(self, texts: list[str]) -> Any:
        """Return the texts in the form that `run` takes."""
        between = None if self._separator is None else self._separator.text
        if self._name == "gigatoken":
            encoded = [text.encode() for text in texts]
            return encoded if between is None else [between.encode().join(encoded)]
        if self._name == "fastokens":  # its threads take part in texts of 64 KiB and more
            groups = in_groups(texts, 1 << 14)
            return texts if between is None else [between.join(group) for group in groups]
        return texts

    def run(self, prepared: Any) -> None:
        """Encode the texts of one partition."""
        if self._name == "tokenizers":
            self._encode(prepared)
        else:
            for text in prepared:
                self._encode(text)


def render_texts(stages: Preprocessor, block: bytes, format_name: str) -> list[str]:
    """Return the rendered texts of the lines of a partition."""
    counts = Counts()
    examples = read_examples(stages, ByteSearcher(block), format_name, [], counts)
    return stages.renderer.render(examples, [], counts).texts


def _count_paths(
    loaded: dict[str, Preprocessor], stage: str, blocks: list[bytes], setup: Setup
) -> dict[str, int]:
    """Return the number of conversations on each path of pass 1."""
    counts: Counter[str] = Counter()
    stages = loaded.get(stage.removeprefix("pass 1, "))
    for block in blocks if stages is not None else ():
        assert stages is not None
        counts.update(preprocess(stages, block, setup.formats[0], setup.limit, seed=None).counts)
    return {key: number for key, number in counts.items() if key.startswith(("masks.", "template"))}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'stage':<28}{'CPU s':>8}{'MB/s':>8}{'of the floor':>14}{'of the first mode':>19}"]
    for row in rows:
        is_pass = row["stage"].startswith("pass")
        ratios = f"{row['of_floor']:>14.2f}{row['of_first_mode']:>19.2f}" if is_pass else ""
        lines.append(
            f"{row['stage']:<28}{row['seconds']:>8.3f}{row['mb_per_second']:>8,.0f}{ratios}"
        )
        lines += [f"    {key}: {number:,}" for key, number in row["paths"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Shares of the sources of a mixture in its sequences, tokens and trained tokens.

    python -m benchmarks.mixtures
    python -m benchmarks.mixtures --sources a.jsonl:3 b.jsonl:1 --train-on assistant

The same sources with the same weights are built once by records, once by tokens and once by trained
tokens. The columns are the shares in percent, and the seconds of the build. The later builds use
the spills of the first one, so their seconds are those of the choice, the plan and the shards.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import get_args

import sftprep
from benchmarks.corpora import make_corpus, tokenizer_folder, training_template
from benchmarks.packing import machine_line
from sftprep.config.validation import MixBy, TrainOn

SOURCES = ("varied:1", "short:3")
MEGABYTES = 20


def read_sources(items: list[str], folder: Path) -> list[dict[str, object]]:
    """Return the sources of a mixture from items such as `varied:3`.

    Args:
        items: A corpus of benchmarks/corpora.py or a file, and the weight of each.
        folder: The folder for generated files.
    """
    sources = []
    for item in items:
        name, _, weight = item.rpartition(":")
        path, renames = make_corpus(name, folder, MEGABYTES)
        sources.append(
            {"path": str(path), "name": Path(name).stem, "weight": float(weight), "map": renames}
        )
    return sources


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--sources", nargs="+", default=SOURCES, metavar="CORPUS:WEIGHT")
    parser.add_argument("--tokenizer", default="qwen3")
    parser.add_argument("--train-on", choices=get_args(TrainOn), default="assistant")
    parser.add_argument("--max-length", type=int, default=4096)
    options = parser.parse_args()
    tokenizer = tokenizer_folder(options.tokenizer)
    template = training_template(tokenizer)
    print(machine_line())
    print(f"{'mix by':<16}{'source':<28}{'weight':>7}{'sequences':>11}{'tokens':>9}{'trained':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for mix_by in get_args(MixBy):
            report = sftprep.build(
                sources=read_sources(options.sources, Path(folder)),
                tokenizer=tokenizer,
                chat_template=template,
                output=f"{folder}/build",
                train_on=options.train_on,
                max_length=options.max_length,
                mix_by=mix_by,
                keep_spill=True,
                overwrite=True,
            )
            for source in report.manifest.sources:
                shares = source.shares
                print(
                    f"{mix_by:<16}{source.name:<28}{source.weight:>7g}"
                    f"{shares['sequences']:>11.2f}{shares['tokens']:>9.2f}"
                    f"{shares['trained_tokens']:>9.2f}",
                    flush=True,
                )
            print(f"{'':<16}{report.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

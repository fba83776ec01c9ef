"""What the loader costs a training step: shards and streams of sftprep, beside `datasets` with the
collator of TRL.

    python -m benchmarks.loader                        # chitchat with qwen3, packs of 4,096,
    batches of 8 python -m benchmarks.loader --data gsm8k --batch 4

All loaders give the same packs in batches of the same size, as one padding-free row each. Nothing
is trained: what is measured is the time from batch to batch where the training takes none. With
workers, batches are made beside the training, so `step` is what a step of --step-ms, slept here,
waits for its batch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpora import corpus, tokenizer_folder
from benchmarks.packing import machine_line


@dataclass(frozen=True)
class Way:
    """A loader: its name, what makes it anew, and whether its packs are those of the others."""

    name: str
    make: Callable[[], Iterable[Any]]
    same_packs: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="chitchat", help="chitchat, gsm8k, or a JSONL file")
    parser.add_argument("--tokenizer", default="qwen3", help="folder of a tokenizer")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8, help="packs in a batch")
    parser.add_argument("--batches", type=int, default=60, help="batches that are timed")
    parser.add_argument(
        "--step-ms", type=float, default=100.0, help="how long a step is taken to be"
    )
    options = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as scratch:
        print(
            f"{'loader':<44}{'first':>9}{'ms/batch':>11}{'packs/s':>10}"
            f"{'waits':>9}{'of a step':>11}{'tokens':>13}"
        )
        expected = None
        for way in ways(options, Path(scratch)):
            first, each, tokens = timed(way.make(), options.batches)
            waits = waited(way.make(), min(options.batches, 20), options.step_ms / 1000)
            print(
                f"{way.name:<44}{first * 1000:>7.0f}ms{each * 1000:>11.2f}"
                f"{options.batch / each:>10,.0f}{waits * 1000:>7.2f}ms"
                f"{100 * waits / (options.step_ms / 1000):>10.2f}%{tokens:>13,}",
                flush=True,
            )
            expected = tokens if expected is None and way.same_packs else expected
            if way.same_packs and tokens != expected:
                raise SystemExit(f"{way.name} gave {tokens:,} tokens, not {expected:,}")


def ways(options: argparse.Namespace, folder: Path) -> Iterator[Way]:
    """The loaders, over one build."""
    from transformers import AutoTokenizer

    from sftprep import BuildConfig, build, open_shards
    from sftprep.stream import PackedStream
    from sftprep.torch import StreamLoader
    from sfttrain.data.batching import PackLoader, StepPlan, StepSampler, collate_packs

    path, renames = corpus(options.data, folder)
    tokenizer = str(tokenizer_folder(options.tokenizer))
    config = BuildConfig.of(
        inputs=str(path),
        tokenizer=tokenizer,
        output=str(folder / "packs"),
        map=tuple(renames),
        max_length=options.max_length,
        pack_window=4096,
        order="keep",
    )
    build(config)
    shards = open_shards(folder / "packs")
    rows = options.batch

    def ours(workers: int) -> Callable[[], Iterable[Any]]:
        plan = StepPlan(packs=len(shards), rows=rows, shuffle=False)
        return lambda: PackLoader(shards, StepSampler(plan), workers=workers)

    def streamed(workers: int) -> Callable[[], Iterable[Any]]:
        return lambda: StreamLoader(
            PackedStream(str(path), config=config), rows, collate_packs, workers=workers
        )

    yield Way("sfttrain, shards", ours(0))
    yield Way("sfttrain, shards, 1 worker", ours(1))
    yield Way("sftprep.stream, from the raw records", streamed(0))
    yield Way("sftprep.stream, 1 worker", streamed(1))

    import datasets
    from torch.utils.data import DataLoader
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packed = datasets.Dataset.from_list(
        [
            {
                "input_ids": pack.input_ids.tolist(),
                "labels": np.where(pack.completion_mask, pack.input_ids, -100).tolist(),
                "seq_lengths": pack.seq_lengths.tolist(),
            }
            for pack in shards
        ]
    )
    packed.save_to_disk(str(folder / "packed"))
    packed = datasets.load_from_disk(str(folder / "packed"))
    pad = AutoTokenizer.from_pretrained(tokenizer).pad_token_id or 0
    collate = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=True)
    for workers in (0, 1):
        yield Way(
            f"datasets + TRL collator{', 1 worker' if workers else ''}",
            lambda workers=workers: DataLoader(
                packed, batch_size=rows, collate_fn=collate, num_workers=workers
            ),
        )
    iterable = packed.to_iterable_dataset()
    yield Way(
        "datasets streaming + TRL collator",
        lambda: DataLoader(iterable, batch_size=rows, collate_fn=collate),
    )


def timed(loader: Iterable[Any], batches: int) -> tuple[float, float, int]:
    """Seconds to the first batch, mean seconds between the others, and tokens in all."""
    seconds, tokens, start = [], 0, time.perf_counter()
    for number, batch in enumerate(loader):
        seconds.append(time.perf_counter() - start)
        tokens += batch["input_ids"].shape[1]
        if number + 1 == batches:
            break
        start = time.perf_counter()
    return seconds[0], statistics.mean(seconds[1:]), tokens


def waited(loader: Iterable[Any], batches: int, step: float) -> float:
    """Mean seconds that a step waits for its batch, without the first."""
    waits = []
    iterator = iter(loader)
    next(iterator)
    for _ in range(batches):
        time.sleep(step)
        start = time.perf_counter()
        if next(iterator, None) is None:
            break
        waits.append(time.perf_counter() - start)
    return statistics.mean(waits)


if __name__ == "__main__":
    main()

"""Cost of the loader for a training step: shards and streams of sftprep, and `datasets` with TRL's
collator.

    python -m benchmarks.loader                        # chitchat, qwen3, packs of 4,096 tokens
    python -m benchmarks.loader --data gsm8k --batch 4

All loaders give the same packs in batches of the same size, as one padding-free row each. Nothing
is trained. `ms/batch` is the time between batches that are requested one after the other. With
workers, batches are made in parallel to the training: `waits` is the time that a step of --step-ms,
during which the process sleeps, waits for its batch.
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

from benchmarks.corpora import make_corpus, tokenizer_folder
from benchmarks.packing import machine_line


@dataclass(frozen=True)
class LoaderCase:
    """One loader to measure."""

    name: str
    make: Callable[[], Iterable[Any]]
    """Creates a new loader, at its first batch."""
    same_packs: bool = True
    """Whether its packs are those of the other loaders."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="chitchat", help="chitchat, gsm8k, or a JSONL file")
    parser.add_argument("--tokenizer", default="qwen3", help="folder of a tokenizer")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8, help="packs in a batch")
    parser.add_argument("--batches", type=int, default=60, help="number of measured batches")
    parser.add_argument("--step-ms", type=float, default=100.0, help="simulated duration of a step")
    options = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as scratch:
        print(
            f"{'loader':<44}{'first':>9}{'ms/batch':>11}{'packs/s':>10}"
            f"{'waits':>9}{'of a step':>11}{'tokens':>13}"
        )
        expected = None
        for case in make_cases(options, Path(scratch)):
            first, seconds, tokens = time_batches(case.make(), options.batches)
            waits = time_waits(case.make(), min(options.batches, 20), options.step_ms / 1000)
            print(
                f"{case.name:<44}{first * 1000:>7.0f}ms{seconds * 1000:>11.2f}"
                f"{options.batch / seconds:>10,.0f}{waits * 1000:>7.2f}ms"
                f"{100 * waits / (options.step_ms / 1000):>10.2f}%{tokens:>13,}",
                flush=True,
            )
            expected = tokens if expected is None and case.same_packs else expected
            if case.same_packs and tokens != expected:
                raise SystemExit(f"{case.name} gave {tokens:,} tokens, not {expected:,}")


def make_cases(options: argparse.Namespace, folder: Path) -> Iterator[LoaderCase]:
    """Yield the loaders, all over one build."""
    from transformers import AutoTokenizer

    from sftprep import BuildConfig, build, open_shards
    from sftprep.stream import PackedStream
    from sftprep.torch import StreamLoader
    from sfttrain.data.batching import PackLoader, StepSampler, collate_packs
    from sfttrain.data.step_plan import StepPlan

    path, renames = make_corpus(options.data, folder)
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

    def shard_loader(workers: int) -> Callable[[], Iterable[Any]]:
        plan = StepPlan(packs=len(shards), rows=rows, shuffle=False)
        return lambda: PackLoader(shards, StepSampler(plan), workers=workers)

    def stream_loader(workers: int) -> Callable[[], Iterable[Any]]:
        return lambda: StreamLoader(
            PackedStream(str(path), config=config), rows, collate_packs, workers=workers
        )

    yield LoaderCase("sfttrain, shards", shard_loader(0))
    yield LoaderCase("sfttrain, shards, 1 worker", shard_loader(1))
    yield LoaderCase("sftprep.stream, from the raw records", stream_loader(0))
    yield LoaderCase("sftprep.stream, 1 worker", stream_loader(1))

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
        yield LoaderCase(
            f"datasets + TRL collator{', 1 worker' if workers else ''}",
            lambda workers=workers: DataLoader(
                packed, batch_size=rows, collate_fn=collate, num_workers=workers
            ),
        )
    iterable = packed.to_iterable_dataset()
    yield LoaderCase(
        "datasets streaming + TRL collator",
        lambda: DataLoader(iterable, batch_size=rows, collate_fn=collate),
    )


def time_batches(loader: Iterable[Any], batches: int) -> tuple[float, float, int]:
    """Return seconds to the first batch, mean seconds between the others, and all tokens."""
    seconds, tokens, start = [], 0, time.perf_counter()
    for number, batch in enumerate(loader):
        seconds.append(time.perf_counter() - start)
        tokens += batch["input_ids"].shape[1]
        if number + 1 == batches:
            break
        start = time.perf_counter()
    return seconds[0], statistics.mean(seconds[1:]), tokens


def time_waits(loader: Iterable[Any], batches: int, step: float) -> float:
    """Return the mean seconds that a step waits for its batch, except the first."""
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

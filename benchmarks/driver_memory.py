"""Peak memory of the main process (the driver) of builds of 10^6, 5 x 10^6 and 2 x 10^7 sequences.

    python -m benchmarks.driver_memory
    python -m benchmarks.driver_memory --kinds plain --sizes 1000000 5000000 --lengths short

The claim is that the driver keeps at most one byte per sequence: its peak is that of one group, and
does not grow with the number of groups. `sftprep.build` runs in a child process, over a sparse file
of the size that the sequences would have as JSON, which becomes groups of 1 GiB. Its executor makes
up the results of the workers from lengths alone: partitions without spills, and empty shards. So
everything that the driver does is real: the selection, the plan, the order of the packs, receipts,
the files of groups and the commit. The slope is that of the line through the peaks, by least
squares. Kinds of builds: `plain`; `mixture`, two sources with weights; `duplicates`, whose records
are compared over all groups.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from benchmarks.corpora import positive_int
from benchmarks.groups import BYTES_PER_TOKEN
from benchmarks.packing import GENERATED, machine_line
from sftprep import build
from sftprep.core.mask_arrays import find_targets
from sftprep.core.types import TokenBatch
from sftprep.pipeline.passes.overlong import fit_lengths
from sftprep.pipeline.passes.sequence_stats import (
    SequenceStats,
    count_exact_lengths,
    count_lengths,
)
from sftprep.pipeline.passes.shard_pass import ShardTask, write_one_shard
from sftprep.pipeline.passes.tokenize_pass import (
    PartitionResult,
    TokenizeTask,
    tokenize_partition,
)
from sftprep.shards.group import Block, ShardInfo
from sftprep.shards.pack_index import PackIndex
from sftprep.shards.schema import BLOCK_PACKS, shard_schema

MAX_LENGTH = 4096
KINDS = ("plain", "mixture", "duplicates")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument(
        "--sizes", type=positive_int, nargs="+", default=[1_000_000, 5_000_000, 20_000_000]
    )
    parser.add_argument("--lengths", choices=GENERATED, default="chat-like")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(run_driver(*json.loads(options.task))))
        return 0
    print(machine_line())
    print(f"{'build':<12}{'sequences':>12}{'groups':>8}{'packs':>12}{'peak, MB':>10}")
    slopes = []
    for kind in options.kinds:
        peaks = []
        for size in options.sizes:
            row = _measure(kind, options.lengths, size)
            peaks.append(row["peak_bytes"])
            print(
                f"{kind:<12}{row['sequences']:>12,}{row['groups']:>8}{row['packs']:>12,}"
                f"{row['peak_bytes'] / 1e6:>10.0f}",
                flush=True,
            )
        if len(peaks) > 1:
            slopes.append(float(np.polyfit(options.sizes, peaks, 1)[0]))
            print(f"{kind:<12}{slopes[-1]:.2f} bytes per sequence")
    return 0 if all(slope <= 1 for slope in slopes) else 1


def _measure(kind: str, lengths: str, sequences: int) -> dict[str, Any]:
    """Run one build in a child process; return its numbers."""
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as folder:
        task = json.dumps([kind, lengths, sequences, folder])
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.driver_memory", "--task", task],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "SFTPREP_CACHE": f"{folder}/cache"},
        )
    if done.returncode:
        raise SystemExit(f"the build failed:\n{done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout)
    return row


# --- in the child process -------------------------------------------------------------------------


def run_driver(kind: str, lengths: str, sequences: int, folder: str) -> dict[str, Any]:
    """Run a build whose workers only make up results, and return its numbers.

    Args:
        kind: One of KINDS.
        lengths: The distribution of the lengths: a key of GENERATED.
        sequences: The number of sequences.
        folder: The folder for the inputs and the build.
    """
    mean = float(GENERATED[lengths](np.random.default_rng(0), 100_000, MAX_LENGTH).mean())
    bytes_per_sequence = BYTES_PER_TOKEN * mean
    size = int(sequences * bytes_per_sequence)
    files = [Path(folder) / f"{name}.jsonl" for name in ("ab" if kind == "mixture" else "a")]
    for path in files:
        _write_sparse(path, size // len(files))
    settings: dict[str, Any] = {"inputs": [str(path) for path in files]}
    if kind == "mixture":
        sources = [
            {"name": path.stem, "inputs": [str(path)], "weight": weight}
            for path, weight in zip(files, (3, 2), strict=True)
        ]
        settings = {"sources": sources}
    elif kind == "duplicates":
        settings["duplicates"] = "drop"
    report = build(
        **settings,
        tokenizer=_write_tokenizer(Path(folder)),
        encoder="tokenizers",
        output=Path(folder) / "o",
        max_length=MAX_LENGTH,
        executor=LengthsOnly(GENERATED[lengths], bytes_per_sequence),
    )
    return {
        "sequences": report.manifest.accounting.records,
        "groups": len(report.manifest.groups),
        "packs": report.manifest.rows,
        # Linux counts in KiB, and macOS in bytes.
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }


class LengthsOnly:
    """An executor whose workers neither read nor write tokens.

    Args:
        generate: Returns the lengths of sequences.
        bytes_per_sequence: The size of a sequence in the input.
    """

    capacity = 2
    far = False

    def __init__(
        self, generate: Callable[..., np.ndarray[Any, Any]], bytes_per_sequence: float
    ) -> None:
        self._generate, self._bytes_per_sequence = generate, bytes_per_sequence

    def map_unordered(self, fn: Callable[[Any], Any], specs: Iterable[Any]) -> Iterator[Any]:
        work = {tokenize_partition: self._tokenize, write_one_shard: _write_shard}
        return map(work[fn], specs)

    def close(self) -> None:
        pass

    def _tokenize(self, task: TokenizeTask) -> PartitionResult:
        """Return the result of a partition, with sequences that are trained completely."""
        size = task.partition.end - task.partition.start
        identity = f"{task.partition.file}:{task.partition.start}".encode()
        rng = np.random.default_rng(xxhash.xxh3_64_intdigest(identity))
        lengths = self._generate(rng, round(size / self._bytes_per_sequence), MAX_LENGTH)
        sequences = TokenBatch(
            input_ids=np.zeros(0, np.int32),
            offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))),
            completion_mask=np.zeros(0, np.bool_),
            line_of=np.arange(len(lengths)),
            counts={"lines": len(lengths), "blank": 0, "records": len(lengths)},
        )
        targets = find_targets(None, sequences.offsets)
        fitted = fit_lengths(sequences, targets, b"", task.limit)
        stats = None
        if task.stats is not None:
            lines = fitted.ranges.rows.astype(np.int32)
            hashes = rng.integers(0, 2**64, (2, len(lines)), dtype=np.uint64)
            compared = hashes if task.stats.compare else (None, None)
            stats = SequenceStats(lines, lines, fitted.targets.astype(np.int32), None, *compared)
        return PartitionResult(
            partition=task.partition,
            key=sha256(identity).hexdigest()[:40],
            content=xxhash.xxh3_128_hexdigest(identity),
            bytes=size,
            lengths=fitted.ranges.lengths.astype(np.int32),
            rows=fitted.ranges.rows.astype(np.int32),
            starts=None,
            whole_lengths=count_lengths(sequences, targets, task.limit),
            exact_lengths=count_exact_lengths(sequences, task.limit),
            counts=fitted.counts,
            rejected=[],
            reused=False,
            stats=stats,
        )


@dataclass(frozen=True, slots=True)
class _WrittenShard:
    """What `write_one_shard` returns."""

    index: int
    info: ShardInfo
    max_id: int
    packs: PackIndex


def _write_shard(task: ShardTask) -> _WrittenShard:
    """Write a shard without packs, and return its entry as if it had those of the task."""
    lengths, firsts = task.seq_lengths.astype(np.int64), task.pack_offsets[:-1]
    packs = PackIndex(
        tokens=np.add.reduceat(lengths, firsts).astype(np.int32),
        trained_tokens=np.add.reduceat(lengths - 1, firsts).astype(np.int32),
        sequences=np.diff(task.pack_offsets).astype(np.int32),
        longest=np.maximum.reduceat(task.seq_lengths, firsts),
        sum_of_squares=np.add.reduceat(lengths * lengths, firsts),
        image_patches=np.zeros(len(firsts), np.int32),
    )
    identity = f"{task.shard_folder} {task.index}".encode()
    digest = sha256(identity).hexdigest()
    name = f"shard-{task.index:05d}-{digest[:16]}.arrow"
    with pa.ipc.new_file(
        str(task.shard_folder / name), shard_schema(task.max_length, position_ids=True)
    ):
        pass
    tokens = int(lengths.sum())
    num_blocks = -(-len(packs) // BLOCK_PACKS) + 1
    block = Block(6 * tokens // num_blocks, xxhash.xxh3_128_hexdigest(identity))
    info = ShardInfo(
        name=name,
        rows=len(packs),
        tokens=tokens,
        trained_tokens=tokens - len(lengths),
        bytes=num_blocks * block.bytes,
        sha256=digest,
        blocks=(block,) * num_blocks,
    )
    return _WrittenShard(task.index, info, 0, packs)


def _write_sparse(path: Path, size: int) -> None:
    """Write a file with records at its start, which the setup reads, and a hole after them."""
    line = json.dumps({"text": "one two three"}) + "\n"
    with open(path, "w", encoding="utf-8") as file:
        file.write(line * ((4 << 20) // len(line)))
        file.truncate(size)


def _write_tokenizer(folder: Path) -> str:
    """Write a tokenizer of bytes; return its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())

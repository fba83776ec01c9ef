"""Complete preparation by sftprep and by TRL of the same file with the same tokenizer: load,
tokenize, mask, pack and write.

    python -m benchmarks.prepare_vs_trl                        # chitchat and gsm8k
    python -m benchmarks.prepare_vs_trl --data varied --megabytes 120 --train-on all assistant
    python -m benchmarks.prepare_vs_trl --data my.jsonl --tokenizer path/to/tokenizer

With --train-on assistant, both sides use TRL's training template for the tokenizer, from a file,
and TRL has `assistant_only_loss=True`. With --train-on completion, the last turn of each chat is
its completion on both sides.

Each side runs in a process of its own, and is measured from the end of its imports to the packed
dataset on the disk. TRL's caches are off. The outputs are compared afterwards: the ratio is printed
only if both have the same sequences, with the same trained tokens, the same number of times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpora import (
    CORPORA,
    make_corpus,
    positive_int,
    repeat_records,
    tokenizer_folder,
    training_template,
)
from benchmarks.plots import plot_bars

_MODES = ("all", "assistant", "completion")
PAIRS = [("chitchat", "qwen3"), ("gsm8k", "qwen3"), ("gsm8k", "mistral-v3")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        help=f"{', '.join(CORPORA)}, or a JSONL file; by default chitchat and gsm8k, each with its"
        " tokenizers",
    )
    parser.add_argument(
        "--megabytes", type=positive_int, default=120, help="size of varied or short chats (10^6 B)"
    )
    parser.add_argument("--train-on", nargs="+", default=["default"], choices=("default", *_MODES))
    parser.add_argument("--tokenizer", help="with --data: folder of a tokenizer, by default qwen3")
    parser.add_argument(
        "--copies",
        type=positive_int,
        default=1,
        help="copies of the data, with a number before the text of each record",
    )
    parser.add_argument("--max-length", type=positive_int, default=4096)
    parser.add_argument(
        "--procs", type=positive_int, nargs="+", default=[1, 2], help="TRL's dataset_num_proc"
    )
    parser.add_argument(
        "--runs",
        type=positive_int,
        default=3,
        help="runs of sftprep, of which the median counts; TRL runs once",
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        help="worker processes of sftprep; by default as in a normal build",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, help="plot the throughputs to this file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(_SIDES[arguments.side](json.loads(sys.stdin.read()))))
        return
    if arguments.tokenizer and not arguments.data:
        parser.error("--tokenizer needs --data: without it, each corpus has its own tokenizers")
    pairs = [(arguments.data, arguments.tokenizer or "qwen3")] if arguments.data else PAIRS
    results = [
        row
        for data, tokenizer in pairs
        for mode in arguments.train_on
        for row in compare(data, tokenizer, mode, arguments)
    ]
    print(json.dumps(results, indent=1)) if arguments.json else print(_table(results))
    if arguments.plot:
        _draw(results, arguments.plot)


def compare(
    data: str, tokenizer: str, mode: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the rows of one file, tokenizer and mode: sftprep, then TRL per process count."""
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as scratch:
        folder = Path(scratch)
        path, renames = make_corpus(data, folder, arguments.megabytes)
        template = None
        if mode == "assistant":
            template = training_template(tokenizer_folder(tokenizer))
            if template is None:
                raise SystemExit(f"TRL has no training template for {tokenizer}")
        if mode == "completion":
            path = _write_completions(path, folder / "completions.jsonl")
        if arguments.copies > 1:
            path = repeat_records(path, arguments.copies, folder / "repeated.jsonl")
        task = {
            "path": str(path),
            "map": renames,
            "tokenizer": str(tokenizer_folder(tokenizer)),
            "max_length": arguments.max_length,
            "workers": arguments.workers,
            "train_on": None if mode == "default" else mode,
            "template": None if template is None else str(template),
        }
        runs = [
            _run("ours", {**task, "output": str(folder / f"ours{n}")})
            for n in range(arguments.runs)
        ]
        ours = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
        rows = [{"side": "sftprep", **ours}]
        for procs in arguments.procs:
            theirs = _run("trl", {**task, "procs": procs, "output": str(folder / f"trl{procs}")})
            if theirs["content"] != ours["content"]:
                raise SystemExit(
                    f"{data} with {tokenizer}: the two sides did not train on the same sequences;"
                    " no ratio"
                )
            rows.append({"side": f"TRL, num_proc={procs}", **theirs})
            shutil.rmtree(folder / f"trl{procs}")
        megabytes = path.stat().st_size / 1e6
        for row in rows:
            row.update(
                data=data, tokenizer=tokenizer, mode=mode, mb_per_second=megabytes / row["seconds"]
            )
            row.update(
                tokens_per_second=row["tokens"] / row["seconds"],
                ratio=row["seconds"] / ours["seconds"],
            )
            row.update(bytes_per_token=row["disk"] / row["tokens"])
        return rows


def _run(side: str, task: dict[str, Any]) -> dict[str, Any]:
    # Installed packages have their bytecode; a checkout has it from the first run on, unless this
    # variable prevents it.
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.prepare_vs_trl", "--side", side],
        env=environment,
        input=json.dumps(task),
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        check=False,
    )
    if child.returncode:
        raise SystemExit(f"{side} failed:\n{child.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(child.stdout.strip().split("\n")[-1])
    return result


def _run_ours(task: dict[str, Any]) -> dict[str, Any]:
    import sftprep.pipeline.build  # noqa: F401 - imports are not measured
    from sftprep import BuildConfig, build, load_tokenizer, open_shards

    # A new tokenizer is resolved once for all later builds, which is not part of a build.
    load_tokenizer(task["tokenizer"])
    settings = {name: task[name] for name in ("tokenizer", "output", "max_length", "workers")}
    if task["train_on"]:
        settings["train_on"] = task["train_on"]
    if task["template"]:
        settings["chat_template"] = task["template"]
    started = time.perf_counter()
    build(BuildConfig.of(inputs=task["path"], map=tuple(task["map"]), **settings))
    seconds = time.perf_counter() - started
    peak = _peak_bytes()
    counter: Counter[bytes] = Counter()
    tokens = packs = 0
    for pack in open_shards(task["output"]):
        counter.update(_sequence_keys(pack.input_ids, pack.completion_mask, pack.seq_lengths))
        tokens, packs = tokens + len(pack.input_ids), packs + 1
    return _result(seconds, peak, tokens, packs, Path(task["output"]), counter)


def _run_trl(task: dict[str, Any]) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    renames = dict(pair.split("=") for pair in task["map"])
    output = Path(task["output"])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    arguments = SFTConfig(
        output_dir=str(output),
        max_length=task["max_length"],
        packing=True,
        dataset_num_proc=task["procs"] if task["procs"] > 1 else None,
        assistant_only_loss=task["train_on"] == "assistant",
        chat_template_path=task["template"],
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(task["tokenizer"])
    dataset = datasets.load_dataset(
        "json", data_files=task["path"], split="train", cache_dir=str(output / "cache")
    )
    dataset = dataset.rename_columns(renames) if renames else dataset
    trainer = SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train_dataset.save_to_disk(str(output / "packed"))
    seconds = time.perf_counter() - started
    peak = _peak_bytes()
    counter: Counter[bytes] = Counter()
    packed = trainer.train_dataset.with_format("numpy")
    tokens = 0
    for row in packed:
        ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
        counter.update(_sequence_keys(ids.astype(np.int32), labels != -100, row["seq_lengths"]))
        tokens += len(ids)
    return _result(seconds, peak, tokens, len(packed), output / "packed", counter)


_SIDES = {"ours": _run_ours, "trl": _run_trl}


def _write_completions(path: Path, output: Path) -> Path:
    """Write the chats of a file as prompts with their last turn as the completion."""
    with open(path, encoding="utf-8") as source, open(output, "w", encoding="utf-8") as target:
        for line in source:
            row = json.loads(line)
            *prompt, completion = row.pop("messages")
            row.update(prompt=prompt, completion=[completion])
            target.write(json.dumps(row, ensure_ascii=False) + "\n")
    return output


def _sequence_keys(ids: Any, mask: Any, seq_lengths: Any) -> list[bytes]:
    """Return a digest of ids and trained tokens for each sequence that has a trained token."""
    keys, begin = [], 0
    for length in np.asarray(seq_lengths).tolist():
        end = begin + length
        trained = np.asarray(mask[begin:end])
        if trained[1:].any():
            content = (
                np.asarray(ids[begin:end], np.int32).tobytes() + trained.astype(np.uint8).tobytes()
            )
            keys.append(blake2b(content, digest_size=12).digest())
        begin = end
    return keys


def _result(
    seconds: float, peak: int, tokens: int, packs: int, output: Path, counter: Counter[bytes]
) -> dict[str, Any]:
    disk = sum(path.stat().st_size for path in output.rglob("*.arrow"))
    content = blake2b(
        "".join(f"{key.hex()}:{n}" for key, n in sorted(counter.items())).encode(), digest_size=16
    ).hexdigest()
    sequences = sum(counter.values())
    values = {
        "seconds": seconds,
        "peak_bytes": peak,
        "tokens": tokens,
        "packs": packs,
        "disk": disk,
    }
    return {**values, "sequences": sequences, "content": content}


def _peak_bytes() -> int:
    """Return the largest resident set of this process or of one of its children."""
    return 1024 * max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


_COLUMNS = (10, 12, 12, 18, 9, 8, 13, 8, 9, 9, 12)


def _table(results: list[dict[str, Any]]) -> str:
    rows = [
        (
            "data",
            "tokenizer",
            "train on",
            "side",
            "seconds",
            "MB/s",
            "tokens/s",
            "packs",
            "peak MB",
            "B/token",
            "sftprep is",
        )
    ]
    for r in results:
        speed = (
            f"{r['seconds']:.2f}",
            f"{r['mb_per_second']:.2f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['packs']:,}",
        )
        size = (f"{r['peak_bytes'] / 1e6:,.0f}", f"{r['bytes_per_token']:.2f}")
        ratio = "" if r["side"] == "sftprep" else f"{r['ratio']:.1f}x"
        rows.append(
            (
                Path(r["data"]).name,
                Path(r["tokenizer"]).name,
                r["mode"],
                r["side"],
                *speed,
                *size,
                ratio,
            )
        )
    lines = [
        "".join(
            text.ljust(width) if column < 4 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, _COLUMNS, strict=True))
        )
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            (
                "The sequences, their trained tokens and their numbers are equal on both sides"
                " (checked)."
            ),
        ]
    )


def _draw(results: list[dict[str, Any]], path: Path) -> None:
    plot_bars(
        path,
        [f"{Path(r['data']).name} · {Path(r['tokenizer']).name}\n{r['side']}" for r in results],
        [r["mb_per_second"] for r in results],
        ours=[r["side"] == "sftprep" for r in results],
        measure="MB of JSONL per second",
        log=True,
    )


if __name__ == "__main__":
    main()

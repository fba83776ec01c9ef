"""The whole preparation, ours and TRL's, of the same file with the same tokenizer: load, tokenize,
mask, pack and write.

    python -m benchmarks.prepare_vs_trl                        # chitchat and gsm8k
    python -m benchmarks.prepare_vs_trl --data varied --megabytes 120 --train-on all assistant
    python -m benchmarks.prepare_vs_trl --data my.jsonl --tokenizer path/to/tokenizer

`assistant` gives both sides TRL's training template for the tokenizer's own one, as a file, and TRL
`assistant_only_loss=True`; `completion` gives both the last turn of each chat as its completion.

Each side runs in a process of its own, timed from after its imports to the packed dataset on the
disk. TRL's caches are off. Both outputs are then compared: the same sequences, with the same
trained tokens, as often. The ratio is only printed if they are.
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
    corpus,
    positive,
    repeated,
    tokenizer_folder,
    training_template,
)
from benchmarks.plots import bars

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
    parser.add_argument("--megabytes", type=positive, default=120, help="of varied or short chats")
    parser.add_argument("--train-on", nargs="+", default=["default"], choices=("default", *_MODES))
    parser.add_argument(
        "--tokenizer", help="with --data: folder of a tokenizer, qwen3 if not given"
    )
    parser.add_argument(
        "--copies",
        type=positive,
        default=1,
        help="repeat the data so often, each record with a number before its text",
    )
    parser.add_argument("--max-length", type=positive, default=4096)
    parser.add_argument(
        "--procs", type=positive, nargs="+", default=[1, 2], help="TRL's dataset_num_proc"
    )
    parser.add_argument(
        "--runs",
        type=positive,
        default=3,
        help="runs of ours, of which the median counts; TRL runs once",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        help="our worker processes; by default chosen as in a normal build",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, help="draw the throughputs into this file")
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
    """Rows of the table for one file, tokenizer and mode: ours, then TRL for each number of
    processes."""
    with tempfile.TemporaryDirectory(prefix="sftprep-bench-") as scratch:
        folder = Path(scratch)
        path, renames = corpus(data, folder, arguments.megabytes)
        template = None
        if mode == "assistant":
            template = training_template(tokenizer_folder(tokenizer))
            if template is None:
                raise SystemExit(f"TRL has no training template for {tokenizer}")
        if mode == "completion":
            path = _completions(path, folder / "completions.jsonl")
        if arguments.copies > 1:
            path = repeated(path, arguments.copies, folder / "repeated.jsonl")
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
    # What is installed has its bytecode beside it; a checkout has it from the first run on, if that
    # is allowed.
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


def _ours(task: dict[str, Any]) -> dict[str, Any]:
    import sftprep.pipeline.build  # noqa: F401 - what a first call imports: imports count on neither side
    from sftprep import BuildConfig, build, load_tokenizer, open_shards

    # A tokenizer that was never used before is resolved once, for all builds to come; that is no
    # part of a build.
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
        counter.update(_keys(pack.input_ids, pack.completion_mask, pack.seq_lengths))
        tokens, packs = tokens + len(pack.input_ids), packs + 1
    return _result(seconds, peak, tokens, packs, Path(task["output"]), counter)


def _trl(task: dict[str, Any]) -> dict[str, Any]:
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
        counter.update(_keys(ids.astype(np.int32), labels != -100, row["seq_lengths"]))
        tokens += len(ids)
    return _result(seconds, peak, tokens, len(packed), output / "packed", counter)


_SIDES = {"ours": _ours, "trl": _trl}


def _completions(path: Path, output: Path) -> Path:
    """The chats of a file as prompts with their last turn as the completion."""
    with open(path, encoding="utf-8") as source, open(output, "w", encoding="utf-8") as target:
        for line in source:
            row = json.loads(line)
            *prompt, completion = row.pop("messages")
            row.update(prompt=prompt, completion=[completion])
            target.write(json.dumps(row, ensure_ascii=False) + "\n")
    return output


def _keys(ids: Any, mask: Any, seq_lengths: Any) -> list[bytes]:
    """A digest of each sequence that trains something: its ids and which of them are trained."""
    keys, at = [], 0
    for length in np.asarray(seq_lengths).tolist():
        own = np.asarray(mask[at : at + length])
        if own[1:].any():
            content = (
                np.asarray(ids[at : at + length], np.int32).tobytes()
                + own.astype(np.uint8).tobytes()
            )
            keys.append(blake2b(content, digest_size=12).digest())
        at += length
    return keys


def _result(
    seconds: float, peak: int, tokens: int, packs: int, output: Path, counter: Counter[bytes]
) -> dict[str, Any]:
    disk = sum(path.stat().st_size for path in output.rglob("*.arrow"))
    content = blake2b(
        "".join(f"{key.hex()}:{n}" for key, n in sorted(counter.items())).encode(), digest_size=16
    ).hexdigest()
    sequences = sum(counter.values())
    facts = {"seconds": seconds, "peak_bytes": peak, "tokens": tokens, "packs": packs, "disk": disk}
    return {**facts, "sequences": sequences, "content": content}


def _peak_bytes() -> int:
    """The largest resident set of this process or of one of its children."""
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
                "The same sequences with the same trained tokens on both sides, each as often"
                " (checked)."
            ),
        ]
    )


def _draw(results: list[dict[str, Any]], path: Path) -> None:
    bars(
        path,
        [f"{Path(r['data']).name} · {Path(r['tokenizer']).name}\n{r['side']}" for r in results],
        [r["mb_per_second"] for r in results],
        ours=[r["side"] == "sftprep" for r in results],
        measure="MB of JSONL per second",
        log=True,
    )


if __name__ == "__main__":
    main()

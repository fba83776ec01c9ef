"""Training with sfttrain and with TRL: the same model, sequences and trained tokens, one epoch.

    python -m benchmarks.train_vs_trl                     # on a GPU if there is one
    python -m benchmarks.train_vs_trl --plot docs/train_vs_trl.png --steps 24

The three sides are sfttrain, TRL with packing (bfd, its default), and TRL with padding. Each runs
in a process of its own (benchmarks/training_side.py). The sides train one optimizer step in turn,
so that other work on the machine slows all of them equally. A step is measured from the end of the
previous one: loading, forward, backward, optimizer and logging. The first step of each side is not
counted. It is checked that all sides trained on the same number of tokens. The memory is the
largest resident set of the process (on a GPU: the largest allocation).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.training_side import Task

# Settings of glibc's malloc to keep freed memory.
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}
SIDES = {"ours": "sfttrain", "packed": "TRL 1.16, packed", "padded": "TRL 1.16, padded"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--masked",
        type=float,
        nargs="+",
        default=[0.6, 0.0],
        help="shares of each sequence that are not trained",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=6,
        help="steps in an epoch of sfttrain, or one more; the first is not counted",
    )
    parser.add_argument(
        "--length", type=int, default=2048, help="largest length of a pack in tokens"
    )
    parser.add_argument(
        "--hidden", type=int, default=256, help="width of the model; about 2048 suits a GPU"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument(
        "--bf16", action="store_true", help="mixed precision on all sides; always on a GPU"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of torch on all sides"
    )
    parser.add_argument(
        "--default-malloc",
        action="store_true",
        help=(
            "use the default settings of glibc's malloc, which returns large blocks to the system;"
            " on some virtual machines, allocating them again costs more than the training, so by"
            " default malloc keeps them, on all sides"
        ),
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, for a machine that does other work",
    )
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, help="plot the loss curves to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sfttrain-bench-") as folder:
        model = f"{folder}/model"
        _make_model(model, arguments)
        shared = {
            "model": model,
            "length": arguments.length,
            "vocabulary": arguments.vocabulary,
            "steps": arguments.steps,
        }
        shared |= {
            "bf16": arguments.bf16,
            "threads": arguments.threads,
            "keep_memory": not arguments.default_malloc,
        }
        shared |= {"clock": arguments.clock}
        tasks = [Task(masked=share, **shared) for share in arguments.masked]
        results = [result for task in tasks for result in compare(task, arguments.sides)]
    print(json.dumps(results, indent=1) if arguments.json else _table(results))
    if arguments.plot:
        _draw(results, arguments.plot)


def compare(task: Task, sides: list[str]) -> list[dict[str, Any]]:
    """Return one row of the table per side.

    Raises:
        SystemExit: If the sides did not train on the same number of tokens.
    """
    children = [_SideProcess(name, task) for name in sides]
    try:
        while any(child.is_running for child in children):
            for child in children:
                child.step()
        results = [child.result() for child in children]
    finally:
        for child in children:
            child.stop()
    if len({(r["trained"], r["tokens"]) for r in results}) > 1:
        raise SystemExit(
            f"not the same tokens: {[(r['side'], r['trained'], r['tokens']) for r in results]}"
        )
    for result in results:
        result["masked"] = task.masked
        result["ratio"] = results[0]["trained_per_second"] / result["trained_per_second"]
        result["memory_ratio"] = result["peak_bytes"] / results[0]["peak_bytes"]
    return results


class _SideProcess:
    """Process of one side; see benchmarks/training_side.py."""

    def __init__(self, name: str, task: Task) -> None:
        self.name = name
        self.seconds: list[float] = []  # of each step
        self._answer: dict[str, Any] = {}  # the last line of the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training_side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(task.threads),
                **(_KEEP_MEMORY if task.keep_memory else {}),
            },
        )
        self._send(json.dumps(asdict(task)))
        self._read()  # waits until the trainer is ready

    @property
    def is_running(self) -> bool:
        """Whether the epoch is not complete."""
        return "result" not in self._answer

    def step(self) -> None:
        """Train one step, if the epoch is not complete."""
        if self.is_running:
            self._send("step")
            self._read()
            if self.is_running:
                self.seconds.append(self._answer["seconds"])

    def result(self) -> dict[str, Any]:
        """Return the row of the table."""
        values: dict[str, Any] = self._answer["result"]
        timed = list(zip(self.seconds[1:], values.pop("trained_by_step")[1:], strict=True))
        speed = sum(n for _, n in timed) / sum(s for s, _ in timed)
        rates = [n / s for s, n in timed]
        return {
            "side": self.name,
            "trained_per_second": speed,
            "median_rate": median(rates),
            "steps": len(self.seconds),
            **values,
        }

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed:\n{self._process.communicate()[1][-3000:]}")
        self._answer = json.loads(line)


def _make_model(folder: str, arguments: argparse.Namespace) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        num_key_value_heads=max(1, arguments.hidden // 128),
        head_dim=64,
        max_position_embeddings=arguments.length,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


_COLUMNS = (8, 20, 7, 15, 15, 10, 13, 14)


def _table(results: list[dict[str, Any]]) -> str:
    rows = [
        (
            "masked",
            "side",
            "steps",
            "trained tok/s",
            "all tok/s",
            "peak MB",
            "sfttrain is",
            "their memory",
        )
    ]
    for r in results:
        scale = r["tokens"] / r["trained"]
        speed = (
            f"{r['trained_per_second']:,.0f}",
            f"{r['trained_per_second'] * scale:,.0f}",
            f"{r['peak_bytes'] / 1e6:,.0f}",
        )
        ratios = (
            ("", "")
            if r["side"] == "ours"
            else (f"{r['ratio']:.2f}x", f"{r['memory_ratio']:.2f}x ours")
        )
        rows.append((f"{r['masked']:.0%}", SIDES[r["side"]], str(r["steps"]), *speed, *ratios))
    lines = [
        "".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, _COLUMNS, strict=True))
        )
        for row in rows
    ]
    losses = [f"{SIDES[r['side']]} {r['losses'][0]:.3f} → {r['losses'][-1]:.3f}" for r in results]
    return "\n".join(
        [
            *lines,
            (
                f"{results[0]['device']}; the same tokens on all sides (checked). Loss:"
                f" {'; '.join(losses)}"
            ),
        ]
    )


def _draw(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = sorted({r["masked"] for r in results}, reverse=True)
    figure, panels = pyplot.subplots(
        1, len(shares), figsize=(5 * len(shares), 3.4), squeeze=False, sharey=True
    )
    for share, axes in zip(shares, panels[0], strict=True):
        for r in (r for r in results if r["masked"] == share):
            color = {"ours": "#2a7", "packed": "#c60", "padded": "#999"}[r["side"]]
            axes.plot(r["trained_at"], r["losses"], color=color, label=SIDES[r["side"]], marker=".")
        axes.set_title(f"{share:.0%} of the tokens masked")
        axes.set_xlabel("trained tokens")
    panels[0][0].set_ylabel("loss")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
